import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress

import pytest

from app.telemetry.log_stream import LogStream
from app.telemetry.logs import AccessLog

WAIT_S = 30.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        with suppress(OSError):
            os.close(end)


def test_texts_are_written_in_order(pipe: tuple[int, int]) -> None:
    stream = LogStream(pipe[1])
    for i in range(1000):
        stream.write(f"{i}\n")
    stream.drain(WAIT_S)
    assert os.read(pipe[0], 65_536).split() == [b"%d" % i for i in range(1000)]


def test_stuck_reader_blocks_no_writer(pipe: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    stream = LogStream(pipe[1], limit=100)
    line = "x" * 999 + "\n"
    while not stream.dropped:  # the pipe holds 64 kB, the stream 100 lines
        stream.write(line)
    stream.drain(0.05)
    received = b""
    while len(received) < 100_000:
        received += os.read(pipe[0], 1_000_000)
    stream.drain(WAIT_S)
    assert caplog.messages == [f"{stream.dropped} log lines dropped: stderr could not be written to"]
    assert received.count(b"\n") >= 100


def test_non_blocking_descriptor_loses_nothing(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    stream = LogStream(pipe[1])
    stream.write("x" * 200_000)
    received = 0
    while received < 200_000:
        received += len(os.read(pipe[0], 65_536))
    stream.drain(WAIT_S)
    assert stream.dropped == 0


def test_failed_writes_are_counted_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = LogStream(writer)
    stream.write("lost\n")
    stream.drain(WAIT_S)
    assert stream.dropped == 1
    counts: list[int] = []
    stream.on_drop(counts.append)
    stream.write("lost, too\n")
    stream.drain(WAIT_S)
    assert counts == [1, 1]
    reader, replaced = os.pipe()
    os.dup2(replaced, writer)
    for text in ("one\n", "two\n"):
        stream.write(text)
        stream.drain(WAIT_S)
    assert os.read(reader, 100) == b"one\ntwo\n"
    assert caplog.messages == ["2 log lines dropped: stderr could not be written to"]
    for descriptor in (reader, replaced, writer):
        os.close(descriptor)


def test_access_log_line_as_text_and_json() -> None:
    text, structured = io.StringIO(), io.StringIO()
    AccessLog("text", text).add("POST", "/predict", 200, 0.0125, "id-1")
    AccessLog("json", structured).add("POST", "/predict", 200, 0.0125, "id-1")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT[\d:.]{12}Z INFO    POST /predict 200 in 12\.5 ms \[id-1\]\n", text.getvalue()
    )
    line = json.loads(structured.getvalue())
    assert (line["status"], line["ms"], line["request_id"], line["logger"]) == (200, 12.5, "id-1", "app.access")
