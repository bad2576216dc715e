"""The exported chat template turns the messages of other tools into the token ids of training."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment, nodes
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.adapters import tiny_adapter
from tests.runs import TEMPLATE, articles, characters, model_folder, trained, write_jsonl
from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.adapter.adapter_folder import identity_of_tokenizer, save_tokenizer
from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.model.load import load_tokenizer
from yeonma.model.source import BaseSource
from yeonma.tokenization.chat_template_export import (
    chat_template_for,
    conversation_of,
    export_chat_template,
)
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.example_encoder import encode_prompts

RULES = TokenRules(100_000)
DATED = "{{ strftime_now('%d %b %Y') }}" + str(byte_level().chat_template)
WITH_BOS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "dated": lambda: byte_level(DATED),
    "sentencepiece_first": sentencepiece_bpe,
    "sentencepiece_always": lambda: sentencepiece_bpe("always"),
    "bos_only_by_the_rules": lambda: sentencepiece_bpe(chat_template=unigram().chat_template),
    "unigram": unigram,
}
TEXTS = (
    "월요일에 폭풍이 항구를 닫았다.",
    "  A storm {document} {{braces}} {% if x %} {{ 7 * 7 }} %}\n\n",
    "She said \"no\" \\ and \\n, 'yes'.\tTab, a slash / and 😀 é\u2028\u0301.",
    "{",
    '{"document": "looks like JSON"}',
)
TEMPLATES = {
    "title": load_template("title").text,
    "alpaca": load_template("alpaca").text,
    "orca": load_template("orca").text,
    "prompt-completion": load_template("prompt-completion").text,
    "chat": load_template("chat").text,
    "turns": '[system]\nBe "brief" {{now}}.\n[user]\n{document}\n[assistant]\n{title}\n',
    "turn variants": "[user]\n{a}: {b}\n[assistant]\nTitle: {title}\n---\n[user]\n{a}\n[assistant]\nTitle: {title}\n",
    "twice": '{a} and {b}, {a} \\ "q" {{x}} {{% y %}}\n{title} end',
    "mixed": "[user]\n{a}\n{b}\n[assistant]\n{title}\n---\n{a}:\n{title}\n",
}
BLANKS = (None, "", " \n\u3000")


def rows_for(template: Template) -> list[Row]:
    if template.is_chat:
        turns = [
            [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": text},
            ]
            for text in TEXTS
        ]
        return [Row(i, {"messages": turn_list}, f"row {i}") for i, turn_list in enumerate(turns, 1)]
    fields = sorted(template.fields - {template.answer_field})
    filled = [{name: TEXTS[(i + j) % len(TEXTS)] for j, name in enumerate(fields)} for i in range(len(TEXTS))]
    blanked = [{**filled[1], name: blank} for name in fields for blank in BLANKS]
    valid_rows = []
    for i, values in enumerate([*filled, *blanked], 1):
        present = {name for name, text in values.items() if text and not text.isspace()}
        if any(present.issuperset(variant.prompt_fields) for variant in template.variants):
            valid_rows.append(Row(i, values, f"row {i}"))
    return valid_rows


def save_and_reload(template: Template, tokenizer: Any, folder: Path) -> Any:
    save_tokenizer(tokenizer, export_chat_template(template, tokenizer), folder)
    return AutoTokenizer.from_pretrained(folder)


def trained_prompts(template: Template, rows: list[Row], tokenizer: Any) -> list[list[int]]:
    rendered = [template.render(row, None, with_answer=False) for row in rows]
    return [ids.tolist() for ids in encode_prompts(rendered, rows, tokenizer, RULES, 1)]


def chat_ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return list(encoded["input_ids"])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", WITH_BOS)
def test_messages_become_the_trained_tokens(kind: str, name: str, tmp_path: Path) -> None:
    tokenizer, template = WITH_BOS[kind](), Template.parse(TEMPLATES[name])
    exported = save_and_reload(template, tokenizer, tmp_path)
    rows = rows_for(template)
    assert len(rows) >= 5
    for row, ids in zip(rows, trained_prompts(template, rows, tokenizer), strict=True):
        rendered = template.render(row, None, with_answer=False)
        messages = list(conversation_of(template, row, None, rendered, tokenizer).messages)
        assert chat_ids(exported, messages) == ids, row
        if not template.is_chat:  # OpenAI's content parts, escaped to ASCII
            text = messages[0]["content"]
            if len(template.fields) > 2:
                text = json.dumps(json.loads(text), indent=2)
            middle = len(text) // 2
            parts = [{"type": "text", "text": text[:middle]}, {"type": "text", "text": text[middle:]}]
            assert chat_ids(exported, [{"role": "user", "content": parts}]) == ids, row


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_keeps_to_the_jinja_of_other_engines(name: str) -> None:
    """llama.cpp's engine and minja have no `**`, loop over a text, index into one, `|list` or `%c`."""
    template, tokenizer = Template.parse(TEMPLATES[name]), byte_level("{{ messages[0]['content'] }}")
    text = chat_template_for(template, tokenizer)
    assert text is not None
    tree = Environment().parse(text)
    assert not list(tree.find_all((nodes.Pow, nodes.FloorDiv)))
    called = {node.name for node in tree.find_all(nodes.Filter)}
    assert called <= {"length", "int", "format"}
    # one place for engines that count characters alone
    assert text.count("format(") == text.count("{%- elif others|length == 64 -%}{{- '%c'|format(code) -}}")
    looped = {compiled(loop.iter) for loop in tree.find_all(nodes.For)}
    assert looped <= {"messages", "message['content']", "[...]", "split()"}
    indexed = [node for node in tree.find_all(nodes.Getitem) if not isinstance(node.arg, nodes.Slice)]
    assert {compiled(node.node) for node in indexed} <= {
        "messages",
        "messages[0]",
        "messages[1]",
        "message",
        "part",
        "fields",
    }
    for literal in re.findall(r'"(?:[^"\\]|\\.)*"', text):
        assert set(re.findall(r"\\(.)", literal)) <= set('ntrbf"\\u')


def compiled(node: Any) -> str:
    """An expression in short."""
    if isinstance(node, nodes.Name):
        return str(node.name)
    if isinstance(node, nodes.Getitem):
        return f"{compiled(node.node)}[{node.arg.value!r}]"
    if isinstance(node, nodes.List):
        return "[...]"
    return f"{node.node.attr}()" if isinstance(node, nodes.Call) else type(node).__name__


@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_every_character_survives_the_json_of_several_fields(ensure_ascii: bool) -> None:
    template, tokenizer = Template.parse(TEMPLATES["twice"]), byte_level()
    text = chat_template_for(template, tokenizer)
    draw = random.Random(0)
    for _ in range(20):
        codes = [
            draw.choice((draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000))) for _ in range(40)
        ]
        fields = {"a": "".join(map(chr, codes)) + '"\\/ \\n\n\\u0041', "b": "\\" * draw.randrange(1, 4)}
        message = {"role": "user", "content": json.dumps(fields, ensure_ascii=ensure_ascii)}
        prompt = tokenizer.apply_chat_template([message], chat_template=text, tokenize=False)
        assert prompt.startswith(fields["a"] + " and " + fields["b"] + ", " + fields["a"])


def test_load_tokenizer_restores_the_bases_chat_template(tmp_path: Path) -> None:
    for number, chat_template in enumerate((byte_level().chat_template, None)):
        folder = tmp_path / str(number)
        tokenizer = byte_level(chat_template)
        exported = save_and_reload(load_template("title"), tokenizer, folder)
        assert exported.chat_template != chat_template
        loaded = load_tokenizer(BaseSource(str(folder)))
        assert loaded.chat_template == chat_template
        assert identity_of_tokenizer(loaded) == identity_of_tokenizer(tokenizer)


def test_turns_for_a_base_without_chat_template_export_none(tmp_path: Path) -> None:
    template = Template.parse(TEMPLATES["turns"])
    assert save_and_reload(template, byte_level(None), tmp_path).chat_template is None


def test_adapter_folder_contains_the_exported_chat_template(tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path, sentencepiece_bpe()).adapter
    row = Row(1, {"document": TEXTS[0]}, "row 1")
    (ids,) = trained_prompts(load_template("title"), [row], sentencepiece_bpe())
    assert chat_ids(AutoTokenizer.from_pretrained(folder), [{"role": "user", "content": TEXTS[0]}]) == ids


@pytest.mark.parametrize("plain", [True, False])
def test_assistant_message_is_rendered_after_its_prompt(plain: bool, tmp_path: Path) -> None:
    template = Template.parse(TEMPLATES["twice" if plain else "turn variants"])
    exported = save_and_reload(template, byte_level(), tmp_path)
    user = {"role": "user", "content": '{"a": "x", "b": "y"}'}
    text = exported.apply_chat_template([user, {"role": "assistant", "content": "T"}], tokenize=False)
    prompt = exported.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert text.removeprefix(prompt) == ("T end<|endoftext|>" if plain else "Title: T<|im_end|>\n")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "plain",
        "{}",
        '{"a": "x"}',
        '{"a": "x", "b": null}',
        '{"a": "x", "b": 3}',
        '{"a": "x", "b": {"c": "y"}}',
        '{"a": "x", "b": "y"',
        '{"a": "x", "b": "y"} z',
        '{"a": "x", "b": "y",}',
        '{"a": "x" "b": "y"}',
        '{"a": "x", "b": "\\q"}',
        '{"a": "x", "b": "\\u12g4"}',
        '{"a": "x", "b": "\\ud800"}',
        '{"a": "x", "b": "\\ud800x"}',
        '{"a": "x", "b": "\\ud800\\n"}',
        '{"a": "x", "b": "\\ud800\\ud800"}',
        '{"a": "x", "b": "\\udc00"}',
        '{"a": "x", "b": "\\u0000"}',
        '{"a": "x", "b": nuil}',
    ],
)
def test_message_that_is_not_json_of_the_fields_is_refused(content: str, tmp_path: Path) -> None:
    exported = save_and_reload(Template.parse(TEMPLATES["twice"]), byte_level(), tmp_path)
    with pytest.raises(Exception, match=r"a JSON object of the texts a, b|the message lacks a field"):
        chat_ids(exported, [{"role": "user", "content": content}])


def test_anything_but_one_user_message_is_refused(tmp_path: Path) -> None:
    exported = save_and_reload(load_template("title"), byte_level(), tmp_path)
    user = {"role": "user", "content": "x"}
    for messages in (
        [user, user],
        [{"role": "system", "content": "x"}, user],
        [{"role": "assistant", "content": "x"}],
    ):
        with pytest.raises(Exception, match="one user message with the text of document"):
            chat_ids(exported, messages)


def test_plain_message_fills_the_field_of_a_one_field_variant(tmp_path: Path) -> None:
    template = load_template("alpaca")
    exported = save_and_reload(template, byte_level(), tmp_path)
    (ids,) = trained_prompts(template, [Row(1, {"instruction": "Write."}, "row")], byte_level())
    assert chat_ids(exported, [{"role": "user", "content": "Write."}]) == ids


def test_template_that_cannot_be_exported_is_reported_and_not_written(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    tokenizer = characters()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="# $A", special_tokens=[("#", tokenizer.convert_tokens_to_ids("#"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(base)
    data = write_jsonl(tmp_path / "rows.jsonl", articles(8))
    done = trained(tmp_path / "OUT", base, data, max_steps=1)
    assert "chat_template.jinja does not contain the training template: a chat template cannot" in done.out
    assert not list(done.folder.glob("*chat_template*"))


def test_training_writes_the_chat_template_to_folder_and_checkpoints(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(8))
    done = trained(tmp_path / "OUT", base, data, max_steps=2, save_steps=1)
    assert "chat template" not in done.out
    rows = [Row(1, row, "row 1") for row in articles(8)]
    template = Template.parse(TEMPLATE)
    for folder in (done.folder, done.folder / "checkpoint-1"):
        exported = AutoTokenizer.from_pretrained(folder)
        for row, ids in zip(rows, trained_prompts(template, rows, characters()), strict=True):
            assert chat_ids(exported, [{"role": "user", "content": row.values["document"]}]) == ids
    checksums = json.loads((done.folder / "manifest.json").read_text())["sha256"]
    assert {"chat_template.jinja", "base_chat_template.jinja"} <= set(checksums)


def test_base_without_a_default_chat_template_gets_one(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"tool_use": "{{ messages[0]['content'] }}"}
    exported = save_and_reload(load_template("title"), tokenizer, tmp_path)
    row = Row(1, {"document": TEXTS[0]}, "row 1")
    (ids,) = trained_prompts(load_template("title"), [row], tokenizer)
    assert chat_ids(exported, [{"role": "user", "content": TEXTS[0]}]) == ids
    assert load_tokenizer(BaseSource(str(tmp_path))).chat_template == tokenizer.chat_template
