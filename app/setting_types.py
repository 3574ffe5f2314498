"""The types of settings: each accepts what an operator may write, and normalises or refuses it."""

import ipaddress
import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

HOST_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,3})?")
DEFAULT_PORTS = {"http": 80, "https": 443}  # browsers leave them out of the Origin header
OWN_PATHS = ("/predict", "/model", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/static", "/v2")


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


def _split(value: object) -> object:
    return tuple(item for part in value.split(",") if (item := part.strip())) if isinstance(value, str) else value


def _device(value: str) -> str:
    if not DEVICE.fullmatch(value):
        raise ValueError("must be auto, cpu, cuda, cuda:N or mps")
    return value


def _listen_host(value: str) -> str:
    host = value.strip()
    if not host:
        raise ValueError("must not be empty")
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _host_name(value: str) -> str:
    """The name in a Host header without its port, as Starlette's TrustedHostMiddleware compares it."""
    try:
        return f"[{ipaddress.IPv6Address(_listen_host(value))}]"
    except ValueError:
        pass
    name = value.lower()
    if name != "*" and not HOST_NAME.fullmatch(name):
        raise ValueError(f"{value} must be a host name without scheme, port and path, *.DOMAIN, or *")
    return name


def _origin(value: str) -> str:
    """The origin as browsers send it: in lower case, without the scheme's default port, without a path."""
    if value in ("*", "null"):
        return value
    try:
        parts = urlsplit(value.lower())
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not parts.scheme or parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{value} must be SCHEME://HOST or SCHEME://HOST:PORT without a path, or *")
    suffix = "" if port in (None, DEFAULT_PORTS.get(parts.scheme)) else f":{port}"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{suffix}"


def _proxy(value: str) -> str:
    if value != "*":
        try:
            ipaddress.ip_network(value)
        except ValueError as error:
            raise ValueError(f"{value} must be an IP address, a network such as 10.0.0.0/8, or *") from error
    return value


def _root_path(value: str) -> str:
    path = f"/{value.strip().strip('/')}".rstrip("/")
    if "/" + path.lstrip("/").partition("/")[0] in OWN_PATHS:
        raise ValueError(f"{path} begins with a path of the service itself")
    return path


Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Lower = BeforeValidator(_lower)  # for choices: LOG_LEVEL=INFO is info
Split = BeforeValidator(_split)  # of a comma-separated list
Device = Annotated[str, Lower, AfterValidator(_device)]
ListenHost = Annotated[str, AfterValidator(_listen_host)]
RootPath = Annotated[str, AfterValidator(_root_path)]
Keys = Annotated[tuple[SecretStr, ...], NoDecode, Split]
Hosts = Annotated[tuple[Annotated[str, AfterValidator(_host_name)], ...], NoDecode, Split]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, Split]
Proxies = Annotated[tuple[Annotated[str, AfterValidator(_proxy)], ...], NoDecode, Split]
