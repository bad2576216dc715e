"""Runs with tokens of their own, from the rows to the merged model: the tokens trained are the tokens asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.pairs import dpo, pairs
from tests.runs import (
    Done,
    articles,
    characters,
    command,
    left_behind,
    model_folder,
    sft,
    trained,
    unfinished_copy,
    write_jsonl,
)
from yeonma.adapter.prompt_builder import open_prompt_builder
from yeonma.adapter.samples import read_samples
from yeonma.config.settings import ServeSettings
from yeonma.data.rows import Row
from yeonma.errors import UserError
from yeonma.policy import load_policy
from yeonma.serve.server import load_served_models, open_adapters

NEW = ["<hot>", "<cold>"]
BASES = (*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("room", "tied")), "untied")
"""Bases with rows to spare, and with a row for each token of the tokenizer, tied and untied."""
RUN: dict[str, object] = {
    "new_tokens": NEW,
    "max_steps": 4,
    "save_steps": 2,
    "val_set_size": 4,
    "eval_steps": 2,
    "card_rows": 2,
    "learning_rate": 3e-2,
}
ROWS = [
    {**row, "title": f"{NEW[number % 2]}{row['title']}", "document": f"{row['document']}<hot>"}
    for number, row in enumerate(articles(14))
]


def base_folder(folder: Path, kind: str) -> Path:
    """A tiny Llama. Without room its embedding ends with the tokenizer's last token."""
    if kind == "room":
        return model_folder(folder)
    config = AutoConfig.from_pretrained(model_folder(folder))
    config.vocab_size, config.tie_word_embeddings = len(characters()), kind == "tied"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module", params=BASES)
def done(request: pytest.FixtureRequest, place: Path) -> Done:
    base = base_folder(place / request.param, request.param)
    return trained(place / f"{request.param}-out" / "out", base, place / "rows.jsonl", **RUN)


def base_of(done: Done) -> Path:
    return done.folder.parents[1] / done.folder.parent.name.removesuffix("-out")


def test_tokens_are_one_id_in_rows_and_prompts_and_verify_finds_nothing(done: Done) -> None:
    builder = open_prompt_builder(done.folder)
    ids = builder.tokenizer.convert_tokens_to_ids(NEW)
    assert ids == [len(characters()), len(characters()) + 1]
    samples = read_samples(done.folder)
    assert samples is not None and len(samples.rows) == 2
    for sample in samples.rows:
        assert ids[0] in sample.prompt_ids
        row = Row(sample.row_number, sample.row, "row")
        (prompt,) = builder.prompts([row], max_new_tokens=4)
        assert prompt.token_ids.tolist() == sample.prompt_ids
    assert "rows of 2 tokens" in done.out
    assert (
        "vllm serve" not in (done.folder / "README.md").read_text()
    )  # which has no rows of an adapter's own
    assert json.loads((done.folder / "run.json").read_text())["identity"]["new_tokens"] == NEW
    verified = command(done.folder, "verify", str(done.folder))
    assert verified.status == 0, verified.out
    assert "base's tokenizer          the vocabulary and rules are those of training" in verified.out


def test_plain_peft_gives_the_same_logits_after_it_has_added_the_rows(done: Done) -> None:
    policy = load_policy(done.folder, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    model = AutoModelForCausalLM.from_pretrained(base_of(done))
    if model.config.vocab_size < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    plain = PeftModel.from_pretrained(model, str(done.folder)).eval()
    ids = torch.tensor([tokenizer("a <hot> title<cold>")["input_ids"]])
    with torch.no_grad():
        expected, found = plain(input_ids=ids).logits, policy.model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_merged_model_has_the_tokens_and_other_rows_are_those_of_the_base(done: Done) -> None:
    output = done.folder.parent / "merged"
    merged = command(output, "merge", str(done.folder), "--output_dir", str(output))
    assert merged.status == 0, merged.err
    model = AutoModelForCausalLM.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(base_of(done))
    known = len(characters())
    for layer, before in (
        (model.get_input_embeddings(), base.get_input_embeddings()),
        (model.get_output_embeddings(), base.get_output_embeddings()),
    ):
        assert torch.equal(layer.weight[:known], before.weight[:known])
        mean = before.weight[:known].mean(0)
        assert (layer.weight[known : known + 2] - mean).abs().max() > 1e-3
    own, other = (load_policy(folder, device="cpu") for folder in (done.folder, output))
    row = {"document": "wind, storm<hot>"}
    assert own.generate(row, max_new_tokens=8) == other.generate(row, max_new_tokens=8)


def test_resumed_run_has_the_bytes_of_one_without_a_stop(done: Done, tmp_path: Path) -> None:
    output = unfinished_copy(done.folder, tmp_path / "out")
    shutil.rmtree(output / "checkpoint-4")
    resumed = trained(output, base_of(done), done.folder.parents[1] / "rows.jsonl", **RUN)
    assert "continuing after step 2" in resumed.out
    assert left_behind(output) == left_behind(done.folder)


def test_adapter_is_continued_with_its_tokens_by_both_verbs(done: Done, tmp_path: Path) -> None:
    base, rows = base_of(done), done.folder.parents[1] / "rows.jsonl"
    more = {name: value for name, value in RUN.items() if name != "new_tokens"}
    more |= {"max_steps": 1, "learning_rate": 1e-6, "adapter": done.folder}
    again = trained(tmp_path / "again", base, rows, **more)
    assert "rows of 2 tokens" in again.out
    assert yaml.safe_load((again.folder / "settings.yaml").read_text())["new_tokens"] == NEW
    for name, weight in done.weights.items():
        torch.testing.assert_close(again.weights[name], weight, rtol=0, atol=1e-5)
    assert abs(again.looks[0]["loss"] - done.looks[-1]["loss"]) < 1e-4
    preferences = [{**pair, "prompt": f"{pair['prompt']}<cold>"} for pair in pairs(8)]
    data = write_jsonl(tmp_path / "pairs.jsonl", preferences)
    preferred = dpo(tmp_path / "dpo", base, data, max_steps=1, adapter=done.folder)
    assert preferred.status == 0, preferred.err
    assert command(tmp_path, "verify", str(preferred.folder)).status == 0
    other = sft(tmp_path / "other", base, rows, **{**more, "new_tokens": ["<hot>"]})
    assert other.status == 2
    assert f"new_tokens: it is [<hot>], but {done.folder} has [<hot>, <cold>]" in other.err


def test_served_alone_and_the_base_not_beside_it(done: Done) -> None:
    settings = ServeSettings(adapter_dirs=[str(done.folder)], device="cpu")
    lines: list[str] = []
    models = load_served_models(open_adapters(settings), settings, lines.append)
    assert list(models) == ["out"]
    assert any("is not served by itself: it does not know the adapter's own tokens" in line for line in lines)
    with pytest.raises(UserError, match=r"it has 2 tokens of its own, which the base alone does not know"):
        load_policy(done.folder, device="cpu", adapter_weights=False)


def test_other_verbs_take_it(done: Done, tmp_path: Path) -> None:
    rows, base = str(done.folder.parents[1] / "rows.jsonl"), str(base_of(done))
    words = ["--data_path", rows, "--max_new_tokens", "4", "--output_dir", str(tmp_path / "report")]
    assert command(tmp_path, "compare", "--models", str(done.folder), base, *words).status == 0
    words = ["--base_model", base, "--data_path", rows, "--adapter", str(done.folder), "--json"]
    inspected = command(tmp_path, "inspect", *words, "--rows", "1")
    assert inspected.status == 0, inspected.err
    first, about = (json.loads(line) for line in inspected.out.splitlines())
    assert len(characters()) in first["token_ids"]
    assert about["adapter"]["tokens"] == 2


def test_file_of_tokens_is_the_same_run_as_the_list(place: Path, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "untied")
    (tmp_path / "tokens.txt").write_text("<hot>\n<cold>\n")
    settings = {**RUN, "max_steps": 1, "card_rows": 0}
    listed = trained(tmp_path / "a" / "out", base, place / "rows.jsonl", **settings)
    settings["new_tokens"] = tmp_path / "tokens.txt"
    again = trained(listed.folder, base, place / "rows.jsonl", **settings)
    assert "which is finished" in again.out
    swapped = sft(listed.folder, base, place / "rows.jsonl", **{**settings, "new_tokens": NEW[::-1]})
    assert swapped.status == 2
    assert "new_tokens was ['<hot>', '<cold>'] and is now ['<cold>', '<hot>']" in swapped.err
    assert "the content of the tokenizer has changed" in swapped.err


def test_preferences_compare_with_the_base_and_the_rows_as_they_began(place: Path, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "untied")
    preferences = [{**pair, "prompt": f"{pair['prompt']}<cold>"} for pair in pairs(8)]
    data = write_jsonl(tmp_path / "pairs.jsonl", preferences)
    done = dpo(tmp_path / "out", base, data, max_steps=2, new_tokens=NEW, micro_batch_size=1)
    assert done.status == 0, done.err
    assert done.steps[0]["reward_margin"] == 0
    assert done.steps[1]["reward_margin"] != 0


def test_quick_refusals_name_the_cure(place: Path, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "untied")
    for tokens, message in (
        (["a"], 'new_tokens: "a" is one token already'),
        (tmp_path / "none.txt", "cannot be read (No such file or directory)"),
    ):
        refused = sft(tmp_path / "out", base, place / "rows.jsonl", new_tokens=tokens)
        assert refused.status == 2 and message in refused.err
        assert not (tmp_path / "out").exists()
