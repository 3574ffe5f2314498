"""`python -m app classify PATH...`: the predictions of `/predict` without a server."""

import argparse
import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

from app import settings
from app.commands import image_files
from app.commands.classify_output import FORMATS, Outcome, Output
from app.commands.image_files import Source
from app.errors import RequestError, ThirtytwoError, UndecodableImage
from app.inference.pipeline import Deadline, Pipeline
from app.lifespan import build_pipeline
from app.settings import Settings
from app.sources import FileSource, load_engine

TIMEOUT_S = 3600.0  # of one chunk; a local user waits
CLOSE_S = 10.0  # for batches in progress
CONCURRENT_CHUNKS = 4  # one is read, one decoded, and two wait for the batcher's threads
UNLIMITED = 10**18  # pixels; what a request may have at most is no matter here


class InferenceFailed(UndecodableImage):
    type, title = "inference-failed", "The image cannot be classified"


def run(argv: list[str]) -> int:
    """Writes the predictions; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        config = settings.load()
        one_caller = {"workers": 1, "max_request_pixels": UNLIMITED, "max_queue_share": 1.0}
        config = config.model_copy(update={"weights": arguments.weights or config.weights, **one_caller})
        source = FileSource(config, load_engine)
        classifier = source.build(source.read())
    except ThirtytwoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pipeline = build_pipeline(config, classifier)
    top_k = min(arguments.top_k, len(classifier.classes))
    pipeline.start()
    try:
        output = FORMATS[arguments.format](sys.stdout, classifier.classes, top_k)
        return asyncio.run(_run(arguments.paths, config, pipeline, output))
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    finally:
        pipeline.close(CLOSE_S)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m app classify",
        description="Classifies image files. The settings of model, files and queue apply, as environment variables.",
        epilog="Exit status: 0 if all files are classified, 1 if one is not, 2 if the model cannot be loaded or "
        "the output cannot be written.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="image file; folder, with all images below it; - for standard input"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights file [THIRTYTWO_WEIGHTS]")
    parser.add_argument("--top-k", type=_positive, default=3, metavar="N", help="classes per file [3]")
    formats = parser.add_mutually_exclusive_group()
    for name, text in (("json", "one JSON object per line, errors included"), ("csv", "CSV, errors included")):
        formats.add_argument(f"--{name}", dest="format", action="store_const", const=name, default="text", help=text)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


async def _run(paths: Sequence[str], config: Settings, pipeline: Pipeline, output: Output) -> int:
    failed = 0
    async with aclosing(_outcomes(paths, config, pipeline)) as outcomes:
        async for source, outcome in outcomes:
            output.write(source.name, outcome)
            failed += isinstance(outcome, RequestError)
    output.stream.flush()
    return 1 if failed else 0


async def _outcomes(
    paths: Sequence[str], config: Settings, pipeline: Pipeline
) -> AsyncGenerator[tuple[Source, Outcome], None]:
    """In order; while one chunk of files is read, others are decoded and run."""
    batcher = pipeline.batcher
    concurrent = min(CONCURRENT_CHUNKS, batcher.queue.limit)
    max_files = max(1, min(batcher.max_batch, batcher.queue.limit // concurrent))
    pending: deque[tuple[list[Source], asyncio.Task[list[Outcome]]]] = deque()
    for chunk in image_files.chunks(image_files.find(paths), max_files, config.max_file_bytes):
        pending.append((chunk, asyncio.create_task(classify_chunk(chunk, pipeline))))
        await asyncio.sleep(0)
        if len(pending) == concurrent:
            sources, task = pending.popleft()
            for pair in zip(sources, await task, strict=True):
                yield pair
    for sources, task in pending:
        for pair in zip(sources, await task, strict=True):
            yield pair


async def classify_chunk(sources: Sequence[Source], pipeline: Pipeline) -> list[Outcome]:
    """The outcomes of the files, in order; never raises an Exception."""
    files = [source.file for source in sources]
    try:
        return (await pipeline.classify(files, Deadline.after(TIMEOUT_S))).outcomes
    except Exception as error:  # of one image; those beside it are classified alone
        if len(sources) == 1:
            return [error if isinstance(error, RequestError) else InferenceFailed(str(error))]
        return [outcome for source in sources for outcome in await classify_chunk([source], pipeline)]
