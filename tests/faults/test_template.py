"""Faults of templates and of the model's chat template, numbered as in the list of faults."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.adapters import tiny_base
from tests.faults.conftest import Accepted, Refused, Write
from tests.runs import write_jsonl
from tests.tokenizers import CHATML, LLAMA2_CHAT, byte_level, sentencepiece_bpe
from yeonma.bounded import template_text

ROWS = [{"document": "a b", "title": "t"}, {"document": "c d", "title": "u"}]
TURNS = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
END = "<|endoftext|>"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", ROWS)


@pytest.fixture
def turns(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "turns.jsonl", TURNS)


def test_fault_31_unknown_field(write: Write, refused: Refused, data: Path) -> None:
    template = write("t.txt", "Of {documnt}\n{other} and {documnt}:\n{titel}")
    assert refused(data, template=template) == [
        't.txt:1:4: the data has no column "documnt"; did you mean "document"?',
        't.txt:2:1: the data has no column "other"; it has document, title',
        't.txt:3:1: the data has no column "titel"; did you mean "title"?',
    ]
    variants = write("v.txt", "{document} {note}\n{title}\n---\n{documents}\n{title}")
    assert refused(data, template=variants) == [
        'v.txt:4:1: the data has no column "documents"; did you mean "document"?'
    ]
    assert refused(data, template="{body}\n{title}", columns={"body": "docment"}) == [
        '--template:1:1: the data has no column "docment" for the field "body"; did you mean "document"?'
    ]
    assert refused(data, template="chat") == [
        'chat:2:1: the data has no column "messages"; it has document, title'
    ]


def test_fault_31_unknown_field_in_a_datasets_folder(tmp_path: Path, refused: Refused) -> None:
    from datasets import Dataset

    Dataset.from_list(ROWS[:1]).save_to_disk(str(tmp_path / "saved"))
    cure = 'the template uses documnt, title; did you mean "document"?'
    assert refused(tmp_path / "saved", template="{documnt}\n{title}") == [
        f'saved row 1: field "documnt" is missing; {cure}'
    ]


def test_fault_32_unbalanced_brace(write: Write, refused: Refused, data: Path) -> None:
    template = write("t.txt", "Of {document\n{title}}\n} {title}")
    opened, closed = 'write "{{" for a literal brace', 'write "}}" for a literal brace'
    assert refused(data, template=template) == [
        f't.txt:1:4: "{{" is not closed; {opened}',
        f't.txt:2:8: "}}" without an opening "{{"; {closed}',
        f't.txt:3:1: "}}" without an opening "{{"; {closed}',
    ]
    assert refused(data, template="{document}\n{title") == [f'--template:2:1: "{{" is not closed; {opened}']


def test_fault_33_no_field_or_only_the_answer(write: Write, refused: Refused, data: Path) -> None:
    what, cure = "the template has no field", 'name a column, such as "{document}"'
    for text in ("", "\n", "A title.\n"):
        assert refused(data, template=write("t.txt", text)) == [f"t.txt:1: {what}; {cure}"]
    doubled = write("t.txt", "{{document}} {{title}}")
    assert refused(data, template=doubled) == [f't.txt:1: {what}; write "{{document}}", with single braces']
    what, cure = "the template has an answer but no prompt", "write the prompt before the answer"
    for text in ("{title}", "\n  \n{title}\n"):
        assert refused(data, template=write("t.txt", text)) == [f"t.txt:1: {what}; {cure}"]
    turns = write("t.txt", "[assistant]\n{title}\n")
    assert refused(data, template=turns) == [f"t.txt:1: {what}; add a [user] turn before it"]
    variants = write("t.txt", "{document}\n{title}\n---\n{title}")
    assert refused(data, template=variants) == [f"t.txt:4: {what}; {cure}"]


def test_fault_34_the_answer_field_in_the_prompt(write: Write, refused: Refused, data: Path) -> None:
    what = 'the prompt shows "title", which is the answer (the last field)'
    cure = "remove it from the prompt, or the model learns to copy it"
    for text, place in {
        "Of {title}: {document}\n{title}": "1:4",
        "[user]\n{document} {title}\n[assistant]\n{title}": "2:12",
        "{document}\n{title}\n---\n{title}{title}": "4:1",
    }.items():
        assert refused(data, template=write("t.txt", text)) == [f"t.txt:{place}: {what}; {cure}"]
    through_columns = refused(data, template="{body}\n{title}", columns={"body": "title"})
    assert through_columns == [
        '--columns: the column "title" is the answer and also the prompt field "body"; '
        "the prompt must not show the answer"
    ]


def test_fault_35_braces_in_the_data(write: Write, accepted: Accepted) -> None:
    document, title = "{title} {{x}} {0} }{ {document!r} {% raw %}", "{document} {{}} %s"
    data = write_jsonl(write("a.jsonl", ""), [{"document": document, "title": title}])
    assert accepted(data, template="{{{document}}}\n{title}").texts == [
        (f"{{{document}}}\n", f"{title}{END}")
    ]
    in_turns = "[user]\n{document}\n[assistant]\n{title}"
    assert accepted(data, template=in_turns).texts == [
        (f"<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n", f"{title}<|im_end|>")
    ]


def test_fault_36_crlf_line_ends(write: Write, accepted: Accepted, data: Path) -> None:
    with_lf = "Of\n\n{document}:\n{title}\n---\n{document}\n{title}\n"
    for line_end in ("\r\n", "\r"):
        template = write("t.txt", "\ufeff" + with_lf.replace("\n", line_end))
        taken = accepted(data, template=template)
        assert taken.texts == [("Of\n\na b:\n", f"t{END}"), ("Of\n\nc d:\n", f"u{END}")]
        assert (taken.done.folder / "template.txt").read_bytes() == with_lf.encode()
    in_turns = "[user]\r\n{document}\r\n[assistant]\r\n{title}\r\n"
    assert accepted(data, template=in_turns).texts[0][0].startswith("<|im_start|>user\na b<|im_end|>")


@pytest.mark.parametrize("code", ["200B", "200C", "200D", "FEFF", "2060"])
def test_fault_37_a_zero_width_character_in_a_field(
    write: Write, refused: Refused, data: Path, code: str
) -> None:
    hidden = chr(int(code, 16))
    template = write("t.txt", f"Of {{docu{hidden}ment}}\n{{title{hidden}}}")
    assert refused(data, template=template) == [
        f't.txt:1:4: the field name "docuU+{code}ment" contains an invisible character; delete it',
        f't.txt:2:1: the field name "titleU+{code}" contains an invisible character; delete it',
    ]


CODE = ("document.__class__", "document[0]", "document.title", "0", "", "document!r", "document:>9", "7*7")


def test_fault_38_code_in_a_template(write: Write, refused: Refused, accepted: Accepted, data: Path) -> None:
    text = "\n".join(f"{{{code}}}" for code in CODE)
    lines = refused(data, template=write("t.txt", f"{text}\n{{document}}\n{{title}}"))
    assert len(lines) == len(CODE)
    for number, (line, code) in enumerate(zip(lines, CODE, strict=True), start=1):
        assert line.startswith(f't.txt:{number}:1: "{{{code}}}" is not a field: ')
        assert line.endswith('; write "{{" and "}}" for literal braces')
    literal = "{{''.__class__}} {{7*7}} {{document}} ${{x}} {{% if %}} %(document)s\n{document}:\n{title}"
    expected = "{''.__class__} {7*7} {document} ${x} {% if %} %(document)s\na b:\n"
    assert accepted(data, template=write("t.txt", literal)).texts[0] == (expected, f"t{END}")


LOOPING_TEMPLATES = {
    "for": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "after the first row": "{% if 'q' in messages[0].content %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}" + CHATML,
}


@pytest.mark.parametrize("loop", LOOPING_TEMPLATES)
def test_fault_39_a_chat_template_that_loops(
    tmp_path: Path, refused: Refused, turns: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    assert template_text.CHAT_TEMPLATE.seconds <= 10
    short = replace(template_text.CHAT_TEMPLATE, seconds=0.3)
    monkeypatch.setattr(template_text, "CHAT_TEMPLATE", short)
    base = tiny_base(tmp_path / "model", byte_level(LOOPING_TEMPLATES[loop]))
    threads = threading.active_count()
    (line,) = refused(turns, base_model=base, template=None)
    place = "chat template" if loop == "for" else "turns.jsonl:1"
    what = "the model's chat template did not end within 0.3 seconds"
    assert line == f"{place}: {what}; use a template without turns"
    assert threading.active_count() == threads  # no thread goes on rendering


FORBIDDEN = {
    "{% include 'secret.txt' %}": "no loader for this environment",
    "{% import 'secret.txt' as found %}{{ found }}": "no loader for this environment",
    "{% extends 'secret.txt' %}": "no loader for this environment",
    "{{ open('secret.txt').read() }}": "'open' is undefined",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "'__class__' of 'str' object is unsafe",
    "{{ cycler.__init__.__globals__.os.listdir('.') }}": "'__init__' of 'type' object is unsafe",
    "{{ messages.append(1) }}": "'append' of 'list' object is unsafe",
    "{% for a in range(10 ** 9) %}{% endfor %}": "Range too big",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "it is nested too deeply",
    "{% if %}": "Expected an expression",
}


@pytest.mark.parametrize("expression", FORBIDDEN)
def test_fault_39_a_chat_template_that_uses_files_or_python_internals(
    tmp_path: Path,
    write: Write,
    refused: Refused,
    turns: Path,
    monkeypatch: pytest.MonkeyPatch,
    expression: str,
) -> None:
    write("secret.txt", "hush")
    monkeypatch.chdir(tmp_path)
    base = tiny_base(tmp_path / "model", byte_level(expression + CHATML))
    (line,) = refused(turns, base_model=base, template=None)
    assert line.startswith("turns.jsonl:1: the model's chat template refuses this row: ")
    assert FORBIDDEN[expression] in line
    assert line.endswith("; change the row's turns, or use a template without turns")
    assert "hush" not in line


def test_fault_40_two_bos_tokens(tmp_path: Path, accepted: Accepted, data: Path, turns: Path) -> None:
    tokenizer = sentencepiece_bpe(chat_template="{{ bos_token }}" + LLAMA2_CHAT)
    base = tiny_base(tmp_path / "model", tokenizer)
    for table, template in (
        (turns, None),
        (data, "[user]\n{document}\n[assistant]\n{title}"),
        (data, "<s>{document}\n{title}"),
        (data, "<s><s>{document}\n{title}"),
    ):
        taken = accepted(table, base_model=base, template=template)
        for index in range(len(taken.prepared.dataset.train.store)):
            ids = taken.prepared.dataset.train.store[index].token_ids.tolist()
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1


def test_fault_41_no_variant_fits_a_row(write: Write, refused: Refused, accepted: Accepted) -> None:
    template = write("t.txt", "{a} {b}\n{title}\n---\n{a} {c}\n{title}")
    rows = [{"a": "1", "b": "2", "title": "x"}, {"a": "3", "c": "4", "title": "y"}]
    bad: list[dict[str, object]] = [{"a": "5", "title": "z"}, {"a": "", "b": "6", "c": " ", "title": "z"}]
    data = write_jsonl(write("a.jsonl", ""), [*rows, *bad])
    assert refused(data, template=template) == [
        'a.jsonl:3: field "c" is missing; the template uses a, c, title',
        'a.jsonl:4: field "a" is empty; the template uses a, b, title',
    ]
    good = write_jsonl(write("b.jsonl", ""), rows)
    assert [prompt for prompt, _ in accepted(good, template=template).texts] == ["1 2\n", "3 4\n"]


def test_unreadable_template_is_reported_with_its_name(
    tmp_path: Path, write: Write, refused: Refused, data: Path
) -> None:
    cure = "the built-in templates are title, alpaca, alpaca-turns, orca, chat, prompt-completion, "
    cure += "prompt-completion-turns, text"
    write("title.txt", "{document}\n{title}")
    missing = tmp_path / "titel.txt"
    (line,) = refused(data, template=missing)
    assert line.startswith(
        f'--template: no built-in template and no file is named "titel.txt"; {cure}; did you'
    )
    cp949 = write("t.txt", "of\n제목 {document}\n{title}".encode("cp949"))
    assert refused(data, template=cp949) == ["t.txt:2: is not UTF-8; save the template as UTF-8"]
    os.mkfifo(tmp_path / "pipe")
    assert refused(data, template=tmp_path / "pipe") == [
        "pipe: is not a file; give a template file, a template text or a built-in name"
    ]


def test_turns_without_a_chat_template_are_refused(refused: Refused, turns: Path) -> None:
    what = "the model's tokenizer has no chat template, which templates with turns need"
    (line,) = refused(turns, template=None)
    assert what in line and line.endswith("or the model's instruction-tuned version")


def test_several_faults_of_a_template_are_reported_together(
    write: Write, refused: Refused, data: Path
) -> None:
    lines = refused(data, template=write("t.txt", "{document.x} {\n{titl\u200be}"))
    assert [line.partition(": ")[0] for line in lines] == ["t.txt:1:1", "t.txt:1:14", "t.txt:2:1"]
