"""Tables of path and label with the delimiters, headers, encodings and paths that occur."""

import csv
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import DataError
from tests.training.datasets.conftest import Writer
from training.datasets import tables


def labels(path: Path, part: str = "train", inside: bool = False) -> list[str]:
    found = tables.read(path, inside)
    assert found is not None
    return [item.label for item in found.parts[part]]


def rows(template: str, count: int = 4) -> str:
    return "".join(template.format(i=i, label="ab"[i % 2]) for i in range(count))


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("path,label\n" + rows("img/{i}.png,{label}\n"), "utf-8"),
        ("filename;class\n" + rows("img/{i}.png;{label}\n"), "utf-8-sig"),
        ("image\tlabel\n" + rows("img/{i}.png\t{label}\n"), "utf-16"),
        ("Foto,Tier\n" + rows("img/{i}.png,{label}\n"), "utf-8"),
        ("label,id\n" + rows("{label},{i}\n"), "utf-8"),
        (rows("img\\{i}.png,{label}\r\n"), "utf-8"),
        ("path,label\n" + rows('"img/{i}.png","{label}"\n'), "utf-8"),
        ("id,age,image_path,label\n" + rows("{i},30,/home/someone/img/{i}.png,{label}\n"), "utf-8"),
        ("image,a,b\n0.png,1.0,0.0\n1.png,0.0,1.0\n2.png,1.0,0.0\n3.png,0.0,1.0\n", "utf-8"),
    ],
)
def test_table_is_read(tmp_path: Path, write: Writer, content: str, encoding: str) -> None:
    write(tmp_path / "img", 4)
    (tmp_path / "data.csv").write_text(content, encoding, newline="")
    assert labels(tmp_path) == ["a", "b", "a", "b"]
    assert labels(tmp_path / "data.csv") == ["a", "b", "a", "b"]


def test_integer_labels_are_classes_in_numeric_order(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "img", 12)
    (tmp_path / "data.csv").write_text("path,label\n" + "".join(f"img/{i}.png,{i}.0\n" for i in range(12)))
    found = tables.read(tmp_path)
    assert found is not None
    assert found.classes == [str(i) for i in range(12)]


def test_unknown_part_is_refused(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "img", 4)
    table = tmp_path / "data.csv"
    lines = ["path,label,split", "img/0.png,a,Train", "img/1.png,b,train", "img/2.png,a,", "img/3.png,b,tset"]
    table.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"data\.csv: a row is of the part 'tset', which is none of train, val"):
        tables.read(tmp_path)
    table.write_text("\n".join(lines).replace("tset", "test").replace("a,Train", "b,test"))
    assert (labels(tmp_path), labels(tmp_path, part="test")) == (["b", "a"], ["b", "b"])


def test_split_column_without_parts_is_noted(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "img", 4)
    (tmp_path / "data.csv").write_text("path,label,set\n" + rows("img/{i}.png,{label},{label}1\n"))
    found = tables.read(tmp_path)
    assert found is not None
    assert {part: len(items) for part, items in found.parts.items()} == {"train": 4}
    assert found.notes == ["data.csv: no value of the split column is train, val or test: a1, b1"]


def test_windows_text_is_read(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "img", 2)
    (tmp_path / "x.csv").write_bytes("path,label\nimg/0.png,Hündin\nimg/1.png,Kater\n".encode("cp1252"))
    assert labels(tmp_path) == ["Hündin", "Kater"]


def test_parts_come_from_column_files_or_folders(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "column" / "img", 4)
    content = "path,label,split\n" + "".join(
        f"img/{i}.png,{'ab'[i % 2]},{'train' if i < 2 else 'Valid'}\n" for i in range(4)
    )
    (tmp_path / "column" / "x.csv").write_text(content)
    assert labels(tmp_path / "column", "val") == ["a", "b"]
    for part in ("train", "test"):
        write(tmp_path / "files" / part, 4)  # the same names in both folders
        (tmp_path / "files" / f"{part}.csv").write_text("id,label\n" + rows("{i},{label}\n"))
        write(tmp_path / "inside" / part, 4)
        (tmp_path / "inside" / part / "metadata.csv").write_text("file_name,label\n" + rows("{i}.png,{label}\n"))
    for name in ("files", "inside"):
        found = tables.read(tmp_path / name)
        assert found is not None
        assert {part: len(items) for part, items in found.parts.items()} == {"train": 4, "test": 4}
        assert all(part in str(item.source) for part, items in found.parts.items() for item in items)


def test_table_without_labels_is_ignored(tmp_path: Path, write: Writer) -> None:
    for part in ("train", "test"):
        write(tmp_path / part, 4)
    (tmp_path / "train.csv").write_text("id,label\n" + rows("{i},{label}\n"))
    (tmp_path / "test.csv").write_text("id\n0\n1\n")
    found = tables.read(tmp_path)
    assert found is not None
    assert {part: len(items) for part, items in found.parts.items()} == {"train": 4}


def test_missing_files_and_labels_are_noted(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "img", 2)
    (tmp_path / "x.csv").write_text("path,label\nimg/0.png,a\nimg/1.png,b\nimg/7.png,a\nimg/0.png,\n")
    found = tables.read(tmp_path)
    assert found is not None
    assert found.notes == ["x.csv: 1 file not found: img/7.png", "x.csv: 1 row without a label not read"]
    (tmp_path / "x.csv").write_text("path,label\nimg/7.png,a\nimg/8.png,b\n")
    with pytest.raises(DataError, match=r"none of the 2 files that it names is found .* such as img/7\.png"):
        tables.read(tmp_path)


def test_unclear_tables_give_one_line(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "img", 4)
    (tmp_path / "x.csv").write_text("file,age,sex\n" + rows("img/{i}.png,{i},m\n"))
    assert tables.read(tmp_path) is None
    assert (tables.complaint(tmp_path, False) or "").startswith("x.csv has the columns file, age, sex; none of them is")
    for name in ("x", "y"):
        (tmp_path / f"{name}.csv").write_text("path,label\n" + rows("img/{i}.png,{label}\n"))
    with pytest.raises(DataError, match=r"several tables .*\(x\.csv, y\.csv\); name one with --data"):
        tables.read(tmp_path)


def test_table_of_an_archive_reads_nothing_beyond_it(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "other", 2)
    (tmp_path / "set").mkdir()
    secret = tmp_path / "other" / "0.png"
    (tmp_path / "set" / "x.csv").write_text(f"path,label\n{secret},a\n../other/1.png,b\n")
    assert labels(tmp_path / "set") == ["a", "b"]
    with pytest.raises(DataError, match="none of the 2 files"):
        tables.read(tmp_path / "set", inside=True)


@settings(max_examples=60, deadline=None)
@given(content=st.lists(st.lists(st.text(max_size=8), max_size=4), max_size=6), delimiter=st.sampled_from(",;\t|"))
def test_any_table_is_read_or_gives_a_data_error(
    content: list[list[str]], delimiter: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("table")
    with (folder / "x.csv").open("w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file, delimiter=delimiter).writerows(content)
    with suppress(DataError):
        assert tables.read(folder) is None
