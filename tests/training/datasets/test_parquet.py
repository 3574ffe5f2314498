"""Hugging Face's parquet and arrow files."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import ipc
from pyarrow import parquet as pq

from app.errors import DataError
from tests.training.datasets.conftest import Writer
from training import data
from training.datasets import parquet


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def table(names: list[str] | None, column: str = "label") -> Any:
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(6)]
    content = pa.table({"image": images, column: [i % 2 for i in range(6)]})
    if names is None:
        return content
    features = {"image": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}
    return content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_parts_and_class_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in ("train", "validation", "test"):
        pq.write_table(table(["cat", "dog"]), tmp_path / "data" / f"{part}-00000-of-00001.parquet")
    dataset = data.load(tmp_path, 16)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (6, 6, 6)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.train.images[:, 0, 0, 0].tolist() == list(range(6))


def test_names_of_columns_and_folders_vary(tmp_path: Path) -> None:
    (tmp_path / "plain_text" / "test").mkdir(parents=True)
    pq.write_table(table(["cat", "dog"], "kind"), tmp_path / "plain_text" / "test" / "0000.parquet")
    found = parquet.read(tmp_path)
    assert list(found.parts) == ["test"]
    assert found.classes == ["cat", "dog"]


def test_pictures_are_named_by_their_row_in_the_file(tmp_path: Path) -> None:
    content = table(["cat", "dog"]).to_pydict()
    content["label"][1] = None
    for shard in (0, 1):
        pq.write_table(pa.table(content), tmp_path / f"train-0000{shard}-of-00002.parquet")
    names = [item.name for item in parquet.read(tmp_path).parts["train"]]
    assert names == [f"train-0000{shard}-of-00002.parquet[{row}]" for shard in (0, 1) for row in (0, 2, 3, 4, 5)]


def test_arrow_files_are_read(tmp_path: Path) -> None:
    content = table(None)
    with (
        pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as file,
        ipc.new_stream(file, content.schema) as out,
    ):
        out.write_table(content)
    assert parquet.read(tmp_path).classes == ["0", "1"]


def test_picture_beside_the_table_is_read(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, 4)
    images = [{"bytes": None, "path": f"/cache/{i}.png"} for i in range(4)]
    pq.write_table(pa.table({"image": images, "label": ["a", "b"] * 2}), tmp_path / "train.parquet")
    dataset = data.load(tmp_path / "train.parquet", 16, ["train"])
    assert (len(dataset.train), dataset.classes, dataset.rejected) == (4, ["a", "b"], [])


def test_other_columns_give_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"has the columns text, label; a picture .* and a label are expected"):
        parquet.read(tmp_path)
    pq.write_table(table(["cat"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="the label 1 is none of the 1 classes"):
        parquet.read(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as parquet"):
        parquet.read(tmp_path)
