"""Full fine-tuning: what the folder holds, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.pairs import dpo, labelled
from tests.runs import (
    Done,
    arguments,
    articles,
    command,
    left_behind,
    model_folder,
    sft,
    trained,
    unfinished_copy,
    write_jsonl,
)
from tests.unit.train.test_full import FULL, TWO_EPOCHS, weights_of
from yeonma.adapter import full_model
from yeonma.config.settings import ModelSettings
from yeonma.errors import UserError
from yeonma.model.published import published_in
from yeonma.run_folder.checkpoint import checkpoints, step_of
from yeonma.train.full_settings import check_full_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(24))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    """A run in bfloat16."""
    return trained(tmp_path_factory.mktemp("whole") / "out", base, data, **TWO_EPOCHS, dtype="bfloat16")


# ------------------------------------------------------------------------------------------ the folder


def test_the_folder_is_a_model_in_the_format_of_the_run(base: Path, whole: Done) -> None:
    """Its prompts are those of training, and its card says what it is."""
    dtype = getattr(torch, json.loads((whole.folder / "run.json").read_text("utf-8"))["identity"]["dtype"])
    model = AutoModelForCausalLM.from_pretrained(whole.folder)
    assert model.dtype == dtype and {weight.dtype for weight in weights_of(whole.folder).values()} == {dtype}
    of_checkpoint = weights_of(whole.folder / "checkpoint-10")
    assert {weight.dtype for weight in of_checkpoint.values()} == {torch.float32}
    assert not any(torch.equal(weight, weights_of(base)[name]) for name, weight in of_checkpoint.items())
    card = (whole.folder / "README.md").read_text("utf-8")
    assert "library_name: transformers" in card and "with all of its weights fine-tuned" in card
    assert "`after` is the model in this folder" in card and "lora" not in card and "adapter on" not in card
    sample = card.partition("## Before and after")[2]
    before, after = sample.partition("base model:")[2].partition("fine-tuned:")[::2]
    assert before.strip() and after.strip() and before.strip() != after.partition("## Use")[0].strip()
    assert "lora" not in (whole.folder / "settings.yaml").read_text("utf-8")


def test_the_settings_of_a_run_repeat_it(tmp_path: Path, whole: Done) -> None:
    words = ["--config", str(whole.folder / "settings.yaml"), "--output_dir", str(tmp_path / "out")]
    assert command(tmp_path / "out", "sft", *words).status == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        whole.folder / "model.safetensors"
    ).read_bytes()


def test_weights_may_be_in_several_files(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run leaves none of them behind, whatever it trains."""
    one = trained(tmp_path / "one", base, data, **FULL, max_steps=2)
    monkeypatch.setattr(full_model, "SHARD_BYTES", 40_000)
    several = trained(tmp_path / "several", base, data, **FULL, max_steps=2)
    assert len(list(several.folder.glob("model-*.safetensors"))) > 1
    models = [AutoModelForCausalLM.from_pretrained(done.folder) for done in (one, several)]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())
    trained(several.folder, base, data, max_steps=1, overwrite=True)
    assert not list(several.folder.glob("model*")) and not (several.folder / "config.json").exists()


def test_damaged_checkpoints_are_passed_over(tmp_path: Path, whole: Done, base: Path, data: Path) -> None:
    """Weights that are not those of the manifest; and a manifest without weights, which no run writes."""
    (tmp_path / "again").mkdir()
    output = unfinished_copy(whole.folder, tmp_path / "again/out")
    third, second, newest = checkpoints(output)[-3:]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    manifest = second / "manifest.json"
    sums = json.loads(manifest.read_text("utf-8"))["sha256"]
    del sums["model.safetensors"]
    manifest.write_text(json.dumps({"sha256": sums}), "utf-8")
    done = trained(output, base, data, **TWO_EPOCHS, dtype="bfloat16")
    assert f"skipping {newest.name}, which is damaged" in done.out
    assert f"{manifest}: it has no SHA-256 of model.safetensors" in done.out
    assert f"continuing after step {step_of(third)} of" in done.out
    assert left_behind(output) == left_behind(whole.folder)


def test_another_model_is_never_overwritten(tmp_path: Path, base: Path, data: Path) -> None:
    other = model_folder(tmp_path / "other", seed=1)
    before = (other / "model.safetensors").read_bytes()
    done = sft(other, base, data, **FULL, overwrite=True)
    assert done.status == 2 and "it holds a model that is not from a run" in done.err
    assert (other / "model.safetensors").read_bytes() == before


# ------------------------------------------------------------------------------------------ refused in words


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "rank": ({"lora_r": 16}, "lora_r: it shapes an adapter, and full fine-tuning has none; leave it out"),
    "DoRA": ({"use_dora": False}, "use_dora: it shapes an adapter"),
    "quantisation": ({"quantization": "int8"}, "quantization int8: quantised weights cannot be trained"),
    "float16": ({"dtype": "float16"}, "dtype float16: in float16 the gradients of weights are lost"),
}


@pytest.mark.parametrize("what", sorted(REFUSED))
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, base: Path, data: Path, what: str) -> None:
    settings, message = REFUSED[what]
    done = sft(tmp_path / "out", base, data, **{**FULL, **settings})
    assert done.status == 2 and message in done.err
    assert not (tmp_path / "out").exists()
    words = {"base_model": base, "data_path": data, "template": "{document}\n{title}", "train": "full"}
    looked = command(tmp_path, "inspect", *arguments({**words, **settings}))
    assert looked.status == 2 and message in looked.err


def test_what_does_not_go_with_sharding_is_refused(tmp_path: Path, base: Path) -> None:
    data = write_jsonl(tmp_path / "labelled.jsonl", labelled(9))
    done = dpo(tmp_path / "out", base, data, **FULL, shard=True, loss="kto", optimizer="adamw_8bit")
    assert done.status == 2 and "shard true: kto keeps a copy of the weights as they were" in done.err
    assert "optimizer adamw_8bit: 8-bit averages of sharded weights are not supported" in done.err


def test_bases_that_cannot_be_trained_as_they_are_are_refused(base: Path) -> None:
    settings = ModelSettings(base_model="theirs", train="full")
    config = AutoConfig.from_pretrained(base)
    check_full_base(settings, config, None)
    config.auto_map = {"AutoModelForCausalLM": "code.Model"}
    packed = published_in({"quantization_config": {"quant_method": "mxfp4"}}, "theirs")
    with pytest.raises(UserError) as error:
        check_full_base(settings, config, packed)
    text = str(error.value)
    assert "theirs: its weights are published as" in text and "give the unquantised model" in text
    assert "theirs: it comes with its own Python code" in text
    check_full_base(replace(settings, train="lora"), config, packed)


def test_an_adapter_is_not_continued_in_full(tmp_path: Path, base: Path, data: Path) -> None:
    adapter = trained(tmp_path / "adapter", base, data, max_steps=1).folder
    for words in ({"adapter": adapter}, {"base_model": adapter}):
        done = sft(tmp_path / "out", base, data, **{**FULL, **words})
        assert done.status == 2 and "is an adapter, and full fine-tuning trains the weights" in done.err
    whole = trained(tmp_path / "whole", base, data, **FULL, max_steps=1).folder
    continued = trained(tmp_path / "more", whole, data, **FULL, max_steps=1)  # a model like any other
    assert continued.losses != trained(tmp_path / "again", base, data, **FULL, max_steps=1).losses
    switched = sft(whole, base, data, max_steps=1)
    assert switched.status == 2 and "train was 'full' and is now 'lora'" in switched.err
