"""Detects that a file was replaced: by a rename, through a symbolic link of its path, or in place."""

import os
from pathlib import Path

Fingerprint = tuple[int, ...]


class FileWatch:
    """Compares the file with the one at construction, or `first`, and after a reported change with that one."""

    def __init__(self, path: Path, first: Fingerprint | None = None) -> None:
        self._path = path
        self._reported = self._seen = first or fingerprint(path)

    def changed(self) -> bool:
        """Whether another file is there. True once for each, after it was the same in two successive calls.

        So a file that is being copied into place is not reported before it is complete. A missing file is no change.
        """
        current = fingerprint(self._path)
        is_stable, self._seen = current == self._seen, current
        if not is_stable or current is None or current == self._reported:
            return False
        self._reported = current
        return True


def fingerprint(path: Path) -> Fingerprint | None:
    """Device, inode, size and times of the file that the path leads to; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
