"""The Modelfile: Ollama's prompt is the same as in training, and its stop tokens end the answers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from tests.tokenizers import byte_level, sentencepiece_bpe
from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.export.ollama_modelfile import modelfile
from yeonma.tokenization.chat_template_export import full_prompt_ids
from yeonma.tokenization.example import TokenRules, answer_tokens
from yeonma.tokenization.text_encoder import TextEncoder

ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def render_go(text: str, values: Mapping[str, str]) -> str:
    """Renders a Go text/template with the actions that occur here: fields, raw strings, if with else."""
    out, visible = "", [True]
    parts = ACTION.split(text)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            assert "{{" not in part
            out += part if all(visible) else ""
        elif part.startswith("if ."):
            visible.append(bool(values.get(part[4:], "")))
        elif part == "else":
            visible[-1] = not visible[-1]
        elif part == "end":
            visible.pop()
        elif all(visible):
            out += part[1:-1] if part[0] == "`" else values.get(part[1:], "")
    assert visible == [True]
    return out


def template_in(text: str) -> str:
    """Returns the TEMPLATE of a Modelfile, the text between triple quotes."""
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
def test_ollama_template_renders_the_same_prompt_as_in_training(name: str) -> None:
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
        assert encoder.batch([render_go(go_template, names)])[0] == ids


def test_modelfile_omits_the_start_token() -> None:
    encoder = TextEncoder.of(sentencepiece_bpe())
    for name in ("title", "turns"):
        written = modelfile(Template.parse(TEMPLATES[name]), encoder, "m.gguf", (), 512)
        assert "<s>" not in written.text


def test_modelfile_sets_stop_tokens_and_parameters() -> None:
    tokenizer = byte_level()
    stops = answer_tokens(tokenizer, TokenRules(512)).stop_ids
    text = modelfile(load_template("title"), TextEncoder.of(tokenizer), "m.gguf", stops, 512).text
    assert text.startswith("FROM ./m.gguf\n")
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\nPARAMETER num_ctx 512\n" in text


def test_fields_that_ollama_cannot_fill_are_reported() -> None:
    encoder = TextEncoder.of(byte_level())
    two_fields = modelfile(Template.parse("{a} and {b}\n{c}\n"), encoder, "m.gguf", (), 512)
    assert template_in(two_fields.text) == "{{ .Prompt }}{{ .Response }}"
    assert "several fields (a, b)" in two_fields.remarks[0]
    assert two_fields.text.startswith(f"# {two_fields.remarks[0]}\n")
    alpaca = modelfile(load_template("alpaca"), encoder, "m.gguf", (), 512)
    assert "only the template's variants with instruction" in alpaca.remarks[0]
    assert render_go(template_in(alpaca.text), {"Prompt": "x"}).endswith(
        "### Instruction:\nx\n\n### Response:\n"
    )
    chat = modelfile(load_template("chat"), encoder, "m.gguf", (), 512)
    assert "TEMPLATE" not in chat.text.replace("no TEMPLATE", "")
    without_chat_template = modelfile(
        Template.parse(TEMPLATES["turns"]), TextEncoder.of(byte_level(None)), "m.gguf", (), 512
    )
    assert "no chat template" in without_chat_template.remarks[0]
