"""The process metrics of several workers that store their values in one folder."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import mark_process_dead
from prometheus_client.registry import Collector


class Processes(Collector):
    """The library's process metrics, memory above all, summed over several processes."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = pids

    def collect(self) -> Iterator[Metric]:
        metrics = [
            metric for pid in self._pids for metric in ProcessCollector(pid=partial(str, pid), registry=None).collect()
        ]
        for name, first in {metric.name: metric for metric in reversed(metrics)}.items():
            values = [metric.samples[0].value for metric in metrics if metric.name == name]
            total = min(values) if name == "process_start_time_seconds" else sum(values)
            together = Metric(name, first.documentation, first.type)
            together.add_sample(first.samples[0].name, {}, total)
            yield together


def living(folder: Path) -> set[int]:
    """The running workers. Removes the gauges of those that have exited; their counters stay."""
    pids = {int(match[1]) for file in folder.glob("gauge_live*.db") if (match := re.search(r"_(\d+)\.db$", file.name))}
    for pid in [pid for pid in pids if not Path(f"/proc/{pid}").exists()]:
        with suppress(FileNotFoundError):  # another worker removes the same files
            mark_process_dead(pid, str(folder))
        pids.remove(pid)
    return pids
