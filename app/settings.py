"""Every setting with its default and meaning. Flags, environment, `--help` and the documents' table use this class."""

import logging
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FilePath, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from app.errors import SettingsError
from app.model.weights import BUNDLED
from app.setting_types import Count, Device, Hosts, Keys, ListenHost, Lower, Origins, Proxies, RootPath, Seconds

PREFIX = "THIRTYTWO_"
DEPRECATED = {  # removed in the release after 0.1
    "MAX_HELD_BYTES": "MAX_INFLIGHT_BYTES",
    "PROXIES": "TRUSTED_PROXIES",
    "EXPOSE_PAGE": "EXPOSE_UI",
    "WATCHDOG_S": "INFERENCE_TIMEOUT_S",
    "DRAIN_S": "SHUTDOWN_TIMEOUT_S",
}
REMOVED = {"SECOND_LOOK": "the stages in the weights file replace it"}
GROUPS = {  # by the first setting of each
    "host": "Server",
    "weights": "Model",
    "request_timeout_s": "Limits",
    "api_keys": "Access",
    "inference_timeout_s": "Operation",
}

logger = logging.getLogger(__name__)


class Settings(BaseSettings):
    """Read from flags, then from the environment with the prefix THIRTYTWO_, then from the defaults."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    host: ListenHost = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all, :: for all and IPv6")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    workers: int = Field(
        0,
        ge=0,
        le=256,
        description="HTTP processes; several share one engine process; "
        "0: 1 on a CPU, on a GPU three quarters of the CPUs, at most 16",
    )
    root_path: RootPath = Field("", description="URL path prefix behind a reverse proxy, such as /classifier")
    keep_alive_s: Seconds = Field(
        75.0,
        description="seconds until an idle connection is closed; keep it above the load balancer's idle timeout "
        "(AWS ALB and nginx: 60, Google Cloud: 600)",
    )
    tls_cert: FilePath | None = Field(
        None, description="PEM file with the certificate chain; enables HTTPS with TLS_KEY"
    )
    tls_key: FilePath | None = Field(None, description="PEM file with the private key")

    weights: Path = Field(BUNDLED, description="weights file; default: the bundled CIFAR-10 model")
    weights_poll_s: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="seconds between checks for a new weights file; 0: only on request"
    )
    shadow_weights: Path | None = Field(
        None,
        description="weights file of a candidate that runs on a sample of the traffic; responses ignore it; "
        "with one HTTP process only",
    )
    shadow_sample: float = Field(0.1, gt=0, le=1, description="share of requests that the candidate runs on")
    device: Device = Field("auto", description="auto, cpu, cuda, cuda:N or mps; auto prefers CUDA")
    engine: Annotated[Literal["auto", "openvino", "torch"], Lower] = Field(
        "auto", description="inference engine; auto is openvino on a CPU, torch elsewhere"
    )
    precision: Annotated[Literal["auto", "int8", "bfloat16", "float16", "float32"], Lower] = Field(
        "auto",
        description="numeric precision; auto: the fastest that is native to the device and reproduces the references",
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads for inference; 0 uses all available")
    max_batch: int = Field(
        0,
        ge=0,
        le=65_536,
        description="largest batch, in images; 0: 64 on a CPU, 1024 on a GPU, fewer above 128 x 128 pixels",
    )
    early_exit: bool = Field(
        True, description="images leave a cascade after the first confident stage; false: they pass all stages"
    )

    request_timeout_s: Seconds = Field(10.0, description="deadline of a request in seconds, then 504")
    max_queue: int = Field(
        0,
        ge=0,
        description="images waiting before further requests get 429, for each HTTP process; "
        "0: 512, on a GPU the work of 0.25 s, from 512 to 16384",
    )
    max_queue_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of MAX_QUEUE that one caller may hold, but at least MAX_FILES; "
        "a caller is an API key, else an address; 1: no limit per caller",
    )
    max_files: Count = Field(256, description="files per request")
    max_file_bytes: Count = Field(10_000_000, description="bytes per file")
    max_body_bytes: Count = Field(32_000_000, description="bytes per request body")
    max_inflight_bytes: Count = Field(
        256_000_000, description="bytes of all requests without a response and responses in transfer; 429 above it"
    )
    max_pixels: Count = Field(25_000_000, description="pixels per image, checked before decoding")
    max_request_pixels: Count = Field(
        100_000_000, description="pixels of all images of a request, checked before decoding"
    )
    strict_size: bool = Field(False, description="accept only images of the model's input size")

    api_keys: Keys = Field((), description="comma-separated API keys; empty without API_KEYS_FILE: open to all")
    api_keys_file: Path | None = Field(None, description="file with one API key per line, reloaded when it changes")
    allowed_hosts: Hosts = Field(
        (), description="comma-separated Host names that are served, also *.a.org; empty: all; probes are exempt"
    )
    cors_origins: Origins = Field((), description="comma-separated origins allowed by CORS, such as https://a.org")
    trusted_proxies: Proxies = Field(
        ("127.0.0.1", "::1"), description="comma-separated proxy addresses whose X-Forwarded-* headers are trusted"
    )
    expose_docs: bool = Field(True, description="serve /docs and /openapi.json")
    expose_metrics: bool = Field(True, description="serve /metrics")
    expose_ui: bool = Field(True, description="serve the page at /")

    inference_timeout_s: Seconds = Field(30.0, description="seconds one batch may run before the process exits")
    shutdown_timeout_s: float = Field(
        20.0, ge=0, allow_inf_nan=False, description="seconds accepted requests have to finish after SIGTERM"
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Lower] = Field(
        "info", description="minimum log level"
    )
    log_format: Annotated[Literal["text", "json"], Lower] = Field("text", description="format of log lines")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, InitSettingsSource(settings_cls, deprecated_values(os.environ))

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        """One request of the largest allowed size must fit into what all requests share."""
        for shared, single in (
            ("max_queue", "max_files"),
            ("max_inflight_bytes", "max_body_bytes"),
            ("max_request_pixels", "max_pixels"),
        ):
            if 0 < getattr(self, shared) < getattr(self, single):
                raise ValueError(f"{_variable(shared)} is less than {_variable(single)}={getattr(self, single)}")
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            missing = "tls_key" if self.tls_cert else "tls_cert"
            raise ValueError(f"{_variable(missing)} is missing: HTTPS needs a certificate and a key")
        return self


def deprecated_values(environment: Mapping[str, str]) -> dict[str, Any]:
    """Values of variables under their old names, by field; a variable under its new name has precedence."""
    given = {name.upper(): value for name, value in environment.items() if value}
    return {new.lower(): given[PREFIX + old] for old, new in DEPRECATED.items() if PREFIX + old in given}


def load() -> Settings:
    """The settings from the environment; raises SettingsError with a line that names the variable."""
    for warning in warnings(os.environ):
        logger.warning(warning)
    try:
        return Settings()
    except ValidationError as error:
        raise invalid(error) from error


def invalid(error: ValidationError) -> SettingsError:
    """The first error as one line that names the variable; values of secrets are left out."""
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    return SettingsError(f"{_given_variable(str(first['loc'][0]))}: {reason}" if first["loc"] else reason)


def warnings(environment: Mapping[str, str]) -> list[str]:
    """A line for each variable with a deprecated name, and for each that is almost the name of a setting."""
    given = {name.upper() for name, value in environment.items() if value and name.upper().startswith(PREFIX)}
    known = {_variable(name) for name in Settings.model_fields}
    lines = [
        f"{PREFIX}{old} is deprecated; use {PREFIX}{new}"
        + (f"; both are set, {PREFIX}{new} has precedence" if PREFIX + new in given else "")
        for old, new in DEPRECATED.items()
        if PREFIX + old in given
    ]
    lines += [f"{PREFIX}{old} has no effect: {why}" for old, why in REMOVED.items() if PREFIX + old in given]
    for name in sorted(given - known - {PREFIX + old for old in DEPRECATED | REMOVED}):
        if close := get_close_matches(name, known, 1, cutoff=0.85):
            lines.append(f"{name} is not a setting; did you mean {close[0]}?")
    return lines


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _given_variable(name: str) -> str:
    """The deprecated name where only that is set."""
    new = _variable(name)
    old = next((PREFIX + old for old, to in DEPRECATED.items() if PREFIX + to == new), new)
    return old if os.environ.get(old) and not os.environ.get(new) else new
