"""A CSV of path and label beside the pictures: delimiter, header and places of the files are found out."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from app.errors import DataError
from training.datasets.folders import part_folders
from training.datasets.listing import Item, Listing, make_listing, part_name, plural, shortened
from training.datasets.places import Places

PATH_COLUMNS = (
    "path", "filepath", "file_path", "image_path", "img_path", "imagepath", "file", "filename",
    "file_name", "image_file", "image", "image_name", "img", "img_name", "picture", "photo",
    "image_id", "img_id", "id", "name",
)  # fmt: skip
LABEL_COLUMNS = (
    "label", "labels", "class", "class_name", "classname", "category", "target", "class_id",
    "label_name", "species", "breed", "y", "dx", "diagnosis", "type",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "subset", "set", "partition", "part", "data_set", "dataset")

DELIMITERS = ",;\t|"
MAX_BYTES = 256 << 20  # of a table
SAMPLE = 20  # rows that decide which column has the files


class Table(NamedTuple):
    """Rows without the header, and the positions of the columns; `split` is None without such a column."""

    file: Path
    rows: list[list[str]]
    path: int
    label: int
    split: int | None


def tables_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix.lower() in (".csv", ".tsv") and not path.name.startswith(".")
    )


def read(path: Path, inside: bool = False) -> Listing | None:
    """The listing of a CSV file, or of the CSV files in a folder or in its train/ and test/; None for another form.

    With `inside`, files beyond the folder are not read: the table is from an archive. Raises DataError where the
    table names no file that exists.
    """
    folder = path if path.is_dir() else path.parent
    files = tables_in(path) if path.is_dir() else [path]
    notes: list[str] = []
    parts: dict[str, list[Item]] = defaultdict(list)
    for part, root, tables in _grouped(files, folder, inside):
        for table in tables:
            for own, items in _items(table, Places(root, inside), part, notes).items():
                parts[own] += items
    if not parts:
        return None
    return make_listing(folder.resolve().name, "table of paths and labels", dict(parts), notes=notes)


def complaint(path: Path, inside: bool) -> str | None:
    """A line on the first table that names existing files, but no label."""
    for file in tables_in(path) if path.is_dir() else [path]:
        rows = list(_rows(file))
        if rows and _path_column(rows, Places(file.parent, inside), file.stem) is not None:
            return (
                f"{file.name} has the columns {shortened(rows[0], 8)}; none of them is recognised as the label "
                f"(by the names {shortened(LABEL_COLUMNS, 4)})."
            )
    return None


def _grouped(files: list[Path], folder: Path, inside: bool) -> Iterator[tuple[str, Path, list[Table]]]:
    """(part of rows without a split column, folder of the pictures, tables)."""
    tables = [table for file in files if (table := _parse(file, Places(folder, inside)))]
    if len(tables) == 1:
        yield "train", folder, tables
    elif tables:
        for table in _of_parts(tables):
            yield part_name(table.file.stem) or "train", folder, [table]
    elif folder.is_dir() and not files:
        for part, root in part_folders(folder).items():
            yield part, root, [table for file in tables_in(root) if (table := _parse(file, Places(root, inside)))]


def _of_parts(tables: list[Table]) -> list[Table]:
    """The tables of parts; raises DataError where there are none."""
    named = [table for table in tables if part_name(table.file.stem)]
    if not named:
        names = shortened(table.file.name for table in tables)
        raise DataError(
            f"{tables[0].file.parent} has several tables with paths and labels ({names}); name one with --data, "
            "or name them train.csv, val.csv and test.csv."
        )
    return named


def _parse(file: Path, places: Places) -> Table | None:
    """None without a path and a label."""
    rows = list(_rows(file))
    path = _path_column(rows, places, file.stem) if rows else None
    if path is None:
        return None
    header = [""] * len(rows[0]) if places.find(rows[0][path], file.stem) else _header(rows[0])
    body = rows[1:] if any(header) else rows
    split = next((header.index(name) for name in SPLIT_COLUMNS if name in header), None)
    label = next((header.index(name) for name in LABEL_COLUMNS if name in header and header.index(name) != path), None)
    others = [i for i in range(len(header)) if i not in (path, split)]
    if label is None and len(others) == 1:
        label = others[0]
    if label is None and (hot := _hot_columns(body, others)):
        body = [[*row, rows[0][hot[i]]] for i, row in enumerate(body)]
        label = len(rows[0])
    return None if label is None else Table(file, body, path, label, split)


def _header(row: list[str]) -> list[str]:
    return [cell.strip().lower().replace(" ", "_") for cell in row]


def _path_column(rows: list[list[str]], places: Places, near: str) -> int | None:
    """The column of files that exist; by its name where none exists."""
    header, sample = _header(rows[0]), rows[: 1 + SAMPLE]
    named = [header.index(name) for name in PATH_COLUMNS if name in header]
    order = [*named, *(i for i in range(len(header)) if i not in named)]
    hits = {i: sum(places.find(row[i], near) is not None for row in sample if i < len(row)) for i in order}
    best = max(order, key=lambda i: hits[i])  # the first of equals: the order of the names
    return best if hits[best] else (named[0] if named and set(header) & set(LABEL_COLUMNS) else None)


def _hot_columns(rows: list[list[str]], columns: list[int]) -> list[int] | None:
    """For one-hot columns, that of the 1 in each row; None for other columns."""
    found = []
    for row in rows:
        cells = [row[i].strip() if i < len(row) else "" for i in columns]
        ones = [i for i, cell in zip(columns, cells, strict=True) if cell in ("1", "1.0")]
        if len(ones) != 1 or any(cell not in ("0", "0.0", "1", "1.0") for cell in cells):
            return None
        found += ones
    return found or None


def _rows(file: Path) -> Iterator[list[str]]:
    if file.stat().st_size > MAX_BYTES:
        raise DataError(f"{file.name} has more than {MAX_BYTES} bytes.")
    text = _decode(file.read_bytes())
    first = text[: text.find("\n")] if "\n" in text else text
    delimiter = max(DELIMITERS, key=first.count)
    try:
        yield from (row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row)
    except csv.Error as error:
        raise DataError(f"{file.name} cannot be read as CSV: {error}.") from error


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:  # Excel on Windows
        return data.decode("cp1252", errors="replace")


def _items(table: Table, places: Places, whole: str, notes: list[str]) -> dict[str, list[Item]]:
    """Items by part, `whole` for rows without a split; what cannot be read is noted."""
    parts: dict[str, list[Item]] = defaultdict(list)
    missing, unlabelled = list[str](), 0
    column = _split_column(table, notes)
    for row in table.rows:
        text, label = (row[i].strip() if i < len(row) else "" for i in (table.path, table.label))
        split = row[column] if column is not None and column < len(row) else ""
        found = places.find(text, table.file.stem)
        if not label:
            unlabelled += 1
        elif found is None:
            missing.append(text)
        else:
            parts[part_name(split) or whole].append(Item(text, found, _integer(label)))
    if missing and not parts:
        raise DataError(
            f"{table.file.name}: none of the {plural(len(missing), 'file')} that it names is found beside or below it, "
            f"such as {missing[0][:100]}."
        )
    if missing:
        notes.append(f"{table.file.name}: {plural(len(missing), 'file')} not found: {shortened(missing, 3)}")
    if unlabelled:
        notes.append(f"{table.file.name}: {plural(unlabelled, 'row')} without a label not read")
    return parts


def _split_column(table: Table, notes: list[str]) -> int | None:
    """None for a column of other things than parts; raises DataError where some of its values are parts."""
    values = {row[table.split].strip() for row in table.rows if table.split is not None and table.split < len(row)}
    unknown = sorted(value for value in values - {""} if part_name(value) is None)
    if not unknown:
        return table.split
    if len(unknown) < len(values - {""}):
        raise DataError(
            f"{table.file.name}: a row is of the part {unknown[0][:60]!r}, which is none of train, val and test."
        )
    notes.append(f"{table.file.name}: no value of the split column is train, val or test: {shortened(unknown, 3)}")
    return None


def _integer(label: str) -> str:
    """`3` for `3.0`, as pandas writes integers beside missing values."""
    return label[:-2] if label.endswith(".0") and label[:-2].isdigit() else label
