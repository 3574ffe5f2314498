"""One inference request of the protocol: read the body, parse the tensors, run the pipeline, encode the output."""

from collections.abc import Mapping, Sequence
from functools import partial
from time import perf_counter_ns
from typing import Any

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope

from app.api import bodies, uploads
from app.api.bodies import Body
from app.api.disconnect import run_until_disconnect
from app.api.inference import caller_of, classify, off_loop
from app.errors import MalformedUpload, TooLarge
from app.inference.classifier import Classifier
from app.inference.decoding import File
from app.inference.pipeline import Classification, Deadline, Prediction, RejectedFile
from app.model.preprocessing import DecodedImage, Pixels
from app.oip import codec
from app.oip.codec import ParsedRequest
from app.oip.models import OOD_SCORE, VERSION, Model, find
from app.oip.outputs import Values
from app.state import State

JSON_LENGTH = "Inference-Header-Content-Length"
INLINE_BYTES = 65_536  # up to this size a body is parsed on the event loop


async def infer(scope: Scope, receive: Receive, service: State, name: str) -> Response:
    """The 200 of the protocol; raises a RequestError for everything else."""
    headers = dict(scope["headers"])
    caller = caller_of(scope, service.keys.check(headers))
    statistics = service.statistics.requests[name]
    with statistics.counting(), service.lifecycle.admit():
        service.pipeline.check_capacity(1, caller.name)
        body = await bodies.read_body(receive, headers, service.settings.max_body_bytes)
        start, deadline = perf_counter_ns(), Deadline.after(service.settings.request_timeout_s)
        classifier = service.classifier  # may be another one than before the body came
        model = find(classifier, name)
        request = await _parse(receive, body, headers, service, model, deadline)
        if request.timeout_us:
            deadline = min(deadline, Deadline.after(request.timeout_us / 1e6), key=lambda each: each.at)
        files = _files(request.images, service.settings.max_file_bytes)
        parse_ns = perf_counter_ns() - start
        try:
            classification = await classify(
                scope, receive, service, caller, classifier, files, deadline, errors_per_file=False
            )
        except RejectedFile as rejected:
            kind = TooLarge if isinstance(rejected.error, TooLarge) else MalformedUpload
            raise kind(f"Image {rejected.index} of the input: {rejected.error}") from rejected
        start = perf_counter_ns()
        respond = partial(_respond, request, classification, classifier, model)
        response = await off_loop(respond, len(files) * len(classifier.classes), service)
        statistics.compute_input.add(parse_ns + int(classification.decode_s * 1e9))
        statistics.queue.add(int(classification.queue_s * 1e9))
        statistics.compute_infer.add(int(classification.inference_s * 1e9))
        statistics.compute_output.add(perf_counter_ns() - start)
    return response


async def _parse(
    receive: Receive, body: Body, headers: Mapping[bytes, bytes], service: State, model: Model, deadline: Deadline
) -> ParsedRequest:
    """On the event loop if the body is small, else in a thread."""
    coding = bodies.content_coding(headers)
    json_length = headers.get(JSON_LENGTH.lower().encode())
    settings = service.settings

    def parse() -> ParsedRequest:
        content = bodies.decompress(body, coding, settings.max_body_bytes)
        return codec.parse(content, json_length, model.input, model.outputs, settings.max_files)

    if len(body) <= INLINE_BYTES and not coding:
        return parse()
    return await run_until_disconnect(receive, service.parse_thread.run(parse, deadline))


def _files(images: Pixels | list[bytes], max_file_bytes: int) -> list[File]:
    if isinstance(images, list):
        return [uploads.checked(data, len(data), max_file_bytes) for data in images]
    return [DecodedImage(pixels, None) for pixels in images]


def _respond(request: ParsedRequest, classification: Classification, classifier: Classifier, model: Model) -> Response:
    head: dict[str, Any] = {
        "model_name": model.name,
        "model_version": VERSION,
        "parameters": {"weights_version": classifier.weights.version},
    }
    if request.id is not None:
        head["id"] = request.id
    predictions = [each for each in classification.outcomes if isinstance(each, Prediction)]
    tensors = [(output, _values(output.spec.name, predictions)) for output in request.outputs]
    body, json_length = codec.encode(head, tensors, classifier.classes)
    if json_length is None:
        return Response(body, media_type="application/json")
    return Response(body, media_type="application/octet-stream", headers={JSON_LENGTH: str(json_length)})


def _values(output: str, predictions: Sequence[Prediction]) -> Values:
    """Float32 [N] or [N, classes]."""
    if output == OOD_SCORE:
        return np.array([each.ood for each in predictions], np.float32)
    return np.stack([each.probabilities for each in predictions])
