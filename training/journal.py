"""What a run leaves for others to read while it goes on: metrics.jsonl, and TensorBoard's events where wanted."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.errors import SettingsError
from training.trainer import Epoch


class Journal:
    """Begins with the history so far: neither a kill nor an older run leaves a line too few or too many.

    Raises OSError on a full disk, SettingsError where TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, history: Sequence[Epoch], tensorboard: bool) -> None:
        self._board = _board(folder / "tensorboard") if tensorboard else None
        self._file = folder / "metrics.jsonl"
        self._file.write_text("")
        for epoch in history:
            self.add(epoch)

    def add(self, epoch: Epoch) -> None:
        with self._file.open("a") as lines:
            print(json.dumps(epoch._asdict()), file=lines)
        if self._board:
            for name in ("loss", "train_accuracy", "holdout_accuracy", "images_per_s"):
                self._board.add_scalar(name, getattr(epoch, name), epoch.epoch)
            self._board.flush()


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SettingsError("--tensorboard needs an extra: pip install -e '.[tensorboard]'.") from None
    shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder))
