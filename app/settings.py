"""Every setting, its default and why. Flags, environment, `--help` and the README's table come from this one class."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, FilePath, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.errors import SettingsError
from app.model.weights import BUNDLED

PREFIX = "THIRTYTWO_"

Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """Read from the environment with the prefix THIRTYTWO_; a flag of `python -m app` sets the same variable."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True)

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    workers: Count = Field(1, description="processes; one with all threads is best on a CPU of few cores")
    weights: Path = Field(BUNDLED, description="weights file; default: the bundled CIFAR-10 one")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1 or mps; auto prefers CUDA"
    )
    engine: Literal["auto", "openvino", "torch"] = Field(
        "auto", description="auto is openvino on a CPU, torch elsewhere"
    )
    precision: Literal["auto", "int8", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto is the fastest that the processor found computes well in"
    )
    threads: int = Field(
        0, ge=0, description="CPU threads of the model; 0: all that may be used, shared out among the workers"
    )
    max_batch: Count = Field(64, description="images in one pass of the network; more are no faster")
    max_queue: Count = Field(512, description="images waiting before 429; under a second of work on two cores")
    early_exit: bool = Field(
        True, description="an image leaves the cascade after the first confident stage; false: it passes all stages"
    )
    request_timeout_s: float = Field(10.0, gt=0, description="seconds until 504; its images leave the queue")
    max_files: Count = Field(256, description="files in one request")
    max_file_bytes: Count = Field(10_000_000, description="bytes of one file")
    max_body_bytes: Count = Field(32_000_000, description="bytes of one request, refused while it is read")
    max_held_bytes: Count = Field(
        256_000_000, description="bytes of all large requests under way, before further ones get 429"
    )
    max_pixels: Count = Field(25_000_000, description="pixels of one image, checked before it is decoded")
    max_request_pixels: Count = Field(100_000_000, description="pixels of all images of one request")
    strict_size: bool = Field(False, description="take only images of the model's input size")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="comma-separated keys; whoever wants predictions must send one; empty: open to all"
    )
    api_keys_file: Path | None = Field(None, description="file with one more key a line, read again when it changes")
    expose_docs: bool = Field(True, description="serve /docs and /openapi.json")
    expose_metrics: bool = Field(True, description="serve /metrics")
    expose_page: bool = Field(True, description="serve the page at /")
    cors_origins: Names = Field(
        (), description="comma-separated origins whose pages may call this, such as https://a.org"
    )
    allowed_hosts: Names = Field((), description="comma-separated Host names answered to, *.a.org too; empty: all")
    proxies: Names = Field(
        ("127.0.0.1",), description="comma-separated addresses whose X-Forwarded-* headers are believed"
    )
    tls_cert: FilePath | None = Field(
        None, description="PEM file with the certificate chain; serves HTTPS with TLS_KEY"
    )
    tls_key: FilePath | None = Field(None, description="PEM file with its private key")
    watchdog_s: float = Field(
        30.0, gt=0, description="seconds that one pass of the network may take before the process ends"
    )
    drain_s: float = Field(20.0, ge=0, description="seconds that accepted requests get to finish after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity logged")
    log_format: Literal["text", "json"] = Field("text", description="one line a request, for people or for machines")
    root_path: str = Field("", description="path under which a proxy serves this, such as /classifier")

    @field_validator("api_keys", "cors_origins", "allowed_hosts", "proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(key for part in value.split(",") if (key := part.strip())) if isinstance(value, str) else value

    @field_validator("root_path")
    @classmethod
    def _slashes(cls, value: str) -> str:
        return f"/{value.strip('/')}" if value.strip("/") else ""

    @model_validator(mode="after")
    def _room_for_a_request(self) -> Self:
        if self.max_queue < self.max_files:
            raise ValueError(f"MAX_QUEUE ({self.max_queue}) must hold one request of MAX_FILES ({self.max_files})")
        return self

    @model_validator(mode="after")
    def _room_for_a_body(self) -> Self:
        if self.max_held_bytes < self.max_body_bytes:
            raise ValueError(f"MAX_HELD_BYTES ({self.max_held_bytes}) must hold MAX_BODY_BYTES ({self.max_body_bytes})")
        return self

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("TLS_CERT and TLS_KEY belong together")
        return self


def load() -> Settings:
    """The settings from the environment; raises SettingsError with a line that names the variable."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        variable = PREFIX + str(first["loc"][0]).upper() if first["loc"] else f"{PREFIX}*"
        raise SettingsError(f"{variable}: {first['msg'].removeprefix('Value error, ')}") from error
