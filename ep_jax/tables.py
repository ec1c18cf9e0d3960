"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def spaced(values: Iterable[float], digits: int = 2) -> str:
    """Numbers side by side, as those of the layers.

    Args:
        values: the numbers.
        digits: digits after the point.

    Example:
        >>> spaced([0.125, 1.0], 1)
        '0.1 1.0'
    """
    return " ".join(f"{value:.{digits}f}" for value in values)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown.

    Args:
        head: names of the columns.
        rows: cells; a vertical bar in a text is escaped.

    Example:
        >>> print(markdown(("error", "seeds"), [("1.2 %", 3)]), end="")
        | error | seeds |
        | --- | --- |
        | 1.2 % | 3 |
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [list(head), ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
