"""What the run's summary says about the chat template: the text that it adds, the keys that it ignores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chat_habits import HABITS, Habit
from tests.tokenizers import byte_level
from yeonma.data.rows import Row, Rows
from yeonma.data.task import ANSWERS, PAIRS, Task
from yeonma.data.template import load_template
from yeonma.tokenization.cache import build_store
from yeonma.tokenization.dataset import data_warnings
from yeonma.tokenization.example import TokenRules

BY_NAME = {habit.name: habit for habit in HABITS}
CHATML = BY_NAME["chatml"]
DROPS_EARLIER = BY_NAME["block in the last turn"]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
NAMED_TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'tool' %}{{ ' ' + (m.name or 'any') }}"
    "{% endif %}{{ '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = (
    "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '.\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turn(role: str, content: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def said(
    folder: Path,
    rows: list[dict[str, Any]],
    template: str | Habit,
    task: Task = ANSWERS,
    positions: list[int] | None = None,
    **rules: Any,
) -> dict[str, tuple[int, ...]]:
    """What is said about the chat template -> the rows."""
    tokenizer = byte_level(template) if isinstance(template, str) else template.tokenizer()
    data = [Row(number, values, f"data:{number}") for number, values in enumerate(rows, 1)]
    store = build_store(
        Rows("data", repr(rows), tuple(rows[0]), lambda: iter(data)),
        load_template("chat"),
        None,
        tokenizer,
        TokenRules(4096, **rules),
        folder,
        task=task,
    )
    chosen = np.arange(len(store)) if positions is None else np.array(positions)
    kinds = ("own_system", "beside_system", "ignored")
    return {note.what: note.rows for note in data_warnings(store, chosen) if note.kind in kinds}


def chat(*turns: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


ASKED, ANSWERED = turn("user", "q"), turn("assistant", "a")


def test_a_system_prompt_of_the_templates_own_is_said_with_the_rows_that_get_it(tmp_path: Path) -> None:
    rows = [chat(turn("system", "S"), ASKED, ANSWERED), chat(ASKED, ANSWERED), chat(ASKED, ANSWERED)]
    habit = BY_NAME["system of its own"]
    line = 'the chat template adds a system prompt of its own, "You are kind."'
    assert said(tmp_path, rows, habit) == {line: (2, 3)}
    assert said(tmp_path, rows, habit, positions=[0, 2]) == {line: (3,)}
    assert said(tmp_path, rows[:1] * 2, habit) == {}


@pytest.mark.parametrize(
    "habit",
    [habit for habit in HABITS if "system" not in habit.name and "tool_list" not in habit.template],
    ids=lambda h: h.name,
)
def test_templates_without_a_system_prompt_of_their_own_say_nothing(tmp_path: Path, habit: Habit) -> None:
    rows = [chat(ASKED, ANSWERED), *([chat(turn("system", "S"), ASKED, ANSWERED)] if habit.system else [])]
    assert said(tmp_path, rows, habit) == {}


def test_text_that_stands_beside_the_rows_own_system_prompt_is_said_too(tmp_path: Path) -> None:
    rows = [chat(turn("system", "S"), ASKED, ANSWERED), chat(ASKED, ANSWERED)]
    date = "Today is 26 July 2024."
    assert said(tmp_path, rows, DATED) == {
        f'the chat template adds text of its own to the system prompt, "{date}"': (1,),
        f'the chat template adds a system prompt of its own, "{date}"': (2,),
    }


def test_a_long_system_prompt_is_shortened_and_its_control_characters_are_shown(tmp_path: Path) -> None:
    template = f"{{{{ 'Be\u200b kind. {'x' * 200}\n' }}}}" + CHATML.template
    (line,) = said(tmp_path, [chat(ASKED, ANSWERED)], template)
    assert "Be" + "U+200B kind. xxx" in line and line.endswith('x..."') and len(line) < 180


def test_keys_that_the_template_ignores_are_said_by_role(tmp_path: Path) -> None:
    rows = [
        chat(turn("user", "q", name="kim"), turn("assistant", "a", citations=[{"url": "x"}], note="")),
        chat(ASKED, ANSWERED, turn("tool", "r", name="look", tool_call_id="1"), ANSWERED),
        chat(turn("user", "q", name="lee", id="7"), ANSWERED),
    ]
    user, cited = (
        f'the chat template ignores the key "{key}" of {role} turns'
        for key, role in (("name", "user"), ("citations", "assistant"))
    )
    assert said(tmp_path, rows, NAMED_TOOLS) == {cited: (1,), user: (1, 3)}
    assert said(tmp_path, rows, CHATML) == {
        cited: (1,),
        'the chat template ignores the key "name" of tool turns': (2,),
        user: (1, 3),
    }


def test_a_key_that_is_read_only_in_some_rows_is_not_called_ignored(tmp_path: Path) -> None:
    template = CHATML.template.replace(
        "{{ '<|im_start|>' + m.role", "{{ ('loud' if m.mood == 'loud' else '') + '<|im_start|>' + m.role", 1
    )
    rows = [chat(turn("user", "q", mood=mood), ANSWERED) for mood in ("calm", "calm", "loud")]
    assert said(tmp_path / "a", rows, template) == {}
    ignored = 'the chat template ignores the key "mood" of user turns'
    assert said(tmp_path / "b", rows[:2], template) == {ignored: (1, 2)}


def test_a_default_that_equals_the_rows_value_is_not_called_ignored(tmp_path: Path) -> None:
    rows = [chat(ASKED, ANSWERED, turn("tool", "r", name="any"), ANSWERED)]
    assert said(tmp_path, rows, NAMED_TOOLS) == {}


def test_weights_and_keys_without_meaning_are_never_called_ignored(tmp_path: Path) -> None:
    answer = turn("assistant", "a", weight=1, id="x", refusal=None, annotations=[])
    assert said(tmp_path, [chat(ASKED, answer)], CHATML) == {}


def test_reasoning_of_earlier_turns_that_the_template_drops_is_said(tmp_path: Path) -> None:
    reasoned = turn("assistant", "a", reasoning_content="because")
    in_text = turn("assistant", "<think>\nbecause\n</think>\n\na")
    rows = [
        chat(ASKED, reasoned, ASKED, reasoned),
        chat(ASKED, in_text, ASKED, ANSWERED),
        chat(ASKED, ANSWERED, ASKED, reasoned),
    ]
    line = "the chat template does not show the reasoning of earlier turns"
    assert said(tmp_path, rows, DROPS_EARLIER) == {line: (1, 2)}
    assert said(tmp_path, rows, DROPS_EARLIER, thinking="drop") == {}
    assert said(tmp_path, rows, BY_NAME["block without line breaks in every turn"]) == {}


def test_tools_and_calls_are_said_only_where_the_template_ignores_them(tmp_path: Path) -> None:
    call = {"type": "function", "id": "1", "function": {"name": "look", "arguments": {"at": "x"}}}
    called = turn("assistant", None, tool_calls=[call], weight=0)
    rows = [chat(ASKED, called, turn("tool", "r"), ANSWERED, tools=[TOOL])]
    assert said(tmp_path, rows, DROPS_EARLIER) == {}
    without = [{"messages": rows[0]["messages"]}]
    calls = "the chat template ignores tool calls of earlier turns"
    assert said(tmp_path, without, CHATML) == {calls: (1,)}
    reads_tools = CHATML.template + "{% if tools and false %}x{% endif %}"
    tools = "the chat template ignores the tools that rows offer"
    assert said(tmp_path, rows, reads_tools) == {calls: (1,), tools: (1,)}


def test_many_kinds_of_keys_are_all_named(tmp_path: Path) -> None:
    rows = [chat(turn("user", "q", **{f"key{number:02}": "v"}), ANSWERED) for number in range(20)]
    found = said(tmp_path, rows, CHATML)
    assert len(found) == 15 and all(any(f"key{number:02}" in line for line in found) for number in range(20))


def test_keys_of_pairs_are_said(tmp_path: Path) -> None:
    named = turn("user", "q", name="kim")
    rows = [{"chosen": [named, ANSWERED], "rejected": [named, turn("assistant", "b")]}]
    line = 'the chat template ignores the key "name" of user turns'
    assert said(tmp_path, rows, CHATML, PAIRS) == {line: (1,)}
