"""API keys from the settings and from a file that may change while the service runs.

A line of the file is a key, which a name may follow, and then a rate limit: `KEY NAME IMAGES_PER_SECOND BURST`.
"""

import asyncio
import hashlib
import logging
import math
import os
import re
import stat
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.api.rate_limit import RateLimit
from app.errors import SettingsError, Unauthorized

MAX_FILE_BYTES = 1_000_000
NAME = re.compile(rb"[\w.-]{1,64}")
COMMENT = re.compile(rb"(?:^|\s)#")

logger = logging.getLogger(__name__)


class ApiKey:
    """A key, its public name (empty for none) and its limit. `caller` identifies it without giving it away."""

    def __init__(self, secret: bytes, name: str = "", limit: RateLimit | None = None) -> None:
        self.secret = secret
        self.name = name
        self.limit = limit
        self.digest = digest(secret)
        self.caller = "key " + self.digest.hex()[:16]

    def __repr__(self) -> str:
        return f"ApiKey(name={self.name!r})"

    def is_like(self, other: "ApiKey") -> bool:
        """Whether key, name and limit are the same, so that the images left of the limit carry over."""
        own, its = ((each.limit.rate, each.limit.burst) if each.limit else None for each in (self, other))
        return (self.digest, self.name, own) == (other.digest, other.name, its)


class ApiKeys:
    """The accepted keys: the fixed ones, and those of a file with one key per line; `#` begins a comment.

    Raises SettingsError if the file cannot be read at first. Later the last keys stay valid until it can be.
    """

    def __init__(self, fixed: Sequence[str] = (), file: Path | None = None) -> None:
        self.disabled = not fixed and file is None
        self._fixed = [ApiKey(key.encode()) for key in fixed]
        self._file = file
        self._data = b""  # of the file as it is in effect
        self._seen = b""  # of the file at the last reload
        self._problem = ""
        self._keys = by_digest(self._fixed)
        if file:
            try:
                self._accept(read_key_file(file))
            except (OSError, ValueError) as error:
                raise SettingsError(f"THIRTYTWO_API_KEYS_FILE: {file} {describe(error)}.") from error

    def check(self, headers: Mapping[bytes, bytes]) -> ApiKey | None:
        """The key in one of the two headers (names in lower case), None without keys. Raises Unauthorized."""
        if self.disabled:
            return None
        scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        sent = [credentials.strip()] if scheme.lower() == b"bearer" else []
        sent.append(headers.get(b"x-api-key", b""))
        for each in sent:  # the time of a look-up by digest depends on no key
            if key := self._keys.get(digest(each)):
                return key
        raise Unauthorized("Send a key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")

    def reload(self, at_once: bool = True) -> None:
        """Reads the file again. Without `at_once` a change must be the same in two successive calls.

        So a file that is written in place is never in effect by halves.
        """
        if self._file is None:
            return
        try:
            data = read_key_file(self._file)
            is_stable, self._seen = data == self._seen, data
            if data != self._data and (at_once or is_stable):
                self._accept(data)
        except (OSError, ValueError) as error:
            self._report(describe(error))
            return
        self._problem = ""

    async def reload_every(self, interval_s: float) -> None:
        """Reloads for ever, in a thread: a file system that does not answer must not block the event loop."""
        while self._file is not None:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.reload, False)

    def _accept(self, data: bytes) -> None:
        keys = [self._former(key) or key for key in parse_keys(data)]
        self._data = self._seen = data
        self._keys = by_digest(self._fixed + keys)
        level = logging.INFO if self._keys else logging.WARNING
        logger.log(level, "%d API keys read from %s", len(keys), self._file)

    def _former(self, key: ApiKey) -> ApiKey | None:
        old = self._keys.get(key.digest)
        return old if old and old.is_like(key) else None

    def _report(self, problem: str) -> None:
        if problem != self._problem:
            logger.error("the API keys stay as they were: %s %s", self._file, problem)
        self._problem = problem


def digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def by_digest(keys: Sequence[ApiKey]) -> dict[bytes, ApiKey]:
    """Of two lines with one key the first is in effect."""
    return {key.digest: key for key in reversed(keys)}


def read_key_file(file: Path) -> bytes:
    """The content of a regular file; never waits for a writer. Raises OSError, or ValueError with a reason."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        data = b""
        while len(data) <= MAX_FILE_BYTES and (part := os.read(descriptor, MAX_FILE_BYTES + 1)):
            data += part
    finally:
        os.close(descriptor)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"has more than {MAX_FILE_BYTES} bytes")
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in data:
        raise ValueError("is not UTF-8 text (perhaps UTF-16); save it as UTF-8")
    return data


def parse_keys(data: bytes) -> list[ApiKey]:
    """One key per line, without comments and a byte-order mark. Raises ValueError that names the line, not the key."""
    lines = [COMMENT.split(line, 1)[0].split() for line in data.removeprefix(BOM_UTF8).splitlines()]
    return [_parse_key(number, fields) for number, fields in enumerate(lines, 1) if fields]


def _parse_key(number: int, fields: list[bytes]) -> ApiKey:
    secret, name, *numbers = [*fields, b""] if len(fields) == 1 else fields
    if name and not NAME.fullmatch(name):
        raise ValueError(f"line {number}: a name has letters, digits, '.', '_' and '-', at most 64")
    if not numbers:
        return ApiKey(secret, name.decode())
    try:
        rate, burst = float(numbers[0]), int(numbers[1])
        if len(numbers) > 2 or not 0 < rate < math.inf or burst < 1:
            raise ValueError
        limit = RateLimit(rate, burst)
    except (ValueError, IndexError, OverflowError):
        raise ValueError(f"line {number}: a key, a name, images per second and a burst of images are needed") from None
    return ApiKey(secret, name.decode(), limit)


def describe(error: Exception) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
