"""Writes the bundled network as a torch.export program, in the form that is fastest in torch, for other servers.

Of a cascade that is the largest network. uint8 [N, 3, 32, 32] to float32 probabilities [N, classes]; bfloat16 with
folded normalisations, channels last.

    python -m benchmarks.peers.export_torch network.pt2
"""

import sys

import torch
from torch import Tensor, nn

from app.engines.pytorch import calibrated_softmax, load_network, pick_dtype
from app.model import weights
from app.settings import Settings
from training.features import load_backbone


class Classifier(nn.Module):
    """The network of a weights file with its calibrated softmax."""

    def __init__(self, file: weights.Weights) -> None:
        super().__init__()
        network = load_network(file).to(pick_dtype(torch.device("cpu")))
        self.network = network.to(memory_format=torch.channels_last)
        self.calibration = file.card.temperature, file.card.label_smoothing_correction

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images.to(memory_format=torch.channels_last))
        return calibrated_softmax(logits.float(), *self.calibration)


def main() -> None:
    file = load_backbone(Settings().weights)
    size = file.card.input_size
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    with torch.no_grad():
        program = torch.export.export(Classifier(file).eval(), (example,), dynamic_shapes=(batch,))
    torch.export.save(program, sys.argv[1])


if __name__ == "__main__":
    main()
