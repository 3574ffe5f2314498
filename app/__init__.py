"""Thirtytwo: a classifier service for small images.

The way of a request: `uploads` streams the body into memory under its limits, `model.images` turns each file into
pixels, `batcher` queues the pixels and hands whatever waits to the inference thread, where `classifier` turns them
into probabilities; `routes` shapes the answer. `oip` is the same way for clients of the Open Inference Protocol.
Errors anywhere are one tree (`errors`) that `problems` renders. `application` wires it all from one frozen table of
`settings`; `__main__` starts uvicorn.
"""

__version__ = "0.1.0"
