"""API keys: one of several, compared in constant time."""

import hmac
from collections.abc import Mapping, Sequence

from pydantic import SecretStr

from app.errors import Unauthorized


def check(headers: Mapping[bytes, bytes], keys: Sequence[SecretStr]) -> None:
    """Raises Unauthorized where keys are set and the headers (names in lower case) carry none of them."""
    if not keys:
        return
    scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
    sent = credentials.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    matches = [hmac.compare_digest(sent, key.get_secret_value().encode()) for key in keys]
    if not any(matches):
        raise Unauthorized("Send a key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")
