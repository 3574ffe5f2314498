"""API keys: one of several, compared in constant time."""

import hmac
from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from app.errors import Unauthorized
from app.state import Service

WHEN = "Needed where the service has API keys; one of the two headers is enough."
BEARER = HTTPBearer(scheme_name="Bearer", description=WHEN, auto_error=False)
HEADER = APIKeyHeader(name="X-API-Key", scheme_name="X-API-Key", description=WHEN, auto_error=False)

Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]
Header = Annotated[str | None, Security(HEADER)]


def check(service: Service, bearer: Bearer, header: Header) -> None:
    """Raises Unauthorized where keys are set and the request carries none of them."""
    keys = service.settings.api_keys
    if not keys:
        return
    sent = (bearer.credentials if bearer else header or "").encode()
    matches = [hmac.compare_digest(sent, key.get_secret_value().encode()) for key in keys]
    if not any(matches):
        raise Unauthorized("Send a key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")


Authorized = Depends(check)
