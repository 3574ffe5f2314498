"""`serve run deploy.ray_serve:app`: the service as replicas on a Ray cluster.

Each replica runs the application of `app.application` with its own engine. Ray's proxy terminates HTTP, distributes the
requests and queues those that find every replica busy.
"""

import logging.config
from collections.abc import MutableMapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import defaults
from app.application import create_app
from app.settings import Settings
from app.sources import LoadEngine, load_engine
from app.telemetry import logs
from deploy.ray_autoscaling import UtilizationPolicy


def app(settings: Settings) -> Application:
    """Settings that neither `serve run` nor the config file sets come from the environment."""
    return replicas(settings)


def replicas(settings: Settings, load_engine: LoadEngine = load_engine, **options: Any) -> Application:
    """`options` of the deployment override those derived from the settings."""
    max_batch = defaults.max_batch(settings.max_batch, settings.device)
    max_queue = settings.max_queue or defaults.MAX_QUEUE
    derived = {
        # one batch in inference and the next one in the queue, at most what the replica's queue holds
        "max_ongoing_requests": min(2 * max_batch, max_queue),
        "max_queued_requests": max_queue,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        "autoscaling_config": AutoscalingConfig(
            max_replicas=4,
            target_ongoing_requests=max_batch,
            policy=AutoscalingPolicy(policy_function=UtilizationPolicy),
        ),
        "graceful_shutdown_timeout_s": settings.shutdown_timeout_s,
        "logging_config": LoggingConfig(enable_access_log=False),  # the application logs its own
        "ray_actor_options": {
            "num_cpus": settings.threads or 1,
            "num_gpus": int(settings.device.startswith("cuda")),
        },
    }
    deployment = serve.deployment(serve.ingress()(Replica))
    application: Application = deployment.options(**derived | options).bind(settings, load_engine)
    return application


class Replica:
    def __init__(self, settings: Settings, load_engine: LoadEngine) -> None:
        self._settings = settings
        self._load_engine = load_engine

    def __serve_build_asgi_app__(self) -> ASGIApp:
        settings = self._settings
        logging.config.dictConfig(logs.config(settings.log_level, settings.log_format))
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        settings = settings.model_copy(update={"threads": settings.threads or max(1, int(cpus))})
        self._application = RayApplication(create_app(settings, self._load_engine))
        return self._application

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray averages them over `look_back_period_s` for the policy."""
        return {"utilization": self._application.state["service"].metrics.highest_utilization}

    def check_health(self) -> None:
        self._application.state["service"].lifecycle.check_alive()


class RayApplication:
    """Adds the lifespan's state to each request, as uvicorn does; leaves X-Request-ID to Ray's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.state: MutableMapping[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self.state = scope["state"]
            await self.app(scope, receive, send)
            return

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await self.app({**scope, "state": dict(self.state)}, receive, send_without_id)
