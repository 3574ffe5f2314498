"""The way of one `POST /predict`: key, upload, pixels, queue, answer."""

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Any
from urllib.parse import parse_qsl

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope

from app.api import uploads
from app.api.problems import TYPE
from app.api.uploads import Upload
from app.errors import InvalidParameter, NotReady, RequestError
from app.inference import pipeline
from app.inference.batcher import Answer
from app.inference.pipeline import Probabilities
from app.model.preprocessing import DecodedImage, EncodedImage, Limits
from app.state import State
from app.telemetry.metrics import Times

INLINE_BYTES = 65_536  # uploads up to this size are decoded on the event loop where their pictures are small

Outcome = DecodedImage | RequestError


async def answer(scope: Scope, receive: Receive, service: State) -> Response:
    """The 200 of the contract; raises a RequestError for everything else."""
    headers = dict(scope["headers"])
    service.keys.check(headers)
    top_k = _top_k(scope["query_string"], len(service.classifier.classes))
    with service.lifecycle.accepting() as accepted:
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        content_length = headers.get(b"content-length", b"0").decode("latin-1")
        body = await uploads.read(receive, content_type, content_length, service.settings)
        if not accepted:  # said only now, since closing a connection with unread bytes would lose the answer
            raise NotReady("The service is shutting down.", retry_after_s=1)
        service.batcher.check_room(1)  # of a refusal's cost, taking the form apart would be a third
        files = uploads.files(body, service.settings)
        begun = perf_counter()
        outcomes = await decode(files, service)
        errors = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
        if len(errors) == len(outcomes):
            raise errors[0]
        decode_s = perf_counter() - begun
        pictures = [outcome for outcome in outcomes if isinstance(outcome, DecodedImage)]
        answered = await classify(receive, pictures, service, service.settings.request_timeout_s)
    times = Times(begun, decode_s, answered.queue_s, answered.run_s)
    scope["state"]["times"] = times
    service.metrics.observe_times(times)
    content = _shape(files, outcomes, answered.results, top_k, service)
    return Response(
        to_json(content),
        media_type="application/json",
        headers={
            "Server-Timing": f"decode;dur={times.decode_s * 1e3:.2f}, queue;dur={times.queue_s * 1e3:.2f}, "
            f"model;dur={times.model_s * 1e3:.2f}"
        },
    )


def _top_k(query: bytes, classes: int) -> int:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True) if query else []
    values = [value for name, value in pairs if name == "top_k"]
    text = values[-1] if values else str(min(3, classes))
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and 1 <= int(text) <= classes):
        raise InvalidParameter(f"top_k is {text[:20]!r}; it must be a whole number from 1 to {classes}.")
    return int(text)


async def decode(files: list[Upload], service: State) -> list[Outcome]:
    """Each file's picture or what is wrong with it; raises QueueFull or NotReady before any work on them."""
    service.batcher.check_room(len(files))
    settings = service.settings
    limits = Limits(service.classifier.input_size, settings.max_pixels, settings.strict_size)
    outcomes = _decode_small(files, limits)
    if outcomes is None:
        loop = asyncio.get_running_loop()
        outcomes = await loop.run_in_executor(service.decoders, _decode_all, files, limits)
    return outcomes


def _decode_small(files: list[Upload], limits: Limits) -> list[Outcome] | None:
    """The outcomes where all files together are a matter of microseconds, else None."""
    if sum(len(file.data) for file in files) > INLINE_BYTES:
        return None
    sources: list[EncodedImage | RequestError] = [_open(file, limits) for file in files]
    if not all(isinstance(source, RequestError) or source.is_cheap for source in sources):
        return None
    return [_finish(source) for source in sources]


def _decode_all(files: list[Upload], limits: Limits) -> list[Outcome]:
    return [_finish(_open(file, limits)) for file in files]


def _open(file: Upload, limits: Limits) -> EncodedImage | RequestError:
    if file.error is not None:
        return file.error
    try:
        return EncodedImage(file.data, limits)
    except RequestError as error:
        return error


def _finish(source: EncodedImage | RequestError) -> Outcome:
    if isinstance(source, RequestError):
        return source
    try:
        return source.decode()
    except RequestError as error:
        return error


async def classify(
    receive: Receive, pictures: Sequence[DecodedImage], service: State, timeout_s: float
) -> Answer[Probabilities]:
    """Probabilities of each picture; the wait ends when the caller goes away."""
    waiting = asyncio.current_task()
    assert waiting is not None
    pixels = [picture.pixels for picture in pictures]
    lossy = [place for place, picture in enumerate(pictures) if picture.lossy]
    gone = asyncio.create_task(_disconnected(receive))
    gone.add_done_callback(lambda task: task.cancelled() or waiting.cancel())
    try:
        answered = await pipeline.take(service.batcher, pixels, lossy, service.settings.second_look, timeout_s)
    finally:
        gone.cancel()
    service.metrics.observe_predictions(answered.results)
    return answered


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _shape(
    files: list[Upload], outcomes: list[Outcome], results: list[Probabilities], top_k: int, service: State
) -> dict[str, Any]:
    rows = iter(results)
    predictions = [
        {"filename": file.filename, "error": _file_error(outcome, service)}
        if isinstance(outcome, RequestError)
        else _prediction(file.filename, outcome, next(rows).tolist(), top_k, service)
        for file, outcome in zip(files, outcomes, strict=True)
    ]
    weights = service.classifier.weights
    return {"model": {"name": weights.card.name, "version": weights.version}, "predictions": predictions}


def _prediction(
    filename: str | None, picture: DecodedImage, probabilities: list[float], top_k: int, service: State
) -> dict[str, Any]:
    top = service.classifier.top(probabilities, top_k)
    return {
        "filename": filename,
        "label": top[0]["label"],
        "confidence": top[0]["probability"],
        "top": top,
        "resized_from": picture.resized_from,
    }


def _file_error(error: RequestError, service: State) -> dict[str, str]:
    service.metrics.refusals.labels(error.type).inc()
    return {"type": TYPE + error.type, "title": error.title, "detail": str(error)}
