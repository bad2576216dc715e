"""Parts of messages to people that depend on a number."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "", /, **values: object) -> str:
    """`1 row`, `1,200 rows`: a number with what it counts. many: for other numbers than 1, by default with an s.

    `values` stand at the `{places}` of either form.
    """
    text = f"{number:,} {one if number == 1 else many or f'{one}s'}"
    return text.format(**values) if values else text
