"""The Modelfile: Ollama's prompt is the trained one, and answers end where they should."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from tests.tokenizers import byte_level, sentencepiece_bpe
from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.export.ollama_modelfile import modelfile
from yeonma.tokenization.chat_template_export import full_prompt_ids
from yeonma.tokenization.example import stop_ids
from yeonma.tokenization.text_encoder import TextEncoder

ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def go(text: str, values: Mapping[str, str]) -> str:
    """Go's text/template, for the actions that occur: fields, raw strings, if with else."""
    out, shown = "", [True]
    parts = ACTION.split(text)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            assert "{{" not in part
            out += part if all(shown) else ""
        elif part.startswith("if ."):
            shown.append(bool(values.get(part[4:], "")))
        elif part == "else":
            shown[-1] = not shown[-1]
        elif part == "end":
            shown.pop()
        elif all(shown):
            out += part[1:-1] if part[0] == "`" else values.get(part[1:], "")
    assert shown == [True]
    return out


def template_in(text: str) -> str:
    """The TEMPLATE of a Modelfile: the text between triple quotes."""
    return text.partition('TEMPLATE """')[2].partition('"""')[0]


TEMPLATES = {
    "title": load_template("title").text,
    "braces": 'a {{ b {{{{ c "quoted" }}\n{document} {{\n{title}\n',
    "quotes": '"""\n{document}"""\n{title}\n',
    "orca": load_template("orca").text,
    "system": "{system}\n### {question}\n{title}\n---\n### {question}\n{title}\n",
    "prompt-completion": load_template("prompt-completion").text,
    "turns": '[system]\nBe "brief" {{now}}.\n[user]\nTitle of {document}?\n[assistant]\n{title}\n',
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_gets_the_trained_prompt(name: str) -> None:
    tokenizer, template = byte_level(), Template.parse(TEMPLATES[name])
    encoder = TextEncoder.of(tokenizer)
    written = modelfile(template, encoder, "m.gguf", (1,), 512)
    assert written.remarks == ()
    go_template = template_in(written.text)
    for variant in template.variants:
        fields = {field: f"월요일 {field} {{x}}" for field in variant.prompt_fields}
        row = Row(1, fields, "row")
        ids = full_prompt_ids(template.render(row, None, with_answer=False), row, tokenizer)
        names = {"System" if field.startswith("system") else "Prompt": text for field, text in fields.items()}
        assert encoder.batch([go(go_template, names)])[0] == ids


def test_the_start_token_is_left_to_ollama() -> None:
    encoder = TextEncoder.of(sentencepiece_bpe())
    for name in ("title", "turns"):
        written = modelfile(Template.parse(TEMPLATES[name]), encoder, "m.gguf", (), 512)
        assert "<s>" not in written.text


def test_stops_and_parameters() -> None:
    tokenizer = byte_level()
    stops = stop_ids(tokenizer, chat=True)
    text = modelfile(load_template("title"), TextEncoder.of(tokenizer), "m.gguf", stops, 512).text
    assert text.startswith("FROM ./m.gguf\n")
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\nPARAMETER num_ctx 512\n" in text


def test_fields_that_ollama_cannot_fill_are_reported() -> None:
    encoder = TextEncoder.of(byte_level())
    two = modelfile(Template.parse("{a} and {b}\n{c}\n"), encoder, "m.gguf", (), 512)
    assert template_in(two.text) == "{{ .Prompt }}{{ .Response }}"
    assert "several fields (a, b)" in two.remarks[0]
    assert two.text.startswith(f"# {two.remarks[0]}\n")
    alpaca = modelfile(load_template("alpaca"), encoder, "m.gguf", (), 512)
    assert "only the template's variants with instruction" in alpaca.remarks[0]
    assert go(template_in(alpaca.text), {"Prompt": "x"}).endswith("### Instruction:\nx\n\n### Response:\n")
    chat = modelfile(load_template("chat"), encoder, "m.gguf", (), 512)
    assert "TEMPLATE" not in chat.text.replace("no TEMPLATE", "")
    without = modelfile(
        Template.parse(TEMPLATES["turns"]), TextEncoder.of(byte_level(None)), "m.gguf", (), 512
    )
    assert "no chat template" in without.remarks[0]
