"""Triton's model repository extension: a request to load the weights file."""

from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope

from app.api import bodies
from app.errors import MalformedUpload
from app.inference.repository import Outcome
from app.oip.models import VERSION, check_name, names
from app.oip.schemas import LoadRequest
from app.process.lifecycle import reload_other_workers
from app.state import State

MAX_BODY_BYTES = 10_000
NEEDS_KEYS = "Loading needs an API key, and this service has none: set THIRTYTWO_API_KEYS or THIRTYTWO_API_KEYS_FILE."


async def load(scope: Scope, receive: Receive, service: State, name: str) -> dict[str, Any]:
    """The model that serves afterwards; raises a RequestError or an HTTPException if the file cannot be served."""
    if service.keys.disabled:
        raise HTTPException(403, NEEDS_KEYS)
    headers = dict(scope["headers"])
    service.keys.check(headers)
    check_name(service.classifier, name)
    with service.lifecycle.admit():
        request = _parse(bytes(await bodies.read_body(receive, headers, MAX_BODY_BYTES)))
        outcome = await _load(service, request.parameters.version)
    classifier = service.classifier
    version = classifier.weights.version
    if outcome == "failure":
        raise HTTPException(400, f"The weights file cannot be served; the log has the reason. {version} serves on.")
    if outcome == "success":
        reload_other_workers()
    return {"name": names(classifier)[0], "version": VERSION, "parameters": {"weights_version": version}}


async def _load(service: State, version: str | None) -> Outcome:
    """Promotes the shadow if it has the version, else loads the file."""
    shadow = service.pipeline.shadow
    candidate = shadow.classifier if shadow else None
    if shadow is None or candidate is None or version is None or version != candidate.weights.version:
        return await service.repository.load(version)
    return await service.repository.promote(shadow, version)


def _parse(body: bytes) -> LoadRequest:
    """No body, or the JSON of the extension without the parameters that this service does not have."""
    try:
        return LoadRequest.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise MalformedUpload(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")) from error
