"""Everything that can go wrong, as one tree. Each leaf is one row of the contract; `app.api.problems` renders it.

ThirtytwoError
├── SettingsError           a setting has an invalid value (stops start-up, exit code 2)
├── WeightsError            the weights file cannot be served (stops start-up, exit code 2)
├── DeviceError             the requested device or precision is not available (stops start-up, exit code 2)
├── DeviceLostError         the device fails every call (ends the process, exit code 1)
├── DataError               the training data cannot be read (stops training, exit code 1)
└── RequestError            a caller can correct it, or must wait; carries an HTTP status
    ├── MalformedRequest    400  not valid HTTP/1.1
    ├── MalformedUpload     400  the multipart form cannot be parsed, or holds no file
    ├── UnknownHost         400  the Host header names none of ALLOWED_HOSTS
    ├── Unauthorized        401  API keys are set and none fits
    ├── RequestTimeout      408  the request arrives too slowly
    ├── TooLarge            413  too many bytes, files or pixels
    ├── UrlTooLong          414  the request line is over the limit
    ├── UnsupportedImage    415  not one of the accepted formats
    ├── UndecodableImage    422  an accepted format, but broken
    ├── WrongSize           422  not the model's input size, and STRICT_SIZE is set
    ├── InvalidParameter    422  a query value out of range
    ├── QueueFull           429  no room in the queue, or for the bytes of an upload; carries retry_after_s
    ├── RateLimited         429  the API key has no images left; carries retry_after_s
    ├── HeadTooLarge        431  too many or too long headers
    ├── NotReady            503  shutting down or failed; carries retry_after_s
    ├── DeadlineExceeded    504  not answered within the request timeout
    └── ClientDisconnected  499  the caller left before the response (in log and metrics only)
"""

from typing import ClassVar


class ThirtytwoError(Exception):
    """The message is one sentence for a person."""


class SettingsError(ThirtytwoError):
    """A setting has a value that cannot be."""


class WeightsError(ThirtytwoError):
    """The weights file cannot be served."""


class DeviceError(ThirtytwoError):
    """The requested device or precision is not available."""


class DeviceLostError(ThirtytwoError):
    """The device fails every call."""


class DataError(ThirtytwoError):
    """The training data cannot be read."""


class RequestError(ThirtytwoError):
    """An answer other than 200. `type` is the stable slug that programs may match on."""

    status: ClassVar[int]
    type: ClassVar[str]
    title: ClassVar[str]
    retry_after_s: int | None = None


class MalformedRequest(RequestError):
    status, type, title = 400, "malformed-request", "The request cannot be parsed"


class MalformedUpload(RequestError):
    status, type, title = 400, "malformed-upload", "The upload cannot be read"


class UnknownHost(RequestError):
    status, type, title = 400, "unknown-host", "The host name is not served here"


class Unauthorized(RequestError):
    status, type, title = 401, "unauthorized", "An API key is needed"


class RequestTimeout(RequestError):
    status, type, title = 408, "request-timeout", "The request arrives too slowly"


class TooLarge(RequestError):
    status, type, title = 413, "too-large", "The upload is too large"


class UrlTooLong(RequestError):
    status, type, title = 414, "url-too-long", "The URL is too long"


class UnsupportedImage(RequestError):
    status, type, title = 415, "unsupported-image", "Not an accepted image format"


class UndecodableImage(RequestError):
    status, type, title = 422, "undecodable-image", "The image cannot be decoded"


class WrongSize(RequestError):
    status, type, title = 422, "wrong-size", "The image has another size than the model's input"


class InvalidParameter(RequestError):
    status, type, title = 422, "invalid-parameter", "A parameter is out of range"


class QueueFull(RequestError):
    status, type, title = 429, "queue-full", "The service is busy"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(RequestError):
    status, type, title = 429, "rate-limited", "The rate limit of the API key is reached"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class HeadTooLarge(RequestError):
    status, type, title = 431, "head-too-large", "The headers are too large"


class NotReady(RequestError):
    status, type, title = 503, "not-ready", "The service is not ready"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RequestError):
    status, type, title = 504, "deadline-exceeded", "Not answered in time"


class ClientDisconnected(RequestError):
    status, type, title = 499, "client-closed-request", "The client closed the connection"
