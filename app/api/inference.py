"""Runs the pipeline for one HTTP request, while its caller stays connected."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from starlette.types import Receive, Scope

from app.api.auth import ApiKey
from app.api.disconnect import run_until_disconnect
from app.errors import NotReady, QueueFull, RequestError
from app.inference.classifier import Classifier
from app.inference.decoding import File
from app.inference.pipeline import Classification, Deadline, Prediction
from app.state import State
from app.telemetry.metrics import Timings

INLINE_PROBABILITIES = 5000  # 256 images of ten classes take 2 ms, of a thousand 200 ms

Result = TypeVar("Result")


class Caller(NamedTuple):
    """Whose share of the queue a request uses: that of its API key, else that of the client's address."""

    name: str
    key: ApiKey | None


def caller_of(scope: Scope, key: ApiKey | None) -> Caller:
    client = scope.get("client")
    return Caller(key.caller if key else client[0] if client else "", key)


async def classify(
    scope: Scope,
    receive: Receive,
    service: State,
    caller: Caller,
    classifier: Classifier,
    files: Sequence[File],
    deadline: Deadline,
    *,
    errors_per_file: bool = True,
) -> Classification:
    """Raises what `Pipeline.classify` raises, ClientDisconnected, RateLimited and TooLarge of the key.

    Records timings and predictions.
    """
    with _limited(scope, service, caller.key, len(files)):
        running = service.pipeline.classify(
            files, deadline, caller.name, classifier=classifier, errors_per_file=errors_per_file
        )
        classification = await run_until_disconnect(receive, running)
    outcomes, start, *seconds = classification
    timings = scope["state"]["timings"] = Timings(start, *seconds)
    loop = asyncio.get_running_loop()
    loop.call_soon(_observe, service, classifier, timings, outcomes)  # in its next turn, after the response
    return classification


def _observe(
    service: State, classifier: Classifier, timings: Timings, outcomes: Sequence[Prediction | RequestError]
) -> None:
    service.metrics.observe_timings(timings)
    predictions = [each for each in outcomes if isinstance(each, Prediction)]
    service.metrics.observe_predictions(classifier.classes, predictions)
    service.drift.observe(classifier.weights.version, predictions)


async def off_loop(render: Callable[[], Result], probabilities: int, service: State) -> Result:
    """What `render` returns, in a thread where it goes over so many probabilities that it takes milliseconds."""
    if probabilities <= INLINE_PROBABILITIES:
        return render()
    return await asyncio.get_running_loop().run_in_executor(service.render_executor, render)


@contextmanager
def _limited(scope: Scope, service: State, key: ApiKey | None, images: int) -> Iterator[None]:
    """Counts the images of a named key, against its limit if it has one. A refusal by the queue costs nothing."""
    limit, accepted = key.limit if key else None, False
    try:
        if limit:
            limit.take(images)
        accepted = True
        yield
    except (QueueFull, NotReady):
        if limit and accepted:
            limit.give_back(images)
        accepted = False
        raise
    finally:
        if limit:
            scope["state"]["rate_limit"] = limit.headers()
        if key and key.name:
            service.metrics.observe_key(key.name, images, accepted)
