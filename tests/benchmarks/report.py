"""Tables as Markdown and JSON, and in a document that holds them between markers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xchmv2.errors import CHMv2Error


@dataclass(frozen=True)
class Table:
    """Measured rows under a title.

    Parameters
    ----------
    part : str
        Part of the benchmark it belongs to.
    title : str
        What was measured.
    rows : sequence of mapping
        Values by column; all have the same columns, None where there is nothing to say.
    notes : str
        What the columns mean.
    """

    part: str
    title: str
    rows: Sequence[Mapping[str, Any]]
    notes: str = ""

    def to_markdown(self) -> str:
        """Format as a Markdown table under a bold title."""
        columns = list(self.rows[0])
        lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
        lines += [" | ".join(_cell(row[column]) for column in columns) for row in self.rows]
        body = "\n".join(f"| {line} |" for line in lines)
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.notes}\n" if self.notes else "")


def to_json(
    machine: Mapping[str, Any], settings: Mapping[str, Any], tables: Sequence[Table]
) -> str:
    """Write everything as JSON."""
    found = {"machine": machine, "settings": settings, "tables": [asdict(t) for t in tables]}
    return json.dumps(found, indent=2, allow_nan=False, default=float)


def to_markdown(machine: Mapping[str, Any], command: str, tables: Sequence[Table]) -> str:
    """Write tables under the machine's name and the command that measured them."""
    head = ", ".join(f"{key} {machine[key]}" for key in ("torch", "transformers", "xchmv2"))
    top = (
        f"Measured on {machine['name']}; device {machine['device']}, {machine['threads']} "
        f"threads; {head}; {machine['measured']}, load average {machine['load']}.\n\n"
        f"`{command}`\n"
    )
    return "\n".join([top, *(table.to_markdown() for table in tables)])


def update_document(path: Path, part: str, text: str) -> None:
    """Replace what a document holds between the markers of one part.

    Parameters
    ----------
    path : path
        Markdown document with ``<!-- benchmark: PART -->`` and ``<!-- end: PART -->``.
    part : str
        The part.
    text : str
        What to put there.

    Raises
    ------
    CHMv2Error
        If the markers are not there.
    """
    begin, end = f"<!-- benchmark: {part} -->", f"<!-- end: {part} -->"
    pattern = re.compile(rf"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    old = path.read_text()
    if not pattern.search(old):
        raise CHMv2Error(
            f"{begin} and {end} in {path}", "a document without them", "write both where it belongs"
        )
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", old, count=1))


def _cell(value: Any) -> str:
    """Three figures that count, whole numbers in full."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")
