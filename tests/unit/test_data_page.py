"""The examples of docs/data.md, in both languages, go through the real reader, choice of template and encoder.

Every block of the page must be of a kind that is known here: a new example needs a check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from tests.runs import write_jsonl
from tests.tokenizers import byte_level
from yeonma.cli import VERBS
from yeonma.config.parse import read_config
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.data.rows import open_rows
from yeonma.data.template import Template, load_template
from yeonma.tokenization.dataset import Dataset, describe, prepare_dataset

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("data.md", "data.ko.md")
SAMPLES = {
    "data.md": ("news_en_validation.jsonl", "title_en.txt"),
    "data.ko.md": ("news_ko_validation.jsonl", "title"),
}
"""The rows and the template of the chapter on what the model sees."""
CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' and not tools %}{{ '<|im_start|>system\nYou are a helpful AI assistant named "
    "SmolLM, trained by Hugging Face<|im_end|>\n' }}{%- endif %}"
    "{%- if tools %}{{ '<|im_start|>system\n' }}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}"
    "{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}"
    "{{ m.content or '' }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{ call.function.name + '(' + (call.function.arguments | tojson) + ')' }}{%- endfor %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
"""SmolLM2's system turn, with places for reasoning and tools."""


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[tuple[str, str]]:
    """(the paragraph above, text) of each fenced block."""
    text = text_of(page)
    found = re.finditer(r"^( *)```\w*\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].rstrip().rsplit("\n\n", 1)[-1], dedent(m[2])) for m in found]


def inline_json(page: str) -> list[str]:
    """The objects in the page's text, `[...]` in them replaced by a row."""
    text = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    row = '[{"document": "a b", "title": "c"}]'
    return [found.replace("[...]", row) for found in re.findall(r"`(\{\"[^`\n]*)`", text)]


def kind_of_block(text: str) -> str:
    if text.startswith("{") and all(line.startswith("{") for line in text.splitlines()):
        return "rows"
    if text.startswith("yeonma "):
        return "command"
    if re.search(r"^\{\w+\}$", text, re.MULTILINE):
        return "template"
    if re.match(r"[\w.]+: ", text) and text.count("\n") == 1 and re.search("left out|제외", text):
        return "bad rows"
    if text.startswith("<|im_start|>"):
        return "chat"
    if re.match(r"\w+:", text):
        return "settings"
    return "seen"


def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(CHAT_TEMPLATE)


def prepare(
    data: Path, lines: list[str] | None = None, tokens: Mapping[str, Any] | None = None, **settings: Any
) -> Dataset:
    log = (lines if lines is not None else []).append
    rules = TokenSettings(cache_dir=str(data.parent / "cache"), **(tokens or {}))
    dataset = prepare_dataset(
        DataSettings(data_path=str(data), **settings), rules, tokenizer(), 42, log, lambda _: None
    )
    describe(dataset, log)
    return dataset


def seen(dataset: Dataset) -> list[tuple[str, str]]:
    """(text, trained text) of the examples."""
    own = tokenizer()
    examples = [dataset.train.store[position] for position in range(len(dataset.train.store))]
    return [
        (
            own.decode(example.token_ids, skip_special_tokens=False),
            own.decode(example.token_ids[example.trained], skip_special_tokens=False),
        )
        for example in examples
    ]


def columns_named_in(text: str) -> dict[str, str] | None:
    found = re.search(r"`--columns '(\{[^']*\})'`", text)
    return None if found is None else yaml.safe_load(found[1])


@pytest.mark.parametrize("page", PAGES)
def test_rows_shown_in_blocks_are_read_and_trained(page: str, tmp_path: Path) -> None:
    shown = [block for block in blocks_of(page) if kind_of_block(block[1]) == "rows"]
    assert len(shown) >= 4
    for number, (above, text) in enumerate(shown):
        data = tmp_path / f"{number}.jsonl"
        data.write_text(text, encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        columns = columns_named_in(above)
        template = "{question}\n{answer}" if columns else None
        trained = [trained for _, trained in seen(prepare(data, columns=columns, template=template))]
        assert len(trained) >= len(rows)
        for row in rows:
            for answer in answers_in(row):
                assert any(answer in text for text in trained), f"{answer} is not trained in {trained}"


def answers_in(row: Mapping[str, Any]) -> list[str]:
    """The texts that must be trained of a row of the page."""
    if "answers" in row:
        return [f"{row['answers']['text'][0]}<|endoftext|>"]
    turns = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    texts = [turn.get(key) for turn in turns for key in ("content", "reasoning_content")]
    calls = [call["function"] for turn in turns for call in turn.get("tool_calls", [])]
    return [text for text in texts if text] + [
        f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls
    ]


@pytest.mark.parametrize("page", PAGES)
def test_a_conversation_becomes_the_text_that_is_shown(page: str, tmp_path: Path) -> None:
    shown = [text for _, text in blocks_of(page) if kind_of_block(text) == "chat"]
    rows = [text for _, text in blocks_of(page) if "Name a fruit." in text and kind_of_block(text) == "rows"]
    assert len(shown) == len(rows) == 1
    data = tmp_path / "rows.jsonl"
    data.write_text(rows[0], encoding="utf-8")
    ((text, trained),) = seen(prepare(data))
    assert text.rstrip("\n") == shown[0].rstrip("\n")
    named = re.search(
        r"`(Apple\.<\S+)`\S*\s+`?(Banana\.<\S+)`|`(Apple\.<\S+)` and `(Banana\.<\S+)`", text_of(page)
    )
    assert named is not None
    assert trained == "".join(part for part in named.groups() if part)


@pytest.mark.parametrize("page", PAGES)
def test_templates_train_rows_with_their_fields(page: str, tmp_path: Path) -> None:
    shown = [text for _, text in blocks_of(page) if kind_of_block(text) == "template"]
    assert len(shown) >= 2
    for number, text in enumerate(shown):
        template = Template.parse(text)
        row = {name: f"the {name}" for name in template.fields}
        data = write_jsonl(tmp_path / f"{number}.jsonl", [row])
        ((_, trained),) = seen(prepare(data, template=text))
        assert trained == f"the {template.answer_field}<|endoftext|>"


@pytest.mark.parametrize("page", PAGES)
def test_objects_in_the_text_are_read(page: str, tmp_path: Path) -> None:
    for number, text in enumerate(inline_json(page)):
        value = json.loads(text)
        data = tmp_path / f"{number}.json"
        data.write_text(text, encoding="utf-8")
        if "data" in value:
            assert [row.values for row in open_rows(str(data))] == value["data"]
        elif "label" in value:
            rows = [row.values for row in open_rows(str(data))]
            assert rows == [
                {"text": a, "label": b} for a, b in zip(value["text"], value["label"], strict=True)
            ]
            assert len(seen(prepare(data, template="{text}\n\n{label}"))) == 2
        elif "instruction" in value:
            ((read, trained),) = seen(prepare(data))
            assert trained == f"{value['output']}<|endoftext|>"
            assert any(
                read.replace("<|endoftext|>", "<|im_end|>") == block.rstrip("\n")
                for _, block in blocks_of(page)
            )
        elif "year" in value:
            written = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            assert written in inline_json(page)
            rows = write_jsonl(tmp_path / f"{number}.jsonl", [{"ask": "Who?", "output": value}])
            columns = columns_named_in(text_of(page)[text_of(page).index("`json(...)`") :])
            ((_, trained),) = seen(prepare(rows, template="{ask}\n{answer}", columns=columns))
            assert trained == f"{written}<|endoftext|>"
        else:
            assert value == {"enable_thinking": False}


@pytest.mark.parametrize("page", PAGES)
def test_bad_rows_are_named_as_shown(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YEONMA_LANG", "ko" if page.endswith(".ko.md") else "en")
    (shown,) = [text.strip() for _, text in blocks_of(page) if kind_of_block(text) == "bad rows"]
    found = re.match(r'([\w.]+): .*"(\w+)".*: \d+[^\d(]*\((?:rows|행) ([\d, ]+)\)', shown)
    assert found is not None
    bad = [int(number) for number in found[3].split(", ")]
    rows = [{"document": f"a {n}", found[2]: "" if n in bad else "b"} for n in range(1, 25)]
    lines: list[str] = []
    prepare(write_jsonl(Path(found[1]), rows), lines, bad_rows="skip")
    assert shown in lines


@pytest.mark.parametrize("page", PAGES)
def test_what_the_model_sees_is_rendered_from_the_sample_rows(page: str) -> None:
    samples, name = SAMPLES[page]
    folder = ROOT / "yeonma" / "samples"
    template = load_template(str(folder / name) if name.endswith(".txt") else name)
    row = json.loads((folder / samples).read_text(encoding="utf-8").splitlines()[0])
    prompt, answer = template.text.split("{title}")[0], f"{row['title']}<|im_end|>"
    before, after = prompt.split("{document}")
    shown = [
        text for _, text in blocks_of(page) if kind_of_block(text) == "seen" and "Instruction" not in text
    ]
    assert shown[:2] == [before + row["document"] + after.rstrip("\n") + "\n\n", f"{answer}\n"]
    (shortened,) = shown[2:]
    assert shortened.startswith(before) and shortened.endswith(f"{after}{answer}\n")
    kept = shortened[len(before) : -len(f"{after}{answer}\n")]
    assert kept and kept != row["document"] and row["document"].startswith(kept)


@pytest.mark.parametrize("page", PAGES)
def test_settings_in_yaml_are_settings(page: str, tmp_path: Path) -> None:
    verb = VERBS["sft"]
    for _, text in blocks_of(page):
        if kind_of_block(text) == "settings":
            file = tmp_path / "run.yaml"
            given = yaml.safe_load(text)
            needed = {"base_model": "x", "data_path": "x", "output_dir": "x"}
            missing = {key: value for key, value in needed.items() if key not in given}
            file.write_text(text + yaml.safe_dump(missing), encoding="utf-8")
            read_config(verb.config, ["--config", str(file)], verb="sft", groups=verb.groups)


def shape(value: Any) -> Any:
    """A JSON value with its texts left out."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return [shape(each) for each in value] if isinstance(value, list) else type(value).__name__


def test_both_languages_show_the_same_examples() -> None:
    """Rows of the same shape, settings and templates; the Korean page also shows the template of Korean titles."""
    english, korean = (
        [
            [json.loads(line) for line in text.splitlines()]
            for _, text in blocks_of(page)
            if kind_of_block(text) == "rows"
        ]
        for page in PAGES
    )
    assert shape(english) == shape(korean)
    english, korean = ([shape(json.loads(text)) for text in inline_json(page)] for page in PAGES)
    assert english == korean
    for kind in ("template", "settings", "chat"):
        texts = [[text for _, text in blocks_of(page) if kind_of_block(text) == kind] for page in PAGES]
        if kind == "template":
            texts[1] = [text for text in texts[1] if text != load_template("title").text]
        assert texts[0] == texts[1]
    named = [set(re.findall(r"`(--(?!cutoff_len)[a-z_]+(?: [^`\n]+)?)`", text_of(page))) for page in PAGES]
    assert named[0] == named[1]  # Korean rows have more tokens, and another limit
