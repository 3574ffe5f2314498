"""The protocol's two models: one network, with pixels or with image files as its input."""

from typing import Any, NamedTuple

from starlette.exceptions import HTTPException

from app.inference.classifier import Classifier
from app.oip.tensors import TensorSpec

PROBABILITIES = "probabilities"
OOD_SCORE = "ood_score"
VERSION = "1"  # the protocol's versions are small integers; GET /model has the version of the weights


class Model(NamedTuple):
    name: str
    platform: str
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]


def names(classifier: Classifier) -> tuple[str, str]:
    """Of the model with pixels, and of the one with image files."""
    name = classifier.weights.card.name
    return name, f"{name}_image"


def check_name(classifier: Classifier, name: str, version: str = VERSION) -> None:
    """Raises HTTPException 404 if the classifier has no such model."""
    known = names(classifier)
    if name not in known or version != VERSION:
        raise HTTPException(
            404, f"There is no model '{name}' of version {version}; there are {' and '.join(known)} of {VERSION}."
        )


def find(classifier: Classifier, name: str, version: str = VERSION) -> Model:
    """The model of this name; raises as `check_name`."""
    check_name(classifier, name, version)
    is_pixels, size = name == names(classifier)[0], classifier.input_size
    images = TensorSpec("image", "UINT8", (-1, size, size, 3)) if is_pixels else TensorSpec("image", "BYTES", (-1,))
    outputs = [TensorSpec(PROBABILITIES, "FP32", (-1, len(classifier.classes)))]
    if classifier.weights.card.has_ood_score:
        outputs.append(TensorSpec(OOD_SCORE, "FP32", (-1,)))
    return Model(name, classifier.engine.name, images, tuple(outputs))


def metadata(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": model.platform,
        "inputs": [model.input._asdict()],
        "outputs": [output._asdict() for output in model.outputs],
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
        "output": [
            {"name": output.name, "data_type": f"TYPE_{output.datatype}", "dims": output.shape[1:]}
            for output in model.outputs
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": 0},
    }
