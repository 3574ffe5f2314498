"""The findings of a check as a Markdown table, one row each."""

from pathlib import Path
from typing import Any

SHOWN = 160  # characters of a row's values


def write_table(file: Path, findings: list[dict[str, Any]]) -> None:
    """Raises OSError."""
    file.write_text("\n".join(["| part | finding | values |", "| --- | --- | --- |", *map(_row, findings)]) + "\n")


def _row(finding: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {value}" for name, value in finding.items() if name not in ("part", "t", "what"))
    shown = values if len(values) <= SHOWN else values[:SHOWN] + "…"
    return f"| {finding['part']} | {finding['what']} | {shown.replace('|', '/')} |"
