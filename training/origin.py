"""The network of a weights file that a run begins with, in place of chance: fine-tuning."""

from pathlib import Path

from torch import Tensor, nn

from app.engines.pytorch import load_network
from app.errors import DataError
from app.model import weights
from app.model.networks import ConvNet, unfold

SAMPLE = 1000  # images that the normalisation's share of a folded bias is measured on


def begin(network: nn.Module, file: Path, images: Tensor) -> str:
    """Gives the network the file's filters, and its head where the number of classes is the same; names the file.

    Images uint8 [N, S, S, 3] are the training ones. Raises DataError or WeightsError.
    """
    loaded = weights.load(file)
    found = load_network(loaded)
    if not isinstance(network, ConvNet) or not isinstance(found, ConvNet):
        raise DataError("Only a convnet can begin with another file's network.")
    own, others = ([p.shape for p in net.groups.parameters() if p.ndim == 4] for net in (network, found))
    if own != others:
        widths, depth = ",".join(map(str, loaded.card.arguments["widths"])), loaded.card.arguments["depth"]
        raise DataError(f"{file} has another shape: it asks for --widths {widths} --depth {depth}.")
    unfold(network, found, images[:SAMPLE])
    return f"{loaded.card.name} {loaded.version}"
