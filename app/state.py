"""What the lifespan builds and the routes use: one frozen object, reached by one alias."""

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from app.api.auth import ApiKeys
from app.api.parse_thread import ParseThread
from app.inference.classifier import Classifier
from app.inference.pipeline import Pipeline
from app.inference.repository import Repository
from app.process.lifecycle import Lifecycle
from app.settings import Settings
from app.telemetry.drift import DriftMonitor
from app.telemetry.metrics import Metrics
from app.telemetry.statistics import Statistics


@dataclass(frozen=True)
class State:
    settings: Settings
    lifecycle: Lifecycle
    metrics: Metrics
    drift: DriftMonitor
    keys: ApiKeys
    statistics: Statistics
    pipeline: Pipeline
    repository: Repository
    parse_thread: ParseThread  # decompresses bodies and parses large tensors
    render_executor: Executor  # renders large responses

    @property
    def classifier(self) -> Classifier:
        """The model that serves new requests. A request that reads it twice may get two."""
        return self.pipeline.classifier


async def current(request: Request) -> State:
    state: State = request.state.service
    return state


Service = Annotated[State, Depends(current)]
