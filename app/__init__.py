"""Thirtytwo: a classifier service for small images.

docs/architecture.md has the folders and the path of a request.
"""

__version__ = "0.1.0"
