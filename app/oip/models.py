"""The protocol's two models: one network, fed with pixels or with image files."""

from typing import Any, NamedTuple

from app.inference.classifier import Classifier
from app.oip.codec import Tensor

VERSION = "1"  # the protocol's versions are small numbers; the weights' own version is on GET /model


class Model(NamedTuple):
    name: str
    platform: str
    takes: Tensor
    gives: Tensor


def models(classifier: Classifier) -> dict[str, Model]:
    name, size, platform = classifier.weights.card.name, classifier.input_size, classifier.engine.name
    pixels = Tensor("image", "UINT8", (-1, size, size, 3))
    files = Tensor("image", "BYTES", (-1,))
    probabilities = Tensor("probabilities", "FP32", (-1, len(classifier.classes)))
    both = Model(name, platform, pixels, probabilities), Model(f"{name}_image", platform, files, probabilities)
    return {model.name: model for model in both}


def metadata(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": model.platform,
        "inputs": [model.takes._asdict()],
        "outputs": [model.gives._asdict()],
    }


def config(model: Model, max_images: int) -> dict[str, Any]:
    """As Triton tells it; its dimensions are those of one image."""
    given = {"data_type": "TYPE_STRING" if model.takes.datatype == "BYTES" else f"TYPE_{model.takes.datatype}"}
    return {
        "name": model.name,
        "platform": model.platform,
        "backend": model.platform,
        "max_batch_size": max_images,
        "input": [{"name": model.takes.name, **given, "format": "FORMAT_NONE", "dims": model.takes.shape[1:]}],
        "output": [{"name": model.gives.name, "data_type": "TYPE_FP32", "dims": model.gives.shape[1:]}],
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
    }
