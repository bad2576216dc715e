"""samples.json: the model card's rows with their prompt ids from training, for every kind of data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import tiny_adapter
from tests.runs import articles, characters, model_folder, trained, write_jsonl
from yeonma.adapter.adapter_folder import identity_of_tokenizer, read_adapter_folder
from yeonma.adapter.prompt_builder import open_prompt_builder
from yeonma.adapter.samples import Samples, prompts_now, read_samples, take_samples
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.data.task import ANSWERS, LABELLED, PAIRS, Task
from yeonma.errors import UserError
from yeonma.model.load import load_tokenizer
from yeonma.model.source import find_base
from yeonma.tokenization.dataset import prepare_dataset

CHATML = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# An answer loses its digits as soon as another turn follows, so every answer becomes an example of its own.
REWRITING = (
    "{% for message in messages %}[{{ message['role'] }}]"
    "{{ message['content'] if loop.last else message['content'] | replace('1', '') }}#{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)
    ]


Rows = list[dict[str, Any]]
CASES: Mapping[str, tuple[Task, Rows, dict[str, Any]]] = {
    "articles": (ANSWERS, [*articles(6)], {"template": "title"}),
    "renamed columns": (
        ANSWERS,
        [{"body": row["document"], "head": row["title"], "unread": "x"} for row in articles(6)],
        {"template": "title", "columns": {"document": "body", "title": "head"}},
    ),
    "shortened": (ANSWERS, articles(6), {"template": "{document}\ntitle: {title}", "cutoff_len": 50}),
    "turn lists": (
        ANSWERS,
        [{"messages": turns(f"q{number}", "a 1", "and?", "b 1")} for number in range(6)],
        {},
    ),
    "pairs": (
        PAIRS,
        [
            {**row, "chosen": row["title"], "rejected": row["title"] + " and so on"}
            | {"title": "unread", "unread": 1}
            for row in articles(6)
        ],
        {"template": "title"},
    ),
    "dialogues": (
        PAIRS,
        [{"chosen": turns("q", "a", f"{n}?", "b"), "rejected": turns("q", "a", f"{n}?", "c")} for n in range(6)],
        {},
    ),
    "labels": (
        LABELLED,
        [{"prompt": f"{n}?", "completion": "yes", "label": n % 2 == 0} for n in range(6)],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("chat_template", [CHATML, REWRITING], ids=["growing", "rewriting"])
@pytest.mark.parametrize("name", CASES)
def test_samples_keep_only_read_columns_and_reproduce_the_prompts(
    tmp_path: Path, name: str, chat_template: str
) -> None:
    task, rows, settings = CASES[name]
    tokenizer = characters()
    tokenizer.chat_template = chat_template
    data = DataSettings(
        data_path=str(write_jsonl(tmp_path / "data.jsonl", rows)),
        template=settings.get("template"),
        columns=settings.get("columns"),
        val_set_size=2,
    )
    tokens = TokenSettings(cutoff_len=settings.get("cutoff_len", 512), cache_dir=str(tmp_path / "cache"))
    dataset = prepare_dataset(data, tokens, tokenizer, 0, print, lambda _: None, task)
    for part in (dataset.train, dataset.sets[0].validation):
        assert part is not None
        samples = take_samples(part, task, dataset.template, dataset.columns, 3)
        assert len(samples.rows) == (3 if part is dataset.train else 2)
        for row in samples.rows:
            assert "unread" not in row.row
            if name == "pairs":
                assert "title" not in row.row
            training_prompts = [
                part.store.example(i).token_ids[: len(row.prompt_ids)].tolist()
                for i in range(len(part.store))
                if part.store.row_numbers[i] == row.row_number
            ]
            assert row.prompt_ids in training_prompts
        (tmp_path / "samples.json").write_text(samples.to_json(), encoding="utf-8")
        stored = read_samples(tmp_path)
        assert stored == samples
        prompts = prompts_now(stored, dataset.template, dataset.columns, tokenizer, dataset.rules)
        assert prompts == [row.prompt_ids for row in samples.rows]
    if name == "shortened":
        assert max(part.store.cut_characters) > 0


@pytest.mark.parametrize("chat_template", [CHATML, REWRITING], ids=["growing", "rewriting"])
def test_sample_prompt_of_a_turn_list_is_that_of_the_last_answer(tmp_path: Path, chat_template: str) -> None:
    task, rows, _ = CASES["turn lists"]
    tokenizer = characters()
    tokenizer.chat_template = chat_template
    data = DataSettings(data_path=str(write_jsonl(tmp_path / "data.jsonl", rows)))
    tokens = TokenSettings(cache_dir=str(tmp_path / "cache"))
    dataset = prepare_dataset(data, tokens, tokenizer, 0, print, lambda _: None, task)
    samples = take_samples(dataset.train, task, dataset.template, dataset.columns, 1)
    is_split, end, earlier = (True, "#", "a ") if chat_template == REWRITING else (False, "</s>", "a 1")
    assert len(dataset.train.store) == (12 if is_split else 6)
    expected = f"[user]q0{end}[assistant]{earlier}{end}[user]and?{end}[assistant]"
    assert tokenizer.decode(samples.rows[0].prompt_ids) == expected


def test_run_writes_samples_to_its_folder_and_every_checkpoint(tmp_path: Path) -> None:
    base, data = model_folder(tmp_path / "base"), write_jsonl(tmp_path / "data.jsonl", articles(20))
    done = trained(tmp_path / "out", base, data, val_set_size=6, card_rows=4, save_steps=1)
    samples = read_samples(done.folder)
    assert samples is not None
    assert len(samples.rows) == 4
    card = (done.folder / "README.md").read_text("utf-8")
    for row in samples.rows:
        assert f"### Row {row.row_number}\n" in card
        assert row.row == articles(20)[row.row_number - 1]
    folders = [done.folder, *done.folder.glob("checkpoint-*")]
    assert len(folders) > 3
    for folder in folders:
        assert (folder / "samples.json").read_bytes() == (done.folder / "samples.json").read_bytes()
        prompt_builder = open_prompt_builder(folder)
        prompts = prompt_builder.prompts(
            [row_of(row.row, row.row_number) for row in samples.rows], max_new_tokens=8
        )
        assert [prompt.token_ids.tolist() for prompt in prompts] == [row.prompt_ids for row in samples.rows]
    assert read_adapter_folder(done.folder).details["tokenizer"] == identity_of_tokenizer(
        load_tokenizer(find_base(str(base)))
    )


def row_of(values: dict[str, Any], number: int) -> Any:
    from yeonma.data.rows import Row

    return Row(number, values, f"row {number}")


def test_card_rows_zero_stores_no_samples(tmp_path: Path) -> None:
    base, data = model_folder(tmp_path / "base"), write_jsonl(tmp_path / "data.jsonl", articles(8))
    done = trained(tmp_path / "out", base, data, card_rows=0)
    assert read_samples(done.folder) == Samples(ANSWERS, ())


def test_older_folder_without_samples_is_accepted(tmp_path: Path) -> None:
    folders = tiny_adapter(tmp_path, characters())
    manifest = folders.adapter / "yeonma.json"
    details = json.loads(manifest.read_text("utf-8"))
    del details["tokenizer"]
    manifest.write_text(json.dumps(details), "utf-8")
    assert read_samples(folders.adapter) is None
    assert open_prompt_builder(folders.adapter).adapter.base.name == str(folders.base)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(kind="none such"),
        lambda content: content.pop("samples"),
        lambda content: content["samples"][0].pop("prompt_ids"),
        lambda content: content["samples"][0].update(prompt_ids=[1, "2"]),
        lambda content: content["samples"][0].update(prompt_ids="12"),
        lambda content: content["samples"][0].update(row=[]),
        lambda content: content["samples"][0].update(row_number=None),
        lambda content: content["samples"].append(3),
    ],
)
def test_damaged_samples_file_is_named(tmp_path: Path, change: Any) -> None:
    content = {
        "kind": "answers",
        "samples": [{"row_number": 1, "row": {"document": "d"}, "prompt_ids": [1, 2]}],
    }
    (tmp_path / "samples.json").write_text(json.dumps(content), "utf-8")
    samples = read_samples(tmp_path)
    assert samples is not None
    assert replace(samples.rows[0], prompt_ids=[]).row == {"document": "d"}
    change(content)
    (tmp_path / "samples.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=r"samples\.json"):
        read_samples(tmp_path)
