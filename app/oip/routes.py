"""The protocol's endpoints. Each translates a request and calls one function."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import Response

from app import __version__
from app.api import openapi
from app.api.problems import INFERENCE
from app.oip import handler, loading
from app.oip.models import VERSION, Model, check_name, config, find, metadata, names
from app.process.lifecycle import Phase
from app.state import Service

EXTENSIONS = [
    "classification",
    "model_configuration",
    "schedule_policy",
    "binary_tensor_data",
    "parameters",
    "statistics",
]
MODEL = "/models/{name}"
VERSIONED = MODEL + "/versions/{version}"

router = APIRouter(prefix=INFERENCE, tags=["Open Inference Protocol"], responses={"default": openapi.INFERENCE_ERROR})


async def named(name: str, request: Request, service: Service) -> Model:
    return find(service.classifier, name, request.path_params.get("version", VERSION))


Named = Annotated[Model, Depends(named)]


@router.get("/health/live", summary="Alive")
async def live(service: Service) -> dict[str, bool]:
    service.lifecycle.check_alive()
    return {"live": True}


@router.get("/health/ready", summary="Ready for work")
async def ready(service: Service) -> dict[str, bool]:
    service.lifecycle.check_ready()
    return {"ready": True}


@router.get("/", include_in_schema=False)
@router.get("", summary="The server and what it supports")
async def server() -> dict[str, Any]:
    return {"name": "thirtytwo", "version": __version__, "extensions": EXTENSIONS}


@router.get("/models/stats", summary="Statistics of all models")
async def all_statistics(service: Service) -> dict[str, Any]:
    return {"model_stats": [service.statistics.of(name, VERSION) for name in names(service.classifier)]}


@router.get(VERSIONED, include_in_schema=False)
@router.get(MODEL, summary="A model's inputs and outputs")
async def model_metadata(model: Named) -> dict[str, Any]:
    return metadata(model)


@router.get(VERSIONED + "/config", include_in_schema=False)
@router.get(MODEL + "/config", summary="A model's configuration")
async def model_config(model: Named, service: Service) -> dict[str, Any]:
    return config(model, service.settings.max_files)


@router.get(VERSIONED + "/ready", include_in_schema=False)
@router.get(MODEL + "/ready", summary="Whether a model is ready")
async def model_ready(model: Named, service: Service) -> dict[str, Any]:
    service.lifecycle.check_ready()
    return {"name": model.name, "ready": True}


@router.get(VERSIONED + "/stats", include_in_schema=False)
@router.get(MODEL + "/stats", summary="A model's statistics")
async def model_statistics(model: Named, service: Service) -> dict[str, Any]:
    return {"model_stats": [service.statistics.of(model.name, VERSION)]}


@router.post(VERSIONED + "/infer", include_in_schema=False)
@router.post(MODEL + "/infer", summary="Infer", openapi_extra=openapi.INFER)
async def infer(name: str, request: Request, service: Service) -> Response:
    """A JSON request, one with binary tensors behind the JSON, or one raw image."""
    check_name(service.classifier, name, request.path_params.get("version", VERSION))
    return await handler.infer(request.scope, request.receive, service, name)


@router.post("/repository/index", summary="The models of the repository")
async def index(service: Service) -> list[dict[str, str]]:
    phase = service.lifecycle.phase
    state = "READY" if phase is Phase.READY else "UNAVAILABLE"
    reason = "" if phase is Phase.READY else phase.value
    return [{"name": name, "version": VERSION, "state": state, "reason": reason} for name in names(service.classifier)]


@router.post("/repository/models/{name}/load", summary="Load the weights file again", openapi_extra=openapi.LOAD)
async def load(name: str, request: Request, service: Service) -> dict[str, Any]:
    """Replaces the model that serves by the one in the weights file, once that is ready. No request fails meanwhile."""
    return await loading.load(request.scope, request.receive, service, name)


@router.post("/repository/models/{name}/unload", include_in_schema=False)
async def unload(name: str) -> None:
    raise HTTPException(501, f"'{name}' cannot be unloaded; a load replaces it.")
