"""Runs the pipeline for one HTTP request, while its caller stays connected."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

from starlette.types import Receive, Scope

from app.errors import ClientDisconnected
from app.inference.classifier import Classifier
from app.inference.decoding import File
from app.inference.pipeline import Classification, Deadline, Prediction
from app.state import State
from app.telemetry.metrics import Timings

INLINE_PROBABILITIES = 5000  # 256 images of ten classes take 2 ms, of a thousand 200 ms

Result = TypeVar("Result")


async def classify(
    scope: Scope,
    receive: Receive,
    service: State,
    classifier: Classifier,
    files: Sequence[File],
    deadline: Deadline,
    *,
    errors_per_file: bool = True,
) -> Classification:
    """Raises what `Pipeline.classify` raises, and ClientDisconnected. Records timings and predictions."""
    running = service.pipeline.classify(
        files, deadline, caller(scope), classifier=classifier, errors_per_file=errors_per_file
    )
    classification = await run_until_disconnect(receive, running)
    outcomes, start, *seconds = classification
    timings = scope["state"]["timings"] = Timings(start, *seconds)
    service.metrics.observe_timings(timings)
    service.metrics.observe_predictions(classifier.classes, [each for each in outcomes if isinstance(each, Prediction)])
    return classification


async def off_loop(render: Callable[[], Result], probabilities: int, service: State) -> Result:
    """What `render` returns, in a thread where it goes over so many probabilities that it takes milliseconds."""
    if probabilities <= INLINE_PROBABILITIES:
        return render()
    return await asyncio.get_running_loop().run_in_executor(service.executor, render)


def caller(scope: Scope) -> str:
    """Whose share of the queue the request uses: the client's address."""
    client = scope.get("client")
    return client[0] if client else ""


async def run_until_disconnect(receive: Receive, work: Coroutine[object, object, Result]) -> Result:
    """The result of `work`, which is cancelled when the caller leaves; then raises ClientDisconnected."""
    task = asyncio.current_task()
    assert task is not None
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    watcher.add_done_callback(lambda watcher: watcher.cancelled() or task.cancel())
    try:
        return await work
    except asyncio.CancelledError:
        if watcher.done():
            task.uncancel()
            raise ClientDisconnected("The caller left before the response.") from None
        raise
    finally:
        watcher.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
