"""Ends the work for a request when its caller leaves."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from starlette.types import Receive

from app.errors import ClientDisconnected

Result = TypeVar("Result")


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
