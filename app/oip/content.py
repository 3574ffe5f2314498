"""What a client has sent in place of what the protocol expects, for errors that name it."""

from app.model.signatures import sniff, sniff_base64

SAMPLE = 100  # bytes that are looked at
QUOTED = 20  # bytes that an error repeats


def brief(value: object) -> str:
    """At most 80 characters of a value."""
    text = str(value) or "none"
    return text if len(text) <= 80 else f"{text[:80]}..."


def of_body(body: bytes) -> str:
    """A body that is no JSON object."""
    start = body[:SAMPLE].lstrip()
    if start.startswith(b"--"):
        return "a multipart form"
    return of_file(start) or (f"text that starts with {start[:QUOTED]!r}" if start else "empty")


def of_file(data: bytes) -> str | None:
    """An image file, or one as base64 text; None for anything else."""
    kind = sniff(data)
    if kind:
        return f"a {kind} file"
    kind = sniff_base64(data)
    return f"base64 text of a {kind} file" if kind else None


def of_json(value: bytes) -> str:
    """The start of a value, or of the first item in a list that is no number."""
    if value.startswith(b'"'):
        return of_file(value[1:]) or "text"
    return "an object" if value.startswith(b"{") else "no list of whole numbers"
