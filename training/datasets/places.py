"""The files that a table of paths means."""

from collections import defaultdict
from pathlib import Path, PurePosixPath

from training.datasets.folders import files_below
from training.datasets.pictures import is_meant_as_picture


class Places:
    """Finds the file that a table means: as it stands, without its suffix, or by its name in another folder."""

    def __init__(self, folder: Path, inside: bool) -> None:
        self.folder = folder.resolve()
        self._inside = inside
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, text: str, near: str = "") -> Path | None:
        """The only file that the text can mean; among several, the one in a folder called `near`."""
        text = text.strip().replace("\\", "/")
        if not text or "\0" in text:
            return None
        direct = self.folder / text
        try:
            if direct.is_file() and (not self._inside or direct.resolve().is_relative_to(self.folder)):
                return direct
        except OSError:  # a cell longer than any file name
            return None
        # Kaggle's tables have `17` for train/17.png.
        candidates = self._index().get(PurePosixPath(text).name, [])
        wanted = "/" + str(PurePosixPath(text))
        chosen = [
            path
            for path in candidates
            if any(each.as_posix().endswith(wanted) for each in (path, path.with_suffix("")))
        ] or candidates  # the table has paths of another machine
        if len(chosen) > 1:
            chosen = [path for path in chosen if near in path.relative_to(self.folder).parts[:-1]]
        return chosen[0] if len(chosen) == 1 else None

    def _index(self) -> dict[str, list[Path]]:
        """Pictures below the folder, by name and by name without suffix."""
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for path in files_below(self.folder):
                if is_meant_as_picture(path):
                    for name in {path.name, path.stem}:
                        self._by_name[name].append(path)
        return self._by_name
