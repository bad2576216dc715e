"""`yeonma chat` through a pipe and on a terminal, with tiny models."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.adapters import Folders, tiny_adapter
from tests.tokenizers import byte_level
from yeonma.cli import main
from yeonma.commands.chat_input import COMMANDS, Command, read_entry
from yeonma.errors import UserError
from yeonma.policy import Policy, load_policy


@pytest.fixture(scope="module")
def titles(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return tiny_adapter(tmp_path_factory.mktemp("titles"), byte_level())


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return tiny_adapter(tmp_path_factory.mktemp("dialogues"), byte_level(), template="chat")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def chat(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs `yeonma chat` with `text` piped in; returns its standard output."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["chat", str(folder), "--max_new_tokens", "6"]) == 0
    return capsys.readouterr().out


def on_terminal(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Runs `yeonma chat` on a terminal where `text` is typed; returns what it shows, and standard error."""
    out, err = Screen(), Screen()
    for name, stream in (("stdin", Screen(text)), ("stdout", out), ("stderr", err)):
        monkeypatch.setattr(f"sys.{name}", stream)
    assert main(["chat", str(folder), "--max_new_tokens", "6"]) == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


def answers(folder: Path, *texts: str, adapter_weights: bool = True) -> list[str]:
    policy = replace(load_policy(folder), adapter_weights=adapter_weights)
    return [policy.generate({"document": text}, max_new_tokens=6) for text in texts]


def answer_to(policy: Policy, *contents: str) -> str:
    """The answer to the last of these messages and answers of a conversation."""
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]
    return policy.generate({"messages": turns}, max_new_tokens=6)


# what is typed


def entries(text: str) -> Iterator[str | Command]:
    lines = iter(text.split("\n"))

    def read_line(label: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    while True:
        try:
            yield read_entry("", read_line)
        except EOFError:
            return


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a\nb", ["a", "b"]),
        ("a\\\nb\\\n\\\nc\nd", ["a\nb\n\nc", "d"]),
        ("a\\", ["a"]),
        ("/paste\na\\\n\n/undo\n /end\nb", ["a\\\n\n/undo", "b"]),
        ("/paste\na\nb", ["a\nb"]),
        ("a\\\n/undo\n /undo ", ["a\n/undo", Command("/undo")]),
        ("/etc/passwd\n/undo it\n/서울\n/1\n//base", ["/etc/passwd", "/undo it", "/서울", "/1", "//base"]),
        ("", [""]),
    ],
)
def test_a_line_is_a_text_a_backslash_goes_on_and_paste_takes_lines_as_they_are(
    typed: str, expected: list[str | Command]
) -> None:
    assert list(entries(typed)) == expected


@pytest.mark.parametrize(
    ("word", "cure"),
    [
        ("/rest", 'did you mean "/reset"?'),
        ("/Undo", 'did you mean "/undo"?'),
        ("/new", f"the commands are {', '.join(COMMANDS)}"),
    ],
)
def test_an_unknown_command_gets_a_suggestion(word: str, cure: str) -> None:
    with pytest.raises(UserError) as caught:
        list(entries(word))
    assert str(caught.value) == f"{word}: unknown command; {cure}; write a text like this after /paste"


# independent questions


def test_with_one_field_each_line_is_a_question(
    titles: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = answers(titles.adapter, "서울의 아침\n\n기온이", "부산")
    assert first != second
    out = chat(titles.adapter, "\n서울의 아침\\\n\\\n기온이\n\n부산", monkeypatch, capsys)
    assert out == f"{first}\n{second}\n"
    out = chat(titles.adapter, "/paste\n서울의 아침\n\n기온이\n/end\n부산\n", monkeypatch, capsys)
    assert out == f"{first}\n{second}\n"
    assert chat(titles.adapter, "/reset\n부산\n/quit\n서울\n", monkeypatch, capsys) == f"{second}\n"


def test_fields_are_read_by_name_whatever_columns_were_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training, the answer's column had the name of the prompt's field."""
    columns = {"document": "body", "title": "document"}
    folder = tiny_adapter(tmp_path, byte_level(), columns=columns).adapter
    expected = load_policy(folder).generate({"body": "서울"}, max_new_tokens=6)
    assert chat(folder, "서울\n", monkeypatch, capsys) == f"{expected}\n"


def test_several_fields_are_read_line_by_line_and_empty_ones_select_the_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_adapter(tmp_path, byte_level(), template="alpaca").adapter
    loaded = load_policy(folder)
    rows: list[Mapping[str, object]] = [{"instruction": "Add", "input": "1\n2"}, {"instruction": "Sing"}]
    expected = "".join(f"{answer}\n" for answer in loaded.generate(rows, max_new_tokens=6))
    assert chat(folder, "Add\n1\\\n2\nSing\n\n", monkeypatch, capsys) == expected
    assert chat(folder, "Dance\n/reset\nAdd\n1\\\n2\nSing", monkeypatch, capsys) == expected
    assert chat(folder, "Dance\n/undo\nAdd\n1\\\n2\nSing", monkeypatch, capsys) == expected
    assert chat(folder, "Add\n/quit\n1", monkeypatch, capsys) == ""
    shown, _ = on_terminal(folder, "Sing\n\n", monkeypatch)
    assert "instruction: input: " in shown


def test_base_switches_the_model_that_answers_and_says_which(
    titles: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tuned,), (base,) = (answers(titles.adapter, "서울", adapter_weights=use) for use in (True, False))
    assert tuned != base
    monkeypatch.setattr("sys.stdin", io.StringIO("서울\n/base\n서울\n/base\n서울\n"))
    assert main(["chat", str(titles.adapter), "--max_new_tokens", "6"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tuned}\n{base}\n{tuned}\n"
    assert f"The base model {titles.base} answers without the adapter now.\n" in captured.err
    assert f"The fine-tuned model {titles.adapter} answers again.\n" in captured.err
    monkeypatch.setattr("sys.stdin", io.StringIO("/base\n서울\n"))
    without = ["chat", str(titles.adapter), "--max_new_tokens", "6", "--adapter_weights", "false"]
    assert main(without) == 0
    assert capsys.readouterr().out == f"{tuned}\n"


def test_on_a_terminal_the_label_says_that_the_base_answers(
    titles: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, err = on_terminal(titles.adapter, "/base\n/rest\n/undo\n/help\n", monkeypatch)
    assert "Each line is a document. /help lists the commands, Ctrl-D ends.\n" in shown
    assert "[base] document: " in shown
    assert all(f"\n{name} " in shown for name in ("/paste", "/quit", "/reset", "/undo"))
    assert "Every question stands alone, so there is nothing to undo.\n" in shown
    assert '/rest: unknown command; did you mean "/reset"?' in err


# conversations


def test_a_conversation_goes_on_until_reset_and_undo_takes_an_exchange_back(
    dialogues: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = load_policy(dialogues.adapter)
    first = answer_to(policy, "서울은?")
    second = answer_to(policy, "서울은?", first, "부산은?")
    alone = answer_to(policy, "부산은?")
    assert first and second and second != alone
    typed = "서울은?\n\n부산은?\n/undo\n부산은?\n/reset\n부산은?\n/undo\n/undo\n부산은?\n"
    out = chat(dialogues.adapter, typed, monkeypatch, capsys)
    assert out == f"{first}\n{second}\n{second}\n{alone}\n{alone}\n"


def test_the_base_continues_the_conversation(
    dialogues: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = load_policy(dialogues.adapter)
    first = answer_to(policy, "서울은?")
    second = answer_to(policy.without_adapter(), "서울은?", first, "부산은?")
    assert second != answer_to(policy, "서울은?", first, "부산은?")
    out = chat(dialogues.adapter, "서울은?\n/base\n부산은?\n", monkeypatch, capsys)
    assert out == f"{first}\n{second}\n"


# faults


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("x\0y\n서울\n", 'this question: field "document" contains a NUL'),
        ("/rest\n서울\n", '/rest: unknown command; did you mean "/reset"?'),
    ],
)
def test_without_a_terminal_the_first_error_ends_the_chat(
    typed: str,
    message: str,
    titles: Folders,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["chat", str(titles.adapter), "--max_new_tokens", "2"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_template_of_whole_texts_has_nothing_to_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_adapter(tmp_path, byte_level(), template="text").adapter
    assert main(["chat", str(folder)]) == 2
    assert "the template trains whole texts, so there is no prompt to ask" in capsys.readouterr().err
