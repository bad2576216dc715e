"""Answers come back with the blanks and line ends that were trained, whatever the chat template writes around them."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest

from tests.chat_habits import HABITS, NAMES, Habit
from yeonma.adapter.prompt_builder import Prompt
from yeonma.data.rows import Row
from yeonma.data.template import load_template
from yeonma.data.text_checks import TRIMMED
from yeonma.generation.completion import continued_text
from yeonma.serve.stream_buffer import StreamBuffer
from yeonma.tokenization.example import Example, TokenRules, answer_tokens, end_of_prompt
from yeonma.tokenization.example_encoder import encode

RULES = TokenRules(cutoff_len=4096)
CONTENTS = ("  if x:\n\ty()\n", "\n\nlate", "ends  ", "\r\na\r\n", "plain", "\t1\n\n\n")


def trained_text(
    habit: Habit, content: str, reasoning: str | None = None
) -> tuple[Prompt, list[str], Example]:
    """The prompt, what a model generates that has learned the row, growing by tokens, and the example."""
    turn = {"role": "assistant", "content": content}
    turn |= {"reasoning_content": reasoning} if reasoning else {}
    row = Row(1, {"messages": [{"role": "user", "content": "q"}, turn]}, "data:1")
    tokenizer = habit.tokenizer()
    (example,) = encode([load_template("chat").render(row)], [row], tokenizer, RULES)
    assert isinstance(example, Example)
    tokens = answer_tokens(tokenizer, RULES)
    prompt = example.token_ids[: example.prompt_length].tolist()
    answer = example.token_ids[example.prompt_length :].tolist()
    end = next(at for at, number in enumerate(answer) if number in tokens.stop_ids)
    texts = [
        continued_text(tokenizer, prompt, answer[:count], tokens.shown_ids) for count in range(1, end + 1)
    ]
    is_open = tokens.shape.opens(end_of_prompt(prompt, tokenizer))
    ids = np.array(prompt, dtype=np.int32)
    return (
        Prompt(ids, frame=("", tokens.shape.trail), shape=tokens.shape, opens_reasoning=is_open),
        texts,
        example,
    )


def check(habit: Habit, content: str, reasoning: str | None = None) -> None:
    prompt, texts, example = trained_text(habit, content, reasoning)
    answer = prompt.answer(texts[-1] if texts else "")
    assert answer in (content, content.strip("\n"), content.lstrip("\n"), content.strip())
    assert (answer != content) == bool(example.flags & TRIMMED)
    buffer = StreamBuffer(prompt)
    pieces = [buffer.new_text(text) for text in texts]
    pieces.append(buffer.remaining_text(texts[-1] if texts else ""))
    assert "".join(pieces) == answer
    grown = list(accumulate(pieces))
    assert all(answer.startswith(text) for text in grown)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", NAMES)
def test_an_answer_comes_back_as_it_was_trained(name: str, content: str) -> None:
    check(next(habit for habit in HABITS if habit.name == name), content)


@pytest.mark.parametrize("content", ("  if x:\n\ty()\n", "plain", "ends  "))
@pytest.mark.parametrize("name", [habit.name for habit in HABITS if habit.reasoning])
def test_an_answer_after_reasoning_comes_back_as_it_was_trained(name: str, content: str) -> None:
    check(next(habit for habit in HABITS if habit.name == name), content, "Two and\ntwo")


def test_templates_that_keep_blanks_train_them() -> None:
    """Of the templates of these tests, most write contents as they are."""
    kept = [habit.name for habit in HABITS if not trained_text(habit, "  if x:\n\ty()\n")[2].flags & TRIMMED]
    assert {"chatml", "system of its own", "block of special tokens"} <= set(kept)
    assert "brackets" not in kept
