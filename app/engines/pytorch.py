"""PyTorch: the engine on CUDA and MPS, and on a CPU for architectures that OpenVINO does not support.

On CUDA the prepared batch sizes run as graphs (`app.engines.graphs`), elsewhere the network runs eagerly.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.engines import base, cuda, graphs
from app.engines.base import Output
from app.engines.cuda import Driver, Torch
from app.engines.graphs import LANES, CudaStream, GraphedForward, Stream
from app.errors import DeviceError, DeviceLostError, WeightsError
from app.model import networks
from app.model.calibration import SMOOTHING_FLOOR
from app.model.ood import TENSORS, WHITENING
from app.model.weights import Weights

logger = logging.getLogger(__name__)

GRAPH_TOLERANCE = 0.02  # of a probability: libraries choose other kernels for other batch sizes
BFLOAT16_CAPABILITY = (8, 0)  # Ampere; earlier GPUs emulate it


class TorchEngine:
    """Channels last; bfloat16 or float16 where the device computes in it natively.

    `make_stream` gives the streams that graphs are captured on, by default those of CUDA, and none elsewhere. Raises
    WeightsError for a network that cannot be built, DeviceError for an unavailable device or precision.
    """

    name = "torch"

    def __init__(
        self,
        weights: Weights,
        device: str,
        threads: int,
        precision: str = "auto",
        make_stream: Callable[[], Stream] | None = None,
    ) -> None:
        if precision == "int8":
            raise DeviceError("Precision int8 needs the openvino engine.")
        self._device = available_device(device)
        self.device = str(self._device)
        if self._device.type == "cpu":
            torch.set_num_threads(threads)
        dtype = pick_dtype(self._device) if precision == "auto" else getattr(torch, precision)
        self.precision = str(dtype).removeprefix("torch.")
        with start_errors(self._device):
            network = load_network(weights).to(self._device, dtype)
            self._network = network.to(memory_format=torch.channels_last)
        self._calibration = weights.card.temperature, weights.card.label_smoothing_correction
        self._detector = weights.ood_detector()
        if self._detector:
            self._whitening = torch.from_numpy(weights.state[WHITENING]).to(self._device, torch.float32)
        self._input_size, self._classes = weights.card.input_size, len(weights.card.classes)
        if make_stream is None and self._device.type == "cuda":
            make_stream = partial(CudaStream, self._device)
        self._make_stream = make_stream
        self._graphed: GraphedForward | None = None
        self.streams = LANES if make_stream else 1

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        try:
            columns = self._run(images)
        except RuntimeError as error:
            if is_device_lost(error):
                raise DeviceLostError(_line(error)) from error
            raise
        probabilities, whitened = columns[:, : self._classes], columns[:, self._classes :]
        ood = self._detector.scores(probabilities, whitened) if self._detector else None
        return Output(probabilities, np.zeros(len(images), np.uint8), ood)

    def _run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self._graphed is not None and len(images) <= self._graphed.largest:
            return self._graphed(images)
        return self._run_eagerly(images)

    @torch.inference_mode()
    def _run_eagerly(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = torch.from_numpy(images)
        if self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        columns: NDArray[np.float32] = self._forward(batch.to(self._device)).cpu().numpy()
        return columns

    def _forward(self, images: Tensor) -> Tensor:
        """uint8 [N, S, S, 3] to float32 [N, classes + D], on the device: probabilities, then whitened features.

        One tensor, so that a graph has one static output and one copy to the host. D is 0 for a file without scores.
        """
        pixels = images.permute(0, 3, 1, 2)
        if self._detector is None:
            return calibrated_softmax(self._network(pixels).float(), *self._calibration)
        assert isinstance(self._network, networks.ConvNet)  # the only architecture with these scores
        logits, features = self._network.logits_and_means(pixels)
        return torch.cat([calibrated_softmax(logits, *self._calibration), features @ self._whitening.T], 1)

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        """Captures a graph for each size, and compares it with the eager network."""
        with start_errors(self._device):
            if self._make_stream and sizes:
                self._graphed = self._capture(sizes, image, self._make_stream)
            base.prepare(self, sizes, image)

    def _capture(
        self, sizes: Sequence[int], image: NDArray[np.uint8], make_stream: Callable[[], Stream]
    ) -> GraphedForward | None:
        """None, with a warning, where the graphs' outputs differ from the eager ones by more than rounding."""
        expected = self._run_eagerly(image[None])
        graphed = graphs.build(self._forward, sizes, self._input_size, expected.shape[1], make_stream)
        outputs = (graphed(image[None].repeat(size, 0)) for size in sizes)
        classes = self._classes  # the features after them have no common scale
        worst = max(float(np.abs(output - expected)[:, :classes].max()) for output in outputs)
        if not worst <= GRAPH_TOLERANCE:  # also for NaN
            logger.warning("no CUDA graphs are used: their outputs differ by %.3f", worst)
            return None
        logger.info("%d CUDA graphs in %d lanes on %s", len(sizes), graphed.lanes, self.device)
        return graphed

    def memory(self) -> tuple[int, int] | None:
        if self._device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free, total


def calibrated_softmax(logits: Tensor, temperature: float, smoothing_correction: float) -> Tensor:
    """The torch form of `app.model.calibration.calibrated_softmax`: float32 [N, classes] to [N, classes]."""
    softmax = (logits / temperature).softmax(1)
    corrected = torch.maximum(softmax - smoothing_correction / softmax.shape[1], softmax * SMOOTHING_FLOOR)
    return corrected / corrected.sum(1, keepdim=True)


def load_network(weights: Weights) -> nn.Module:
    """The folded network in float32 and evaluation mode; raises WeightsError where card and tensors do not match."""
    card = weights.card
    try:
        network = networks.fold_batchnorms(networks.build(card.architecture, card.arguments))
    except KeyError as error:
        raise WeightsError(f"The architecture {card.architecture!r} is not supported by this version.") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"Invalid arguments of {card.architecture}: {error}") from error
    state = {name: torch.from_numpy(value) for name, value in weights.dequantized().items() if name not in TENSORS}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"The tensors do not match a {card.architecture} with {card.arguments}.") from error
    return network


def available_device(
    name: str,
    query_driver: Callable[[], Driver | None] = cuda.query_driver,
    query_torch: Callable[[int], Torch | None] = cuda.query_torch,
) -> torch.device:
    """The torch device of this name; raises DeviceError where it is unknown or not available, with the reason."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name} is not a device.") from None
    if device.type == "cuda":
        index = device.index or 0
        found = query_torch(index)
        if reason := cuda.obstacle(query_driver(), found):
            raise DeviceError(f"{name} is not available here: {reason}.")
        if found and index >= found.devices:
            raise DeviceError(f"{name} is not available here: the number of GPUs is {found.devices}.")
    elif device.type != "cpu" and not (device.type == "mps" and torch.backends.mps.is_available()):
        raise DeviceError(f"{name} is not available here.")
    return device


def pick_dtype(
    device: torch.device, capability: Callable[[torch.device], tuple[int, int]] | None = None
) -> torch.dtype:
    """The fastest dtype that the device computes in natively; `capability` queries a GPU's compute capability."""
    if device.type == "cpu":
        # torch has a public form of this query for CUDA only
        has_bfloat16: Any = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if device.type == "cuda":
        capability = capability or torch.cuda.get_device_capability
        return torch.bfloat16 if capability(device) >= BFLOAT16_CAPABILITY else torch.float16
    return torch.float32


def is_device_lost(error: RuntimeError) -> bool:
    """Whether every later CUDA call of the process fails, too. Lack of memory is no such error.

    torch 2.8 and later raise AcceleratorError, a RuntimeError, earlier ones RuntimeError with the same text.
    """
    text = str(error)
    return text.startswith("CUDA error") and "out of memory" not in text.partition("\n")[0]


@contextmanager
def start_errors(device: torch.device) -> Iterator[None]:
    """Errors of the device while an engine is built become a DeviceError of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{device} has too little memory; a smaller MAX_BATCH needs less: {_line(error)}") from error
    except (RuntimeError, DeviceLostError) as error:
        if not str(error).startswith("CUDA"):
            raise
        raise DeviceError(f"{device} cannot run the network: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(" See https")[0]
