"""Where a run stands, in one file that is always whole."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from app.errors import DataError

State = dict[str, Any]


def of(network: nn.Module, optimizers: Sequence[Optimizer]) -> State:
    """What a network in training is besides its recipe."""
    return {"network": network.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}


def into(network: nn.Module, optimizers: Sequence[Optimizer], state: State) -> None:
    """Undoes `of`."""
    network.load_state_dict(state["network"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)


def save(path: Path, state: State) -> None:
    """Replaces the file in one move, so that a kill, a full disk or a power cut leaves the last one; raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())  # a file system may move the name before it has written the content
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(f"The checkpoint {path} cannot be written: {str(error).splitlines()[0]}") from error


def load(path: Path) -> State:
    """Raises DataError where there is none or it is broken."""
    try:
        state: State = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise DataError(f"There is no checkpoint at {path} to resume from.") from None
    except Exception as error:  # the unpickler raises whatever a broken file makes it trip over
        raise DataError(f"The checkpoint {path} is broken; start again without --resume.") from error
    return state
