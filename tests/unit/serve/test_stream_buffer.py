"""Text streamed while an answer grows: the pieces join to the answer, however it is split."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from yeonma.adapter.prompt_builder import Prompt
from yeonma.serve.stream_buffer import StreamBuffer

TEXT = st.text("ab# \n", max_size=12)
FRAME = st.text("ab# \n", max_size=4)
STOPS = st.lists(st.text("ab# \n", min_size=1, max_size=3), max_size=3)


def prompt_with(frame: tuple[str, str] = ("", "")) -> Prompt:
    return Prompt(np.zeros(1, dtype=np.int32), frame=frame)


def streamed(buffer: StreamBuffer, parts: Sequence[str]) -> list[str]:
    """What is sent after every part, and at the end."""
    sent = []
    for text in accumulate(parts):
        if buffer.is_stopped(text):
            return [*sent, buffer.remaining_text(text)]
        sent.append(buffer.new_text(text))
    return [*sent, buffer.remaining_text("".join(parts))]


@example(parts=["b", "b", "a"], before="bb", after="", stops=["b"])
@example(parts=["a#", "b"], before="", after="", stops=["#", "a#b"])
@given(st.lists(TEXT, max_size=6), FRAME, FRAME, STOPS)
def test_streamed_pieces_join_to_the_answer(
    parts: list[str], before: str, after: str, stops: list[str]
) -> None:
    prompt = prompt_with((before, after))
    whole = "".join(parts)
    pieces = streamed(StreamBuffer(prompt, stops), parts)
    assert "".join(pieces) == StreamBuffer(prompt, stops).answer(whole)
    if not stops:
        assert "".join(pieces) == prompt.answer(whole)


@pytest.mark.parametrize(
    ("parts", "pieces"),
    [
        (["Storm", " closes", " harbour"], ["Storm", " closes", " harbour", ""]),
        (["Storm\n", "#", "## end", " not"], ["Storm", "", "", "\n### end not", ""]),
        (["Storm\n", "#", "## end", "\n"], ["Storm", "", "", "", ""]),
        (["Storm\n", "#", "## end"], ["Storm", "", "", "\n### end"]),
        (["  Storm  ", "\n\n"], ["  Storm  ", "\n", "\n"]),
        (["St\ufffd", "\ufffd"], ["St\ufffd", "\ufffd", ""]),
    ],
)
def test_only_possible_frame_text_is_held_back(parts: list[str], pieces: list[str]) -> None:
    assert streamed(StreamBuffer(prompt_with(("", "\n### end\n"))), parts) == pieces


def test_the_first_stop_text_ends_the_answer() -> None:
    prompt = prompt_with(("Title: ", ""))
    assert StreamBuffer(prompt, ["it", "xy", "x"]).answer("Title: Storm wxyz") == "Storm w"
    assert streamed(StreamBuffer(prompt, ["xyz"]), ["Title:", " Storm", " xy", "z and"]) == [
        "",
        "Storm",
        " ",
        "",
    ]
    assert streamed(StreamBuffer(prompt, ["xyz"]), ["Title:", " Storm", " xy", "w"]) == [
        "",
        "Storm",
        " ",
        "xyw",
        "",
    ]
