"""The protocol's two models: one network, with pixels or with image files as its input."""

from typing import Any, NamedTuple

from app.inference.classifier import Classifier
from app.oip.codec import TensorSpec

VERSION = "1"  # the protocol's versions are small integers; GET /model has the version of the weights


class Model(NamedTuple):
    name: str
    platform: str
    input: TensorSpec
    output: TensorSpec


def models(classifier: Classifier) -> dict[str, Model]:
    name, size, platform = classifier.weights.card.name, classifier.input_size, classifier.engine.name
    pixels = TensorSpec("image", "UINT8", (-1, size, size, 3))
    files = TensorSpec("image", "BYTES", (-1,))
    probabilities = TensorSpec("probabilities", "FP32", (-1, len(classifier.classes)))
    both = Model(name, platform, pixels, probabilities), Model(f"{name}_image", platform, files, probabilities)
    return {model.name: model for model in both}


def metadata(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": model.platform,
        "inputs": [model.input._asdict()],
        "outputs": [model.output._asdict()],
    }


def config(model: Model, max_images: int) -> dict[str, Any]:
    """Triton's model configuration; its dimensions are those of one image."""
    kind = {"data_type": "TYPE_STRING" if model.input.datatype == "BYTES" else f"TYPE_{model.input.datatype}"}
    return {
        "name": model.name,
        "platform": model.platform,
        "backend": model.platform,
        "max_batch_size": max_images,
        "input": [{"name": model.input.name, **kind, "format": "FORMAT_NONE", "dims": model.input.shape[1:]}],
        "output": [{"name": model.output.name, "data_type": "TYPE_FP32", "dims": model.output.shape[1:]}],
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
    }
