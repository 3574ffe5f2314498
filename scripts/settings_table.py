"""Writes the table of settings into docs/configuration.md: `make docs`. A test fails while the two differ."""

import re
from pathlib import Path

from app.settings import PREFIX, Settings

DOCUMENT = Path(__file__).parents[1] / "docs" / "configuration.md"
PLACE = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- end of settings -->)", re.DOTALL)


def table() -> str:
    rows = ["| variable | default | what it does |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        rows.append(f"| `{PREFIX}{name.upper()}` | {_default(name, field.default)} | {field.description} |")
    return "\n".join(rows) + "\n"


def _default(name: str, value: object) -> str:
    if name == "weights":
        return "bundled"
    if value in ("", (), None):
        return "empty"
    if isinstance(value, tuple):
        value = ",".join(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def updated(text: str) -> str:
    return PLACE.sub(lambda _: table(), text)


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text()))
