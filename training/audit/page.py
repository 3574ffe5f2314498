"""The findings as Markdown with sheets of pictures."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.audit import findings as data
from training.audit.findings import Findings
from training.datasets.listing import plural, shortened

SHOWN = 24  # pictures or pairs of a finding
COLUMNS = 6
SCALE_TO = 64  # pixels of a picture on a sheet
MARGIN = 14  # above a cell, for its number
MAX_CLASSES = 50  # rows of the table


def write(folder: Path, findings: Findings) -> None:
    """audit.md, audit.json and a PNG sheet of each finding with pictures; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(data.as_json(findings), indent=1, ensure_ascii=False) + "\n")
    for name, cells in _sheets(findings).items():
        if cells:
            contact_sheet(findings.inspection.pixels, cells[:SHOWN]).save(folder / f"{name}.png", optimize=True)
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)
    (folder / "audit.md").write_text(markdown(findings))


def markdown(findings: Findings) -> str:
    sections = [
        f"# Audit of {_escaped(findings.listing.name)}",
        "\n".join(f"- {_escaped(line)}" for line in overview(findings)),
        _class_table(findings),
        _unreadable(findings),
        _section(findings, "identical", "Identical pictures", "Same pixels at the network's input size."),
        _section(
            findings, "near-duplicates", "Near duplicates", "Similar by perceptual hash and by features, best first."
        ),
        _section(findings, "two-labels", "The same picture under two labels", "Of identical and near duplicates."),
        _section(findings, "empty", "Pictures that show nothing", "Nearly black, or of one colour."),
        _section(
            findings, "label-errors", "Probable label errors", "A classifier that has not seen the picture disagrees."
        ),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def overview(findings: Findings) -> list[str]:
    """The findings in a few lines."""
    seen = findings.inspection
    parts = {part: sum(picture.part == part for picture in seen.pictures) for part in findings.listing.parts}
    sizes = data.size_summary(findings)
    lines = [
        f"{findings.listing.form}: {', '.join(f'{count} {part}' for part, count in parts.items())} pictures of "
        f"{plural(len(findings.listing.classes), 'class', 'classes')}",
        *findings.listing.notes,
    ]
    if sizes:
        lines.append(f"{plural(sizes['different'], 'size')}; most common {', '.join(sizes['common'])}")
    lines.append(f"{plural(len(seen.rejected), 'unreadable file')}")
    lines.append(_duplicate_line(findings, "identical", findings.identical_pairs()))
    lines.append(_duplicate_line(findings, "near-duplicate", findings.near_pairs()))
    if findings.near_is_cut():
        lines.append(f"the list of near duplicates was cut at {len(findings.near):,} pairs; there are probably others")
    lines.append(f"{plural(len(findings.conflicts()), 'pair')} of the same picture under two labels")
    lines.append(f"{plural(len(findings.empty), 'picture')} nearly black or of one colour")
    errors = findings.label_errors
    by_part = {part: sum(findings.picture(e.position).part == part for e in errors) for part in findings.listing.parts}
    lines.append(
        f"{plural(len(errors), 'probable label error')}"
        + (f" ({', '.join(f'{count} {part}' for part, count in by_part.items())})" if errors else "")
    )
    return lines


def contact_sheet(pixels: NDArray[np.uint8], cells: Sequence[Sequence[int]]) -> Image.Image:
    """Numbered cells of one to three pictures beside each other, in rows."""
    across = max(len(cell) for cell in cells)
    columns = min(len(cells), max(2, COLUMNS * 2 // across))
    width, height = across * SCALE_TO + MARGIN, SCALE_TO + MARGIN
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, cell in enumerate(cells):
        x, y = i % columns * width, i // columns * height
        draw.text((x + 1, y), str(i + 1), fill="black")
        for j, index in enumerate(cell):
            picture = Image.fromarray(pixels[index]).resize((SCALE_TO, SCALE_TO), Image.Resampling.NEAREST)
            sheet.paste(picture, (x + j * SCALE_TO, y + MARGIN))
    return sheet


def _sheets(findings: Findings) -> dict[str, list[list[int]]]:
    """The cells of each sheet; held-out pictures with a partner in training come first."""

    def leaks_first(pairs: Sequence[Sequence[int]]) -> list[list[int]]:
        return [list(pair) for pair in sorted(pairs, key=lambda p: len({findings.picture(i).part for i in p}) < 2)]

    return {
        "identical": leaks_first([group[:3] for group in findings.identical]),
        "near-duplicates": leaks_first(findings.near_pairs()),
        "two-labels": leaks_first(findings.conflicts()),
        "empty": [[i] for i in findings.empty],
        "label-errors": [[error.position] for error in findings.label_errors],
    }


def _section(findings: Findings, name: str, title: str, text: str) -> str:
    cells = _sheets(findings)[name]
    if not cells:
        return ""
    suggested = {error.position: error for error in findings.label_errors} if name == "label-errors" else {}
    rows = []
    for number, cell in enumerate(cells[:SHOWN], 1):
        shown = "; ".join(
            f"{_escaped(p.part)} {_escaped(p.name)}, {_escaped(p.label)}" for p in map(findings.picture, cell)
        )
        error = suggested.get(cell[0])
        remark = f" → {_escaped(error.suggested)} ({error.confidence:.1%} for the label)" if error else ""
        rows.append(f"| {number} | {shown}{remark} |")
    more = f" The first {SHOWN} of {len(cells)}; audit.json has all." if len(cells) > SHOWN else ""
    table = "\n".join(["| | |", "| ---: | --- |", *rows])
    return f"## {title}\n\n{text}{more}\n\n![]({name}.png)\n\n{table}"


def _class_table(findings: Findings) -> str:
    counts = data.class_counts(findings)
    head = [f"| class | {' | '.join(counts)} |", f"| --- |{' ---: |' * len(counts)}"]
    names = findings.listing.classes
    rows = [
        f"| {_escaped(name)} | {' | '.join(str(part[name]) for part in counts.values())} |"
        for name in names[:MAX_CLASSES]
    ]
    rest = [f"\nand {len(names) - MAX_CLASSES} more classes"] if len(names) > MAX_CLASSES else []
    return "\n".join(["## Classes", "", *head, *rows, *rest])


def _unreadable(findings: Findings) -> str:
    reasons = data.unreadable(findings)
    rows = [
        f"| {len(names)} | {_escaped(reason)} | {_escaped(shortened(names, 3))} |" for reason, names in reasons.items()
    ]
    return (
        "\n".join(["## Unreadable files", "", "| files | reason | such as |", "| ---: | --- | --- |", *rows])
        if rows
        else ""
    )


def _duplicate_line(findings: Findings, kind: str, pairs: list[tuple[int, int]]) -> str:
    leaked = findings.across(pairs)
    among = {i for pair in pairs for i in pair}
    line = f"{plural(len(among), 'picture')} with {'an' if kind[0] in 'aeiou' else 'a'} {kind} partner"
    return line + "".join(f"; {count} {part} pictures have one in train" for part, count in leaked.items())


def _escaped(text: str) -> str:
    """Without the characters that Markdown and its HTML would interpret; one line."""
    line = " ".join(text.split())
    for character in "\\`*_[]<>|$#":
        line = line.replace(
            character, "\\" + character if character not in "<>" else {"<": "&lt;", ">": "&gt;"}[character]
        )
    return line
