"""The way of one inference request: key, body, tensor, pixels, queue, answer. It shares all it can with /predict."""

import asyncio
from collections.abc import Mapping, Sequence
from time import perf_counter_ns

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope

from app.api import predict, uploads
from app.errors import MalformedUpload, NotReady, RequestError, TooLarge
from app.inference.pipeline import Probabilities
from app.model.preprocessing import DecodedImage, Pixels
from app.oip import codec
from app.oip.codec import Inference
from app.oip.models import VERSION, Model
from app.state import State
from app.telemetry.metrics import Times

JSON_LENGTH = "Inference-Header-Content-Length"


async def answer(scope: Scope, receive: Receive, service: State, model: Model) -> Response:
    """The 200 of the protocol; raises a RequestError for everything else."""
    headers = dict(scope["headers"])
    service.keys.check(headers)
    statistics = service.statistics.requests[model.name]
    with statistics.counting(), service.lifecycle.accepting() as accepted:
        length = headers.get(b"content-length", b"0").decode("latin-1")
        body = await uploads.read_body(receive, length, service.settings.max_body_bytes)
        if not accepted:
            raise NotReady("The service is shutting down.", retry_after_s=1)
        service.batcher.check_room(1)
        parsed = perf_counter_ns()
        asked = await _parse(body, headers, service, model)
        pictures = await _pictures(asked.images, service)
        input_ns = perf_counter_ns() - parsed
        answered = await predict.classify(receive, pictures, service, _timeout_s(asked, service))
        begun = perf_counter_ns()
        response = _respond(asked, np.stack(answered.results), service, model)
        statistics.compute_input.add(input_ns)
        statistics.queue.add(int(answered.queue_s * 1e9))
        statistics.compute_infer.add(int(answered.run_s * 1e9))
        statistics.compute_output.add(perf_counter_ns() - begun)
    times = Times(parsed / 1e9, input_ns / 1e9, answered.queue_s, answered.run_s)
    scope["state"]["times"] = times
    service.metrics.observe_times(times)
    return response


async def _parse(body: bytes, headers: Mapping[bytes, bytes], service: State, model: Model) -> Inference:
    """On the event loop where it is a matter of microseconds, else in a thread."""
    coding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    json_length = headers.get(JSON_LENGTH.lower().encode())
    settings = service.settings

    def parse() -> Inference:
        content = uploads.inflate(body, coding, settings.max_body_bytes)
        return codec.parse(content, json_length, model.takes, model.gives, settings.max_files)

    if len(body) <= predict.INLINE_BYTES and not coding:
        return parse()
    return await asyncio.get_running_loop().run_in_executor(service.decoders, parse)


async def _pictures(images: Pixels | list[bytes], service: State) -> Sequence[DecodedImage]:
    """Every image's picture; a file that has none fails the request, since a tensor has no place for an error."""
    if not isinstance(images, list):
        return [DecodedImage(pixels, None, lossy=False) for pixels in images]
    limit = service.settings.max_file_bytes
    files = [uploads.upload(None, data, 0, len(data), limit) for data in images]
    outcomes = await predict.decode(files, service)
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, RequestError):
            kind = TooLarge if isinstance(outcome, TooLarge) else MalformedUpload
            raise kind(f"Image {index} of the input: {outcome}") from outcome
    return [outcome for outcome in outcomes if isinstance(outcome, DecodedImage)]


def _timeout_s(asked: Inference, service: State) -> float:
    limit_s = service.settings.request_timeout_s
    return min(limit_s, asked.timeout_us / 1e6) if asked.timeout_us else limit_s


def _respond(asked: Inference, probabilities: Probabilities, service: State, model: Model) -> Response:
    classes = service.classifier.classes
    head = {"model_name": model.name, "model_version": VERSION}
    if asked.id is not None:
        head["id"] = asked.id
    body, json_length = codec.encode(head, model.gives, probabilities, asked.form, classes)
    if json_length is None:
        return Response(body, media_type="application/json")
    return Response(body, media_type="application/octet-stream", headers={JSON_LENGTH: str(json_length)})
