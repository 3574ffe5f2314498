from pathlib import Path

import numpy as np

from benchmarks import throughput


def test_every_batch_size_is_measured() -> None:
    asked = set()
    rates = throughput.measure(lambda images: asked.add((images.shape, images.dtype)), size=16, seconds=0)
    assert asked == {((batch, 16, 16, 3), np.dtype(np.uint8)) for batch in throughput.BATCHES}
    assert all(rate > 0 for rate in rates.values())
    assert throughput.table({"1": 1234}).splitlines()[-1] == "| 1 | 1,234 |"


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n")
    assert throughput.processor(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert throughput.processor(tmp_path / "none")
