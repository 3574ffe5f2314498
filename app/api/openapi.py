"""The OpenAPI page beyond the types: uploads, examples of responses, and every error."""

from typing import Any

from app import errors
from app.api import schemas
from app.api.problems import MEDIA_TYPE, TYPE
from app.model import preprocessing

FILE = {"type": "string", "format": "binary"}
COUNT = {"type": "integer", "minimum": 1, "default": 3}
FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {
            "type": "array",
            "items": FILE,
            "description": "One or more images. On this page, *Add string item* adds another.",
        },
        "top_k": {**COUNT, "description": "As the query parameter, which has precedence."},
    },
}
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": FORM},
        **{kind: {"schema": FILE} for kind in (*preprocessing.FORMATS.values(), "application/octet-stream")},
    },
}

TOP_K = {
    "name": "top_k",
    "in": "query",
    "description": "Number of most probable classes in the response; at most the number of classes.",
    "schema": COUNT,
}
KEYS: list[dict[str, Any]] = [{"Bearer": []}, {"X-API-Key": []}, {}]
REQUEST: dict[str, Any] = {"parameters": [TOP_K], "requestBody": BODY, "security": KEYS}
WHEN = "Required if the service has API keys, in one of the two headers."
SECURITY = {
    "Bearer": {"type": "http", "scheme": "bearer", "description": WHEN},
    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": WHEN},
}

JSON_LENGTH = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Length of the JSON in bytes if binary data follows; 0 if the body is one raw image.",
    "schema": {"type": "integer", "minimum": 0},
}
INFER: dict[str, Any] = {
    "parameters": [JSON_LENGTH],
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}}, "application/octet-stream": {"schema": FILE}},
    },
    "security": KEYS,
}
LOAD: dict[str, Any] = {
    "requestBody": {"required": False, "content": {"application/json": {"schema": {"type": "object"}}}},
    "security": KEYS[:2],
}
INFERENCE_ERROR: dict[str, Any] = {
    "description": "Any other status: the reason.",
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
        }
    },
}

UNSUPPORTED = "Send one of PNG, JPEG, WEBP, BMP, GIF; the first bytes are of none of them."

MODEL = {"name": "cifar10", "version": "3f2a9c01"}
CAT = {
    "filename": "chelsea.png",
    "label": "cat",
    "confidence": 0.9812,
    "top": [
        {"label": "cat", "probability": 0.9812},
        {"label": "dog", "probability": 0.0121},
        {"label": "frog", "probability": 0.0019},
    ],
    "resized_from": [451, 300],  # FastAPI drops a null from an example
}
NOTES = {
    "filename": "notes.txt",
    "error": {
        "type": TYPE + errors.UnsupportedImage.type,
        "title": errors.UnsupportedImage.title,
        "detail": UNSUPPORTED,
    },
}
ANSWERS = {
    "one": {"summary": "One image", "value": {"model": MODEL, "predictions": [CAT]}},
    "two": {"summary": "Two, one of them bad", "value": {"model": MODEL, "predictions": [CAT, NOTES]}},
}

DESCRIPTIONS = {
    400: "Malformed request or form, no part named `file`, or an empty body.",
    401: "The API key is missing or invalid.",
    408: "The request arrives too slowly.",
    413: "Too many bytes, files or pixels.",
    414: "The URL is too long.",
    415: "Not PNG, JPEG, WebP, BMP or GIF; or an unsupported media type or content coding.",
    422: "The image is broken, of a wrong size under STRICT_SIZE, or `top_k` is out of range.",
    429: "The queue or the caller's share of it is full, or the key's rate limit is reached; `Retry-After` is the "
    "estimated wait in seconds.",
    431: "Too many or too long headers.",
    503: "Shutting down, or failed.",
    504: "Not answered within the request timeout.",
}
DETAILS: dict[type[errors.RequestError], str] = {
    errors.MalformedRequest: "The request is not HTTP/1.1.",
    errors.MalformedUpload: 'The form has no part named "file".',
    errors.UnknownHost: "The Host header of the request names no host that is served here.",
    errors.Unauthorized: "Send a key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.",
    errors.RequestTimeout: "Under 5000 bytes arrived in 10 s.",
    errors.TooLarge: "The body has over 32000000 bytes.",
    errors.UrlTooLong: "The URL has over 2048 bytes.",
    errors.UnsupportedImage: UNSUPPORTED,
    errors.UndecodableImage: "The PNG data is broken or incomplete.",
    errors.WrongSize: "The image is 451 x 300; only 32 x 32 is accepted.",
    errors.InvalidParameter: "top_k is '11'; it must be a whole number from 1 to 10.",
    errors.QueueFull: "512 images are waiting; the limit is 512.",
    errors.RateLimited: "This key admits 100 images per second, and 200 at once.",
    errors.HeadTooLarge: "The head of the request has over 32768 bytes.",
    errors.NotReady: "The service is shutting down.",
    errors.DeadlineExceeded: "No answer within 10 s.",
}
RATE_LIMIT = {
    "RateLimit-Policy": {
        "description": "burst and window of the key's rate limit, if it has one",
        "schema": {"type": "string", "example": '"key";q=200;qu="images";w=2'},
    },
    "RateLimit": {
        "description": "images left, and seconds until the whole burst is",
        "schema": {"type": "string", "example": '"key";r=184;t=1'},
    },
}
RETRY_AFTER = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer"}}}
HEADERS: dict[int, dict[str, Any]] = {429: {**RETRY_AFTER, **RATE_LIMIT}, 503: RETRY_AFTER}


def _problem(status: int) -> dict[str, Any]:
    examples = {
        kind.type: {
            "summary": kind.title,
            "value": {
                "type": TYPE + kind.type,
                "title": kind.title,
                "status": status,
                "detail": detail,
                "request_id": "4f6c1d2e8a7b4c3d9e0f1a2b3c4d5e6f",
            },
        }
        for kind, detail in DETAILS.items()
        if kind.status == status
    }
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": examples}}
    return {
        "description": DESCRIPTIONS[status],
        "content": content,
        **({"headers": HEADERS[status]} if status in HEADERS else {}),
    }


ERRORS: dict[int | str, dict[str, Any]] = {status: _problem(status) for status in DESCRIPTIONS}
TIMING = {"description": "milliseconds of `decode`, `queue` and `model`", "schema": {"type": "string"}}
PREDICT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A prediction or an error for each file, in the order of the files.",
        "content": {"application/json": {"examples": ANSWERS}},
        "headers": {"Server-Timing": TIMING, **RATE_LIMIT},
    },
    **ERRORS,
}


def complete(schema: dict[str, Any]) -> None:
    """Adds what FastAPI does not derive: problem documents and API keys, which are outside its dependency stack."""
    schema["components"]["schemas"]["Problem"] = schemas.Problem.model_json_schema()
    schema["components"]["securitySchemes"] = SECURITY
