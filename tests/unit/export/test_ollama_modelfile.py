"""The Modelfile: Ollama's prompt is the same as in training, and its stop tokens end the answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import AddedToken

from tests.tokenizers import byte_level, sentencepiece_bpe
from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.export.go_template import execute
from yeonma.export.ollama_modelfile import modelfile
from yeonma.export.role_frames import render_messages
from yeonma.tokenization.chat_template_export import full_prompt_ids
from yeonma.tokenization.example import TokenRules, answer_tokens
from yeonma.tokenization.text_encoder import TextEncoder


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
    written = modelfile(template, encoder, "m.gguf", (1,), TokenRules(512))
    assert written.remarks == ()
    go_template = template_in(written.text)
    for variant in template.variants:
        fields = {field: f"월요일 {field} {{x}}" for field in variant.prompt_fields}
        row = Row(1, fields, "row")
        ids = full_prompt_ids(template.render(row, None, with_answer=False), row, tokenizer)
        names = {"System" if field.startswith("system") else "Prompt": text for field, text in fields.items()}
        assert encoder.batch([execute(go_template, names)])[0] == ids


def test_modelfile_omits_the_start_token() -> None:
    encoder = TextEncoder.of(sentencepiece_bpe())
    for name in ("title", "turns"):
        written = modelfile(Template.parse(TEMPLATES[name]), encoder, "m.gguf", (), TokenRules(512))
        assert "<s>" not in written.text


def test_modelfile_sets_stop_tokens_and_parameters() -> None:
    tokenizer = byte_level()
    stops = answer_tokens(tokenizer, TokenRules(512)).stop_ids
    text = modelfile(load_template("title"), TextEncoder.of(tokenizer), "m.gguf", stops, TokenRules(512)).text
    assert text.startswith("FROM ./m.gguf\n")
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\nPARAMETER num_ctx 512\n" in text


def test_fields_that_ollama_cannot_fill_are_reported() -> None:
    encoder = TextEncoder.of(byte_level())
    two_fields = modelfile(Template.parse("{a} and {b}\n{c}\n"), encoder, "m.gguf", (), TokenRules(512))
    assert template_in(two_fields.text) == "{{ .Prompt }}{{ .Response }}"
    assert "several fields (a, b)" in two_fields.remarks[0]
    assert two_fields.text.startswith(f"# {two_fields.remarks[0]}\n")
    alpaca = modelfile(load_template("alpaca"), encoder, "m.gguf", (), TokenRules(512))
    assert "only the template's variants with instruction" in alpaca.remarks[0]
    assert execute(template_in(alpaca.text), {"Prompt": "x"}).endswith(
        "### Instruction:\nx\n\n### Response:\n"
    )
    without_chat_template = modelfile(
        Template.parse(TEMPLATES["turns"]), TextEncoder.of(byte_level(None)), "m.gguf", (), TokenRules(512)
    )
    assert "no chat template" in without_chat_template.remarks[0]


def test_chat_adapter_gets_a_template_over_messages() -> None:
    written = modelfile(load_template("chat"), TextEncoder.of(byte_level()), "m.gguf", (), TokenRules(512))
    assert written.remarks == ()
    assert len(written.trials) == 72
    go = template_in(written.text)
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    assert render_messages(go, [{"role": "system", "content": "S"}, question, answer, question]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    begun = render_messages(go, [question, answer])
    assert begun.endswith("<|im_start|>assistant\nA")


def test_no_template_is_written_that_gives_other_ids() -> None:
    """SentencePiece puts a blank before a text, but not after a start token that stands in it."""
    encoder = TextEncoder.of(sentencepiece_bpe())
    written = modelfile(load_template("chat"), encoder, "m.gguf", (), TokenRules(512))
    assert 'TEMPLATE "' not in written.text
    assert written.remarks == (
        "no TEMPLATE: its text would get other token ids than in training; Ollama uses the chat template in the GGUF "
        "file",
    )


@pytest.mark.parametrize("adds_start", [False, True])
def test_start_token_is_that_of_the_file(adds_start: bool) -> None:
    encoder = TextEncoder.of(sentencepiece_bpe())
    written = modelfile(load_template("title"), encoder, "m.gguf", (), TokenRules(512), adds_start)
    if adds_start:
        assert written.trials
        assert "<s>" not in written.text
    else:
        assert "it would give other token ids than training" in written.remarks[0]


def test_start_token_that_training_does_not_have_is_reported() -> None:
    encoder = TextEncoder.of(byte_level())
    bos = encoder.token_id("<|im_start|>")
    encoder = replace(encoder, bos_id=bos)
    written = modelfile(load_template("title"), encoder, "m.gguf", (), TokenRules(512), True)
    assert "llama.cpp puts <|im_start|> before every prompt, and training did not" in written.remarks[0]


def test_stop_texts_are_written_without_escapes() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken('<"end\\>', special=True)], special_tokens=True)
    encoder = TextEncoder.of(tokenizer)
    stop = encoder.token_id('<"end\\>')
    text = modelfile(load_template("title"), encoder, "m.gguf", (stop or 0,), TokenRules(512)).text
    assert 'PARAMETER stop """<"end\\>"""\n' in text


def test_characters_that_ollama_drops_are_escaped() -> None:
    template = Template.parse("\u3000{document}\u200b\xa0:\n{title}\n")
    text = modelfile(template, TextEncoder.of(byte_level()), "m.gguf", (), TokenRules(512)).text
    go = template_in(text)
    assert not [character for character in go if not character.isprintable() and character != "\n"]
    assert execute(go, {"Prompt": "x"}) == "\u3000x\u200b\xa0:\n"
