"""The epochs of a run: their metrics, metrics.jsonl and TensorBoard events."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import SettingsError


class Epoch(NamedTuple):
    """Metrics of an epoch. Accuracies are shares; `seconds` is training time since step 0, over all resumed runs."""

    epoch: int
    seconds: float
    images_per_s: float
    loss: float
    train_accuracy: float
    val_accuracy: float
    val_loss: float = math.nan  # mean cross-entropy; missing in checkpoints of 0.1 and before


class MetricsLogger:
    """metrics.jsonl and optional TensorBoard events, rewritten from the history so that a resumed run has no gaps.

    Raises OSError for a full disk, SettingsError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, history: list[Epoch], tensorboard: bool) -> None:
        self._writer = _summary_writer(folder / "tensorboard") if tensorboard else None
        self._file = folder / "metrics.jsonl"
        self._file.write_text("")
        for epoch in history:
            self.log(epoch)

    def log(self, epoch: Epoch) -> None:
        with self._file.open("a") as lines:
            print(json.dumps(epoch._asdict()), file=lines)
        if self._writer:
            for name in ("loss", "train_accuracy", "val_accuracy", "val_loss", "images_per_s"):
                self._writer.add_scalar(name, getattr(epoch, name), epoch.epoch)
            self._writer.flush()


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SettingsError("--tensorboard needs an extra: pip install -e '.[tensorboard]'.") from None
    shutil.rmtree(folder, ignore_errors=True)  # event files only grow; a resumed run writes its history again
    return SummaryWriter(str(folder))
