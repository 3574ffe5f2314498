from pathlib import Path

import numpy as np
import pytest

from benchmarks import throughput
from benchmarks.images import noise


def test_every_batch_size_is_measured() -> None:
    seen = set()
    rates = throughput.measure(lambda images: seen.add((images.shape, images.dtype)), noise(size=16), seconds=0)
    assert seen == {((batch, 16, 16, 3), np.dtype(np.uint8)) for batch in throughput.BATCHES}
    assert all(rate > 0 for rate in rates.values())
    assert throughput.table({"noise": rates | {128: 1234}}).splitlines()[-1] == "| 128 | 1,234 |"


def test_every_image_has_its_turn() -> None:
    images, seen = np.arange(5, dtype=np.uint8), list[int]()
    throughput.measure(lambda part: seen.extend(part.tolist()), images, batches=[2], seconds=0.01)
    measured = seen[2 * throughput.WARM_UP_CALLS :]
    assert measured[:6] == [0, 1, 2, 3, 4, 0]


def test_table_of_a_weights_file_is_printed(tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    throughput.main(["--weights", str(tiny_weights), "--device", "cpu", "--seconds", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("openvino in ")
    assert lines[2] == "| batch | images/s, reference images | images/s, noise |"
    assert len(lines) == 4 + len(throughput.BATCHES)
