"""API keys: one of several, compared in constant time, some of them from a file that may change while we run."""

import hmac
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.errors import SettingsError, Unauthorized

logger = logging.getLogger(__name__)


class Keys:
    """The accepted keys: the fixed ones, and those of a file with one a line. Where neither is set, all may enter.

    A change of the file may go unnoticed for `look_s` seconds. Raises SettingsError where the file cannot be read at
    the start; later the last keys stay.
    """

    def __init__(self, fixed: Sequence[str] = (), file: Path | None = None, look_s: float = 1.0) -> None:
        self.open = not fixed and file is None
        self._fixed = [key.encode() for key in fixed]
        self._file = file
        self._look_s = look_s
        self._from_file: list[bytes] = []
        self._changed_ns = 0
        self._looked = time.monotonic()
        if file:
            try:
                self._read(file)
            except OSError as error:
                raise SettingsError(f"THIRTYTWO_API_KEYS_FILE: {file} cannot be read: {error.strerror}.") from error

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises Unauthorized where keys are set and the headers (names in lower case) carry none of them."""
        if self.open:
            return
        self._look()
        scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        sent = credentials.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        matches = [hmac.compare_digest(sent, key) for key in self._fixed + self._from_file]
        if not any(matches):
            raise Unauthorized("Send a key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")

    def _look(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked < self._look_s:
            return
        self._looked = now
        try:
            self._read(self._file)
        except OSError as error:
            logger.error("the keys stay as they were: %s cannot be read: %s", self._file, error.strerror)

    def _read(self, file: Path) -> None:
        changed_ns = file.stat().st_mtime_ns
        if changed_ns != self._changed_ns:
            lines = (line.strip() for line in file.read_bytes().splitlines())
            self._from_file = [line for line in lines if line and not line.startswith(b"#")]
            self._changed_ns = changed_ns
            logger.info("%d API keys read from %s", len(self._from_file), file)
