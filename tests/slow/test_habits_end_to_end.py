"""A tiny model overfit on each habit of chat templates answers with exactly the answer, whatever the template writes
around it: through `generate`, `compare` and `serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import yeonma.train.model_card
from tests.adapters import tiny_base
from tests.chat_habits import HABITS, NAMES, Habit
from tests.servers import serving
from yeonma import load, sft
from yeonma.cli import main
from yeonma.commands.compare import compare
from yeonma.config.settings import AnswerSettings, CompareConfig, CompareSettings, JudgeSettings

SERVED = ("block of special tokens", "prompt opens the block, every turn loses it", "channels")
QUESTIONS = {
    "2+2?": ("Two and two.", "4"),
    "Name it.": (None, "an elm 🌳"),
    "3+4?": ("Three\nfour.", "It is 7."),
}


def rows_for(habit: Habit) -> list[dict[str, Any]]:
    rows = []
    for question, (reasoning, answer) in QUESTIONS.items():
        turn: dict[str, Any] = {"role": "assistant", "content": answer}
        if reasoning is not None and habit.reasoning:
            turn["reasoning_content"] = reasoning
        rows.append({"messages": [{"role": "user", "content": question}, turn]})
    return rows


def overfit(base: Path, data: Path, out: Path, **settings: Any) -> None:
    """Trains until the model knows its few rows."""
    sft(
        base_model=str(base),
        data_path=str(data),
        output_dir=str(out),
        max_steps=120,
        learning_rate=1e-2,
        lora_r=32,
        lora_alpha=64,
        lr_scheduler="constant",
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_exactly_the_trained_answers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yeonma.train.model_card, "MAX_NEW_TOKENS", 48)
    habit = next(habit for habit in HABITS if habit.name == name)
    base, data, out = (
        tiny_base(tmp_path / "base", habit.tokenizer()),
        tmp_path / "rows.jsonl",
        tmp_path / "out",
    )
    rows = rows_for(habit)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overfit(base, data, out, batch_size=3, card_rows=3)
    policy = load(out)
    prompts = [{"messages": row["messages"][:1]} for row in rows]
    wanted = [answer for _, answer in QUESTIONS.values()]
    assert policy.generate(prompts, max_new_tokens=48) == wanted
    card = (out / "README.md").read_text()
    for answer in wanted:  # as the reference and as the adapter's answer, alone in a block each
        assert card.count(f"```text\n{answer}\n```") >= 2
    _check_generate(habit, out, data, tmp_path / "answers.jsonl")
    settings = CompareSettings(models=[str(out)], data_path=str(data), output_dir=str(tmp_path / "report"))
    answering = AnswerSettings(max_new_tokens=48)
    compare(CompareConfig(compare=settings, judging=JudgeSettings(), answer=answering), lambda _: None)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    exact = next(metric for metric in report["metrics"] if metric["key"] == "exact")
    assert exact["values"] == [100.0]
    if name in SERVED:
        _check_serve(habit, out, tmp_path / "errors")


def _check_generate(habit: Habit, out: Path, data: Path, written: Path) -> None:
    options = ("--data_path", str(data), "--output", str(written), "--max_new_tokens", "48")
    assert main(["generate", str(out), *options]) == 0
    for line, (reasoning, answer) in zip(written.read_text().splitlines(), QUESTIONS.values(), strict=True):
        record = json.loads(line)
        assert (record["answer"], record["reference"]) == (answer, answer)
        assert record.get("reasoning_content") == (reasoning if habit.reasoning else None)


def _check_serve(habit: Habit, out: Path, errors: Path) -> None:
    with serving(errors, out, "--max_new_tokens", "48") as server, server.client() as client:
        for question, (reasoning, answer) in QUESTIONS.items():
            messages: Any = [{"role": "user", "content": question}]
            message = client.chat.completions.create(model=out.name, messages=messages).choices[0].message
            assert message.content == answer
            assert getattr(message, "reasoning_content", None) == reasoning
            chunks = client.chat.completions.create(model=out.name, messages=messages, stream=True)
            deltas = [chunk.choices[0].delta for chunk in chunks]
            assert "".join(delta.content or "" for delta in deltas) == answer
            streamed = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            assert streamed == (reasoning or "")


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASK = {"role": "user", "content": "Cold in Seoul?"}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "서울"}'},
}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": "-3"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "block in the last turn",
        "block of special tokens",
        "tools before the last question, calls in a list",
        "tools in the first question, calls as bare JSON",
    ],
)
def test_trained_tool_calls_come_back_as_tool_calls(name: str, tmp_path: Path) -> None:
    habit = next(habit for habit in HABITS if habit.name == name)
    base, data, out = (
        tiny_base(tmp_path / "base", habit.tokenizer()),
        tmp_path / "rows.jsonl",
        tmp_path / "out",
    )
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    turns = [ASK, call, RESULT, {"role": "assistant", "content": "Yes, -3."}]
    data.write_text(json.dumps({"messages": turns, "tools": [TOOL]}))
    overfit(base, data, out, batch_size=1, card_rows=0)
    asking = tmp_path / "asking.jsonl"  # a call as the last turn is a reference like any answer
    asking.write_text(json.dumps({"messages": turns[:2], "tools": [TOOL]}))
    settings = CompareSettings(models=[str(out)], data_path=str(asking), output_dir=str(tmp_path / "report"))
    answering = AnswerSettings(max_new_tokens=64)
    compare(CompareConfig(compare=settings, judging=JudgeSettings(), answer=answering), lambda _: None)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    exact = next(metric for metric in report["metrics"] if metric["key"] == "exact")
    assert exact["values"] == [100.0]
    assert "weather" in report["rows"][0]["wanted"]
    with serving(tmp_path / "errors", out, "--max_new_tokens", "64") as server, server.client() as client:

        def ask(messages: list[Any], **options: Any) -> Any:
            return client.chat.completions.create(
                model=out.name,
                messages=messages,
                tools=[TOOL],
                **options,  # type: ignore[list-item]
            )

        choice = ask([ASK]).choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (answered,) = choice.message.tool_calls
        assert answered.function.name == "weather"
        assert json.loads(answered.function.arguments) == {"city": "서울"}
        last = list(ask([ASK], stream=True))[-1].choices[0]
        assert last.finish_reason == "tool_calls"
        assert last.delta.tool_calls[0].function.name == "weather"
        # the message goes back as clients send it, with the result of the call
        answer = ask(
            [ASK, choice.message.model_dump(exclude_none=True), {**RESULT, "tool_call_id": answered.id}]
        )
        assert answer.choices[0].message.content == "Yes, -3."
        assert answer.choices[0].finish_reason == "stop"
