"""Rate limits by API key, and the share of the queue that one caller may hold."""

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from app.api.rate_limit import RateLimit
from app.errors import RateLimited, TooLarge
from app.lifespan import queue_shares
from app.settings import Settings
from tests.conftest import serving
from tests.support import fault_injection
from tests.support.images import WHITE

Start = Callable[..., httpx.Client]

STATE = re.compile(r'"key";r=(\d+);t=(\d+)')


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    rate=st.floats(0.1, 1000),
    burst=st.integers(1, 50),
    events=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 60)), max_size=60),
)
def test_no_more_than_burst_and_rate_are_admitted(rate: float, burst: int, events: list[tuple[float, int]]) -> None:
    """Whatever the pauses and sizes; and what is refused is admitted after the announced seconds."""
    clock = Clock()
    limit, admitted = RateLimit(rate, burst, clock), 0
    for pause, images in events:
        clock.now += pause
        left = int(STATE.fullmatch(limit.headers()[1][1].decode())[1])
        try:
            limit.take(images)
            admitted += images
        except TooLarge:
            assert images > burst
        except RateLimited as refused:
            assert images > left
            clock.now += refused.retry_after_s
            limit.take(images)
            admitted += images
        else:
            assert images <= left + 1
        assert admitted <= burst + rate * clock.now + 1e-6


def test_headers_name_burst_window_and_what_is_left() -> None:
    clock = Clock()
    limit = RateLimit(4, 10, clock)
    limit.take(7)
    clock.now = 0.5
    assert limit.headers() == [
        (b"ratelimit-policy", b'"key";q=10;qu="images";w=3'),
        (b"ratelimit", b'"key";r=5;t=2'),
    ]


@pytest.fixture
def keyed(tmp_path: Path, start: Start) -> httpx.Client:
    file = tmp_path / "keys"
    file.write_text("open-key partner\nslow-key mobile 0.001 5\nplain-key\n")
    return start(api_keys_file=file, api_keys="fixed-key")


def post(client: httpx.Client, key: str, cat: bytes, images: int) -> httpx.Response:
    return client.post("/predict", files=[("file", ("x.png", cat))] * images, headers={"x-api-key": key})


def counts(client: httpx.Client) -> dict[tuple[str, str], float]:
    return {
        (sample.labels["name"], sample.labels["outcome"]): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "thirtytwo_key_images_total"
    }


def test_a_key_over_its_limit_gets_429_and_others_do_not(keyed: httpx.Client, cat: bytes) -> None:
    first = post(keyed, "slow-key", cat, 3)
    assert first.status_code == 200
    assert first.headers["ratelimit-policy"] == '"key";q=5;qu="images";w=5000'
    assert STATE.fullmatch(first.headers["ratelimit"])[1] == "2"
    refused = post(keyed, "slow-key", cat, 3)
    assert refused.status_code == 429
    assert refused.json()["type"] == "urn:thirtytwo:problem:rate-limited"
    assert 900 <= int(refused.headers["retry-after"]) <= 1000
    assert STATE.fullmatch(refused.headers["ratelimit"])[1] == "2"
    assert post(keyed, "slow-key", cat, 6).status_code == 413
    infer = {"x-api-key": "slow-key", "Inference-Header-Content-Length": "0"}
    answers = [keyed.post("/v2/models/tiny_image/infer", content=cat, headers=infer) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert "ratelimit" in answers[2].headers
    assert set(answers[2].json()) == {"error"}
    for key in ("open-key", "plain-key", "fixed-key"):
        answer = post(keyed, key, cat, 6)
        assert (answer.status_code, "ratelimit" in answer.headers) == (200, False)
    assert counts(keyed) == {
        ("mobile", "accepted"): 5,
        ("mobile", "refused"): 10,
        ("partner", "accepted"): 6,
    }
    assert not re.search("(open|slow|plain|fixed)-key", keyed.get("/metrics").text)


@pytest.mark.slow
def test_only_the_caller_over_its_share_gets_429(tiny_weights: Path, cat: bytes) -> None:
    """A lone image of another key is served; what the queue refuses is not charged to the key's rate limit."""
    keys = Path(tiny_weights).with_name("keys")
    keys.write_text("a first\nb second\nc third 1000 40\n")
    released = threading.Event()

    def hold(probabilities: NDArray[np.float32], white: NDArray[np.bool_]) -> NDArray[np.float32]:
        assert not white.any() or released.wait(60)
        return probabilities

    queue = {"max_batch": 4, "max_queue": 80, "max_files": 40, "max_queue_share": 0.5}
    settings = Settings(weights=tiny_weights, api_keys_file=keys, request_timeout_s=60, **queue)
    with serving(settings, fault_injection.load(hold)) as client, ThreadPoolExecutor(2) as pool:
        large = pool.submit(post, client, "a", WHITE, 40)
        while not re.search(r"thirtytwo_queue_size [1-9]", client.get("/metrics").text):
            time.sleep(0.001)
        own = post(client, "a", cat, 40)
        other = post(client, "c", cat, 40)  # would leave no place for small callers
        lone = pool.submit(post, client, "b", cat, 1)
        released.set()
        assert (large.result().status_code, lone.result().status_code) == (200, 200)
        assert (own.status_code, other.status_code) == (429, 429)
        assert "This caller has" in own.json()["detail"]
        assert STATE.fullmatch(other.headers["ratelimit"])[1] == "40"
        assert counts(client)["third", "refused"] == 40


@pytest.mark.parametrize(
    ("max_queue", "max_files", "share", "expected"),
    [
        (512, 256, 0.5, (256, 64)),
        (512, 256, 0.25, (256, 64)),
        (512, 64, 0.25, (128, 64)),
        (512, 256, 1.0, (512, 0)),
        (256, 256, 0.5, (256, 0)),
        (300, 280, 0.5, (280, 20)),
    ],
)
def test_a_request_of_the_most_files_fits_any_share(
    max_queue: int, max_files: int, share: float, expected: tuple[int, int]
) -> None:
    assert queue_shares(max_queue, max_files, share) == expected
