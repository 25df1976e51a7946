"""Formatting of everything that is printed: tables, bytes, seconds, the operator's name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]], *, left: Collection[int] = ()) -> list[str]:
    """Rows of cells as lines, with each column as wide as its longest cell.

    Two spaces come before the first column and between columns.

    Args:
      rows: lists of cells, all of the same length. The first row is usually the header.
      left: numbers of the columns that are aligned to the left. All others are aligned to the
        right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def pad(index: int, cell: str) -> str:
        return cell.ljust(widths[index]) if index in left else cell.rjust(widths[index])

    lines = ["  " + "  ".join(pad(*pair) for pair in enumerate(row)) for row in rows]
    return [line.rstrip() for line in lines]


def named_rows(rows: Mapping[str, str | None]) -> list[str]:
    """Pairs of a name and a text as lines of a table; pairs without a text are left out."""
    shown = [(name, text) for name, text in rows.items() if text]
    return table(shown, left={0, 1}) if shown else []


def of_operator(description: Mapping[str, Any]) -> str:
    """The operator of a result in words, such as ``of a Hessian``, from its description."""
    kind = description.get("operator", {}).get("kind", "operator")
    return f"of {'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: ``1 product``, ``2 products``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float) -> str:
    """A number of bytes with its unit, to three digits."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def format_seconds(seconds: float) -> str:
    """A time with its unit, to three digits."""
    for limit, divisor, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"
