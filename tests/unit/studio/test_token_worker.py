"""Pages of rows from a file that can only be read from its beginning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from yeonma.data.rows import Row, Rows
from yeonma.studio.token_worker import SoughtRows

COUNT = 60
NUMBERS = st.lists(st.integers(1, COUNT), max_size=8, unique=True)


class Source:
    """Rows that count how many of them were read."""

    def __init__(self) -> None:
        self.read_rows = 0
        self.rows = Rows("rows", "", ("text",), self._read)

    def _read(self) -> Iterator[Row]:
        for number in range(1, COUNT + 1):
            self.read_rows += 1
            yield Row(number, {"text": str(number)}, f"rows:{number}")


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8))
def test_the_rows_that_are_asked_for_come_whatever_was_asked_before(
    requests: list[tuple[list[int], list[int]]],
) -> None:
    sought = SoughtRows(Source().rows)
    for numbers, ahead in requests:
        assert [row.number for row in sought.of(numbers, ahead)] == sorted(numbers)


def test_paging_through_a_file_reads_it_once() -> None:
    source = Source()
    sought = SoughtRows(source.rows)
    for page in range(6):
        sought.of(list(range(page * 10 + 1, page * 10 + 11)))
    assert source.read_rows == COUNT


def test_pages_in_another_order_are_read_at_once() -> None:
    source = Source()
    sought = SoughtRows(source.rows)
    order = [*range(COUNT, 0, -1)]
    for start in range(0, COUNT, 10):
        sought.of(order[start : start + 10], order[start + 10 :])
    assert source.read_rows == COUNT


def test_a_row_that_is_gone_is_left_out(tmp_path: Path) -> None:
    assert SoughtRows(Source().rows).of([COUNT, COUNT + 1])[0].number == COUNT
