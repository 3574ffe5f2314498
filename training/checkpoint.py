"""The checkpoint file of a run: written atomically, read without executing pickles."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from app.errors import DataError

State = dict[str, Any]


def state_dict(network: nn.Module, optimizers: Sequence[Optimizer]) -> State:
    """Parameters, buffers and momenta: with the step number, all that a resumed run needs to be bit-identical."""
    return {"network": network.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}


def load_state_dict(network: nn.Module, optimizers: Sequence[Optimizer], state: State) -> None:
    """The inverse of `state_dict`."""
    network.load_state_dict(state["network"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)


def save(path: Path, state: State) -> None:
    """Replaces the file by a rename, so that a kill, a full disk or a power cut leaves the last one; raises OSError."""
    # In the same folder, since a rename is atomic within a file system only.
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            # Without it, a file system may write the new name to disk before the content.
            os.fsync(stream.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(f"The checkpoint {path} cannot be written: {str(error).splitlines()[0]}") from error


def load(path: Path) -> State:
    """Raises DataError where the file is missing or broken."""
    try:
        # weights_only refuses pickled objects other than tensors; a GPU's checkpoint also resumes on a CPU.
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"There is no checkpoint at {path} to resume from.") from None
    except Exception as error:  # the unpickler of a broken file raises almost any type
        raise DataError(f"The checkpoint {path} is broken; start again without --resume.") from error
    return state


def check_fingerprint(
    state: State, current: Mapping[str, Any], rule: str = "--resume continues on the same data only; its"
) -> None:
    """Raises DataError, which names the difference after `rule`, where the checkpoint is of other data than `current`.

    Checkpoints of 0.1 and before have no fingerprint.
    """
    for name, was in state.get("fingerprint", {}).items():
        if (found := current.get(name)) != was:
            values = f": {_short(was)}, now {_short(found)}" if name != "content" else ""
            raise DataError(f"{rule} {name} differs{values}.")


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else text[:99] + "…"
