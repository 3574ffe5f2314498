"""Where responses are rendered."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import cast

import pytest

from app.api.inference import INLINE_PROBABILITIES, off_loop
from app.state import State


@pytest.mark.parametrize(("probabilities", "inline"), [(INLINE_PROBABILITIES, True), (INLINE_PROBABILITIES + 1, False)])
def test_many_probabilities_are_rendered_in_a_thread(probabilities: int, inline: bool) -> None:
    with ThreadPoolExecutor(1) as executor:
        service = cast(State, SimpleNamespace(render_executor=executor))
        thread = asyncio.run(off_loop(threading.current_thread, probabilities, service))
    assert (thread is threading.current_thread()) is inline
