"""Trains once without interruption, then again with random kills and resumes.

    python -m tests.support.kill_loop WHOLE_DIR KILLED_DIR FLAG...

Both runs are forks of this process, because the imports take longer than the training. A killed run dies at a random
moment after its next checkpoint. The timer counts CPU time, so that a busy machine makes no difference, and its signal
ends the process anywhere, as SIGKILL does.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from training import checkpoint, train

KILLS = 6


def kill_after_next_checkpoint(file: Path, delay_s: float) -> None:
    before = file.stat().st_mtime_ns if file.exists() else 0
    while not file.exists() or file.stat().st_mtime_ns == before:
        time.sleep(0.001)
    signal.setitimer(signal.ITIMER_PROF, delay_s)


def run(folder: str, flags: list[str], delay_s: float = 0) -> int:
    """Trains in a fork, resuming where there is a checkpoint; returns its exit code."""
    file = Path(folder, "checkpoint.pt")
    child = os.fork()
    if not child:
        if delay_s:
            threading.Thread(target=kill_after_next_checkpoint, args=(file, delay_s), daemon=True).start()
        resume = ["--resume"] if file.exists() else []
        train.main(["--out", f"{folder}/x.safetensors", "--run-dir", folder, *flags, *resume])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    whole, killed, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    assert run(whole, flags) == 0
    generator = np.random.default_rng(0)
    for _ in range(KILLS):
        code = run(killed, flags, generator.uniform(0.001, 0.08))
        assert code in (0, -signal.SIGPROF), code
        step = checkpoint.load(Path(killed, "checkpoint.pt"))["step"]
        sys.stdout.write(f"{'killed' if code else 'finished'} at step {step}\n")
    assert run(killed, flags) == 0


if __name__ == "__main__":
    main()
