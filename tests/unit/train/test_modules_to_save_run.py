"""Runs that train modules whole beside the adapter, from settings to the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.pairs import dpo, pairs
from tests.runs import (
    Done,
    articles,
    characters,
    command,
    left_behind,
    sft,
    trained,
    unfinished_copy,
    write_jsonl,
)
from tests.unit.train.test_new_tokens_run import NEW, ROWS, base_folder
from yeonma.policy import load_policy

WHOLE = {"untied": ["lm_head", "norm"], "tied": ["embed_tokens"]}
RUN: dict[str, object] = {
    "max_steps": 4,
    "save_steps": 2,
    "val_set_size": 4,
    "eval_steps": 2,
    "card_rows": 2,
    "weight_decay": 0.1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_jsonl(folder / "rows.jsonl", articles(14))
    return folder


@pytest.fixture(scope="module", params=[pytest.param("tied", marks=pytest.mark.slow), "untied"])
def done(request: pytest.FixtureRequest, place: Path) -> Done:
    kind = request.param
    base = base_folder(place / kind, kind)
    settings = {**RUN, "modules_to_save": WHOLE[kind]}
    return trained(place / f"{kind}-out" / "out", base, place / "rows.jsonl", **settings)


def settings_of(done: Done) -> dict[str, object]:
    return {**RUN, "modules_to_save": WHOLE[kind_of(done)]}


def kind_of(done: Done) -> str:
    return done.folder.parent.name.removesuffix("-out")


def base_of(done: Done) -> Path:
    return done.folder.parents[1] / kind_of(done)


def rows_of(done: Done) -> Path:
    return done.folder.parents[1] / "rows.jsonl"


def test_run_says_what_is_trained_whole_and_verify_finds_nothing(done: Done) -> None:
    said = {"untied": "lm_head, model.norm", "tied": "lm_head, model.embed_tokens"}[kind_of(done)]
    assert f"; trained whole: {said}" in done.out
    assert f"trained whole: {said}" in (done.folder / "README.md").read_text().replace("\\", "")
    assert "vllm serve" not in (done.folder / "README.md").read_text()
    verified = command(done.folder, "verify", str(done.folder))
    assert verified.status == 0, verified.out
    base = AutoModelForCausalLM.from_pretrained(base_of(done)).state_dict()
    name = {"untied": "lm_head.weight", "tied": "model.embed_tokens.weight"}[kind_of(done)]
    weight = done.weights[f"base_model.model.{name}"]
    assert weight.shape == base[name].shape and not torch.equal(weight, base[name])


def test_plain_peft_and_the_merged_model_give_the_same_logits(done: Done) -> None:
    policy = load_policy(done.folder, device="cpu")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(done)), str(done.folder))
    output = done.folder.parent / "merged"
    merged = command(output, "merge", str(done.folder), "--output_dir", str(output))
    assert merged.status == 0, merged.err
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.tie_word_embeddings == (kind_of(done) == "tied")
    ids = torch.tensor([list(range(3, 40))])
    with torch.no_grad():
        found = policy.model(input_ids=ids).logits
        for other in (plain.eval(), model):
            torch.testing.assert_close(other(input_ids=ids).logits, found, rtol=1e-3, atol=1e-4)


def test_resumed_run_has_the_bytes_of_one_without_a_stop(done: Done, tmp_path: Path) -> None:
    output = unfinished_copy(done.folder, tmp_path / "out")
    shutil.rmtree(output / "checkpoint-4")
    resumed = trained(output, base_of(done), rows_of(done), **settings_of(done))
    assert "continuing after step 2" in resumed.out
    assert left_behind(output) == left_behind(done.folder)


def test_adapter_is_continued_with_its_modules_by_both_verbs(done: Done, tmp_path: Path) -> None:
    more = {**RUN, "max_steps": 1, "learning_rate": 1e-9, "adapter": done.folder}
    again = trained(tmp_path / "again", base_of(done), rows_of(done), **more)
    written = yaml.safe_load((again.folder / "settings.yaml").read_text())
    assert written["modules_to_save"] == WHOLE[kind_of(done)]
    for name, weight in done.weights.items():
        torch.testing.assert_close(again.weights[name], weight, rtol=0, atol=1e-6)
    assert abs(again.looks[0]["loss"] - done.looks[-1]["loss"]) < 1e-4
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs(8))
    preferred = dpo(tmp_path / "dpo", base_of(done), data, max_steps=1, adapter=done.folder)
    assert preferred.status == 0, preferred.err
    other = sft(tmp_path / "other", base_of(done), rows_of(done), **{**more, "modules_to_save": ["q_norm"]})
    assert other.status == 2
    assert f"modules_to_save: it is [q_norm], but {done.folder} has [" in other.err


def test_forecast_counts_what_the_run_trains(done: Done) -> None:
    words = [
        "--base_model",
        str(base_of(done)),
        "--data_path",
        str(rows_of(done)),
        "--json",
        "--rows",
        "none",
    ]
    words += [
        "--modules_to_save",
        json.dumps(WHOLE[kind_of(done)]),
        "--lora_r",
        "4",
        "--template",
        "{document}{title}",
    ]
    inspected = command(done.folder, "inspect", *words)
    assert inspected.status == 0, inspected.err
    forecast = json.loads(inspected.out.splitlines()[-1])["forecast"]
    assert f" {forecast['parameters_trained']:,} parameters trained, " in done.out
    assert forecast["memory"]["lora"] == 4 * forecast["parameters_trained"]


def test_preferences_compare_with_the_base_as_it_was(done: Done, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs(8))
    whole = {"modules_to_save": WHOLE[kind_of(done)]}
    found = dpo(tmp_path / "out", base_of(done), data, max_steps=2, micro_batch_size=1, **whole)
    assert found.status == 0, found.err
    assert found.steps[0]["reward_margin"] == 0
    assert found.steps[1]["reward_margin"] != 0


@pytest.mark.parametrize("kind", [pytest.param("tied", marks=pytest.mark.slow), "untied"])
def test_new_tokens_in_an_embedding_that_is_trained_whole(tmp_path: Path, kind: str) -> None:
    base = base_folder(tmp_path / "base", kind)
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    settings = {**RUN, "new_tokens": NEW, "modules_to_save": ["embed_tokens"]}
    done = trained(tmp_path / "out", base, rows, **settings)
    assert "trained whole: " in done.out
    assert ("rows of 2 tokens" in done.out) == (kind == "untied")  # then those of the head alone
    weight = done.weights["base_model.model.model.embed_tokens.weight"]
    assert weight.shape[0] == len(characters()) + 2
    for verb in (["verify"], ["merge", "--output_dir", str(tmp_path / "merged")]):
        ended = command(tmp_path, verb[0], str(done.folder), *verb[1:])
        assert ended.status == 0, ended.out + ended.err
    own, other = (load_policy(folder, device="cpu") for folder in (done.folder, tmp_path / "merged"))
    row = {"document": "wind, storm<hot>"}
    assert own.generate(row, max_new_tokens=8) == other.generate(row, max_new_tokens=8)


def test_module_that_is_quantised_or_has_an_adapter_is_refused_before_weights_are_read(
    place: Path, tmp_path: Path
) -> None:
    base = base_folder(tmp_path / "base", "untied")
    for settings, message in (
        ({"quantization": "fp8"}, "modules_to_save: model.layers.0.mlp will be quantised; leave it out"),
        ({}, "keep the adapter out of it with --exclude_modules '[model.layers.0.mlp]'"),
    ):
        refused = sft(
            tmp_path / "out", base, place / "rows.jsonl", modules_to_save=["layers.0.mlp"], **settings
        )
        assert refused.status == 2 and message in refused.err, refused.err
        assert "parameters trained" not in refused.out
        assert not (tmp_path / "out").exists()


def test_merged_model_of_a_base_in_bfloat16_has_its_number_format(place: Path, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "untied")
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    settings = {**RUN, "modules_to_save": ["lm_head"], "dtype": "bfloat16", "max_steps": 2}
    done = trained(tmp_path / "out", base, place / "rows.jsonl", **settings)
    assert {weight.dtype for weight in done.weights.values()} == {torch.float32}
    merged = command(tmp_path, "merge", str(done.folder), "--output_dir", str(tmp_path / "merged"))
    assert merged.status == 0, merged.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    head = done.weights["base_model.model.lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head.to(torch.bfloat16))
