"""Parquet and arrow files with image bytes, as Hugging Face's `datasets` stores them."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import DataError
from training.datasets.folders import files_below
from training.datasets.listing import Item, Listing, make_listing, part_name, shortened

SUFFIXES = (".parquet", ".arrow")
MAX_BYTES = 16 << 30  # of encoded pictures, in memory
MAX_DEPTH = 2

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "picture"), ("label", "labels", "fine_label", "class", "target")

NO_PYARROW = "Parquet files need pyarrow; it is in the extra 'train': pip install '.[train]'."


class Columns(NamedTuple):
    """Names of the columns, and the class names of an integer label where the file has them."""

    image: str
    label: str
    names: list[str] | None


def files_in(folder: Path) -> list[Path]:
    """Those of the folder and up to MAX_DEPTH folders below it: `data/`, `<config>/train/`."""
    depth = len(folder.parts) + 1 + MAX_DEPTH
    return [path for path in files_below(folder) if path.suffix.lower() in SUFFIXES and len(path.parts) <= depth]


def read(path: Path) -> Listing:
    """A file, or all files below a folder. Raises DataError for columns other than a picture and a label."""
    files = [path] if path.is_file() else files_in(path)
    parts: dict[str, list[Item]] = defaultdict(list)
    names: list[str] | None = None
    total = 0
    for file in files:
        part, row = _part(file, path), 0
        for columns, table in _batches(file):
            names = columns.names or names
            items = list(_items(table, columns, file, row))
            row += table.num_rows
            total += sum(len(item.source) for item in items if isinstance(item.source, bytes))
            if total > MAX_BYTES:
                raise DataError(f"{path} has more than {MAX_BYTES} bytes of pictures.")
            parts[part] += items
    root = path if path.is_dir() else path.parent
    return make_listing(
        (path if path.is_dir() else path.with_suffix("")).resolve().name or root.name, "parquet", dict(parts), names
    )


def _part(file: Path, root: Path) -> str:
    """By the file's name, `train-00000-of-00001.parquet`, or by its folder; train otherwise."""
    words = [file.stem.split("-")[0].split("_")[0], file.stem]
    folders = file.relative_to(root).parts[:-1] if root.is_dir() else ()
    return next((part for word in [*words, *reversed(folders)] if (part := part_name(word))), "train")


def _batches(file: Path) -> Iterator[tuple[Columns, Any]]:
    """Columns and record batches; a file is never in memory as a whole beside its pictures."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise DataError(NO_PYARROW) from error
    try:
        if file.suffix.lower() == ".arrow":
            with pyarrow.memory_map(str(file)) as stream, ipc.open_stream(stream) as reader:
                columns = _columns(reader.schema, file)
                for batch in reader:
                    yield columns, batch.select([columns.image, columns.label])
        else:
            with parquet.ParquetFile(file) as content:
                columns = _columns(content.schema_arrow, file)
                for batch in content.iter_batches(256, columns=[columns.image, columns.label]):
                    yield columns, batch
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file.name} cannot be read as {file.suffix[1:]}: {' '.join(str(error).split())[:200].rstrip('.')}."
        ) from error


def _columns(schema: Any, file: Path) -> Columns:
    features = _features(schema)
    images = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    images += [name for name in schema.names if _holds_bytes(schema.field(name).type) and name not in images]
    labels = [name for name in LABEL_COLUMNS if name in schema.names]
    labels += [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    image = next((name for name in IMAGE_COLUMNS if name in images), images[0] if images else None)
    if image is None or not labels:
        wanted = "a picture (image: struct of bytes and path) and a label"
        raise DataError(f"{file.name} has the columns {shortened(schema.names, 10)}; {wanted} are expected.")
    return Columns(image, labels[0], features.get(labels[0], {}).get("names"))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Hugging Face's types of the columns, from the metadata."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    usable = found if isinstance(found, dict) else {}
    return {name: feature for name, feature in usable.items() if isinstance(feature, dict)}


def _holds_bytes(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _items(batch: Any, columns: Columns, file: Path, start: int) -> Iterator[Item]:
    """The labelled pictures of a batch, named by their row in the file, of which `start` is the first."""
    rows = zip(batch.column(columns.image).to_pylist(), batch.column(columns.label).to_pylist(), strict=True)
    for i, (image, label) in enumerate(rows, start):
        path = image.get("path") if isinstance(image, dict) else None
        data = image.get("bytes") if isinstance(image, dict) else image
        if data is None and path:  # the pictures are files beside the table
            data = file.parent / Path(path).name
        if label is not None:
            yield Item(f"{file.name}[{i}]", b"" if data is None else data, _label(label, columns, file))


def _label(label: Any, columns: Columns, file: Path) -> str:
    if columns.names is None or isinstance(label, str):
        return str(label)
    if isinstance(label, int) and 0 <= label < len(columns.names):
        return columns.names[label]
    raise DataError(f"{file.name}: the label {label!r} is none of the {len(columns.names)} classes; one is expected.")
