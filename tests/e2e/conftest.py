"""Marks the tests that start other programs; ignores modules whose packages (extras e2e and deploy) are missing."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # keeps every port on loopback; read when ray is imported

FOLDER = Path(__file__).parent
REQUIRED = {
    "browser": "playwright",
    "test_kubernetes.py": "kubernetes_validate",
    "test_ray_autoscaling.py": "ray",
    "test_ray_serve.py": "ray",
}

STATIC = {"test_containers.py", "test_monitoring.py"}  # read files only

collect_ignore = [name for name, package in REQUIRED.items() if find_spec(package) is None]


def pytest_report_header() -> str:
    return f"e2e tests left out: {', '.join(collect_ignore) or 'none'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents and item.path.name not in STATIC:
            item.add_marker(pytest.mark.browser if "browser" in item.path.parts else pytest.mark.e2e)
