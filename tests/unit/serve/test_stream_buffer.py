"""Text shown while an answer grows: what is shown by the end is the answer, whatever the steps it came in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yeonma.adapter.prompt_builder import Prompt
from yeonma.serve.stream_buffer import StreamBuffer

TEXT = st.text("ab# \n", max_size=12)
FRAME = st.text("ab# \n", max_size=4)
STOPS = st.lists(st.text("ab# \n", min_size=1, max_size=3), max_size=3)


def question(frame: tuple[str, str] = ("", ""), is_turn: bool = False) -> Prompt:
    return Prompt(np.zeros(1, dtype=np.int32), is_turn=is_turn, frame=frame)


def shown(said: StreamBuffer, parts: Sequence[str]) -> list[str]:
    """What is shown after each part but the last, and at the end."""
    found = []
    for text in accumulate(parts):
        if said.stopped_at(text) is not None:
            return [*found, said.rest(text)]
        found.append(said.more(text))
    return [*found, said.rest("".join(parts))]


@given(st.lists(TEXT, max_size=6), FRAME, FRAME, STOPS, st.booleans())
def test_what_was_shown_is_the_answer(
    parts: list[str], before: str, after: str, stops: list[str], is_turn: bool
) -> None:
    asked = question((before, after), is_turn)
    whole = "".join(parts)
    pieces = shown(StreamBuffer(asked, stops), parts)
    assert "".join(pieces) == StreamBuffer(asked, stops).whole(whole)
    if not stops:
        assert "".join(pieces) == asked.answer(whole)


@pytest.mark.parametrize(
    ("parts", "pieces"),
    [
        (["Storm", " closes", " harbour"], ["Storm", " closes", " harbour", ""]),
        (["Storm\n", "#", "## end", " not"], ["Storm", "", "", "\n### end not", ""]),
        (["Storm\n", "#", "## end"], ["Storm", "", "", ""]),
        (["Storm \n### end", "\n"], ["Storm", "", ""]),
        (["St\ufffd", "\ufffd"], ["St", "", "\ufffd\ufffd"]),
    ],
)
def test_only_what_may_be_the_frames_waits(parts: list[str], pieces: list[str]) -> None:
    assert shown(StreamBuffer(question(("", "\n### end\n"))), parts) == pieces


def test_the_first_stop_text_ends_it() -> None:
    asked = question(("Title: ", ""))
    assert StreamBuffer(asked, ["it", "xy", "x"]).whole("Title: Storm wxyz") == "Storm w"
    assert shown(StreamBuffer(asked, ["xyz"]), ["Title:", " Storm", " xy", "z and"]) == ["", "Storm", "", ""]
    assert shown(StreamBuffer(asked, ["xyz"]), ["Title:", " Storm", " xy", "w"]) == [
        "",
        "Storm",
        "",
        " xyw",
        "",
    ]
