"""A limit in images per second for one API key, and the header fields that describe it.

Token bucket: `burst` tokens at first and at most, refilled at the rate; an image takes one. The fields are those of
draft-ietf-httpapi-ratelimit-headers-10, with the quota unit `images`.
"""

import time
from collections.abc import Callable
from math import ceil

from app.errors import RateLimited, TooLarge

POLICY = '"key"'

Headers = list[tuple[bytes, bytes]]


class RateLimit:
    """Belongs to one event loop. `rate` in images per second, `burst` in images."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self.burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._updated = clock()
        self._policy = f'{POLICY};q={burst};qu="images";w={max(1, ceil(burst / rate))}'.encode()

    def take(self, images: int) -> None:
        """Raises RateLimited, or TooLarge for more images than the limit can ever admit at once."""
        if images > self.burst:
            raise TooLarge(f"The request has {images} images; this key admits at most {self.burst} at once.")
        if images > self._refilled():
            detail = f"This key admits {self.rate:g} images per second, and {self.burst} at once."
            raise RateLimited(detail, max(1, ceil((images - self._tokens) / self.rate)))
        self._tokens -= images

    def give_back(self, images: int) -> None:
        """Of a request that was refused for another reason."""
        self._tokens = min(self.burst, self._tokens + images)

    def headers(self) -> Headers:
        """What is left, and the seconds until all of the burst is."""
        left = self._refilled()
        state = f"{POLICY};r={int(left)};t={ceil((self.burst - left) / self.rate)}"
        return [(b"ratelimit-policy", self._policy), (b"ratelimit", state.encode())]

    def _refilled(self) -> float:
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._updated) * self.rate)
        self._updated = now
        return self._tokens
