"""Runs on quantised bases: output, resuming, refusals, and answers of their adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.pairs import pairs, tuned
from tests.quantised import INT8, KINDS, NF4
from tests.runs import Done, arguments, articles, command, model_folder, sft, trained, write_jsonl
from yeonma.adapter.prompt_builder import open_prompt_builder
from yeonma.config.settings import CompareSettings, ServeSettings
from yeonma.data.rows import open_rows
from yeonma.errors import UserError
from yeonma.evaluate.candidates import identity_of, open_candidates
from yeonma.model import quantization
from yeonma.model.quantized import packed_layers
from yeonma.packages import install
from yeonma.policy import load_policy
from yeonma.serve.server import load_served_models, open_adapters
from yeonma.serve.vllm import why_not
from yeonma.train import loop, run

SETTINGS: dict[str, object] = {
    "max_steps": 6,
    "save_steps": 2,
    "lora_dropout": 0.1,
    "card_rows": 1,
    "val_set_size": 3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(17))


@pytest.fixture(scope="module")
def unquantised_run(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    """The run on unquantised weights."""
    return trained(tmp_path_factory.mktemp("none") / "out", base, data, **SETTINGS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> dict[str, Done]:
    """The same run on quantised weights, by kind; run once, when a test needs it."""
    return _LazyRuns(tmp_path_factory, base, data)


class _LazyRuns(dict[str, Done]):
    def __init__(self, tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> None:
        super().__init__()
        self.tmp_path_factory, self.base, self.data = tmp_path_factory, base, data

    def __missing__(self, kind: str) -> Done:
        output = self.tmp_path_factory.mktemp(kind) / "out"
        self[kind] = trained(output, self.base, self.data, quantization=kind, **SETTINGS)
        return self[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_run_prints_and_records_its_quantization(runs: dict[str, Done], kind: str) -> None:
    done = runs[kind]
    assert done.out.count(f"dense layers in {kind}: ") == 1
    assert json.loads((done.folder / "yeonma.json").read_text())["quantization"] == kind
    assert json.loads((done.folder / "checkpoint-2" / "yeonma.json").read_text())["quantization"] == kind
    assert json.loads((done.folder / "run.json").read_text())["identity"]["quantization"] == kind
    assert f"quantization: {kind}" in (done.folder / "settings.yaml").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_losses_are_near_but_not_equal_to_unquantised_losses(
    runs: dict[str, Done], unquantised_run: Done, kind: str
) -> None:
    largest_gap = max(abs(a - b) for a, b in zip(runs[kind].losses, unquantised_run.losses, strict=True))
    assert 0 < largest_gap < {"int8": 0.02, "fp8": 0.25, "nf4": 0.5}[kind]
    assert runs[kind].looks[-1]["loss"] < runs[kind].looks[0]["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_with_the_same_bytes(
    tmp_path: Path, base: Path, data: Path, runs: dict[str, Done], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, calls = loop.train_step, 0

    def interrupted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return train_step(*args)  # type: ignore[arg-type]

    settings = {**SETTINGS, "quantization": kind}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        assert sft(tmp_path / "out", base, data, **settings).status == 130
    done = trained(tmp_path / "out", base, data, **settings)
    assert "continuing after step 2" in done.out
    assert done.weight_bytes == runs[kind].weight_bytes
    assert done.losses == runs[kind].losses
    optimizer = "checkpoint-6/optimizer.safetensors"
    assert (done.folder / optimizer).read_bytes() == (runs[kind].folder / optimizer).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_do_not_depend_on_micro_batch_size(
    tmp_path: Path, base: Path, data: Path, runs: dict[str, Done], kind: str
) -> None:
    settings = {**SETTINGS, "lora_dropout": 0, "max_steps": 3, "quantization": kind}
    one, four = (
        trained(tmp_path / str(size), base, data, **settings, micro_batch_size=size) for size in (1, 4)
    )
    # fp8 may round activations that differ in their last bit to neighbours an eighth apart
    assert one.losses == pytest.approx(four.losses, abs=2e-2 if kind == "fp8" else 1e-5)


def test_changed_quantization_refuses_to_continue_a_run(
    tmp_path: Path, base: Path, data: Path, runs: dict[str, Done]
) -> None:
    folder = Path(shutil.copytree(runs["fp8"].folder, tmp_path / "out"))
    done = sft(folder, base, data, **SETTINGS)
    assert done.status == 2
    assert "quantization was 'fp8' and is now 'none'" in done.err
    assert "optimizer was" not in done.err


def test_older_run_without_recorded_quantization_counts_as_unquantised(
    tmp_path: Path, base: Path, data: Path, unquantised_run: Done
) -> None:
    folder = Path(shutil.copytree(unquantised_run.folder, tmp_path / "out"))
    run_record = json.loads((folder / "run.json").read_text())
    for name in ("quantization", "optimizer"):
        del run_record["identity"][name]
    (folder / "run.json").write_text(json.dumps(run_record))
    assert "holds this run, which is finished" in trained(folder, base, data, **SETTINGS).out
    assert sft(folder, base, data, **SETTINGS, quantization="fp8").status == 2


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_loads_with_its_training_quantization_by_default(
    runs: dict[str, Done], unquantised_run: Done, kind: str
) -> None:
    model = load_policy(runs[kind].folder).model
    assert len(list(packed_layers(model))) == 14
    unquantised_model = load_policy(runs[kind].folder, quantization="none").model
    assert not list(packed_layers(unquantised_model))
    assert not list(packed_layers(load_policy(unquantised_run.folder).model))
    row = '{"document": "storm harbour boats"}'
    words = ["generate", str(runs[kind].folder), "--row", row, "--max_new_tokens", "6"]
    auto, explicit = (
        command(runs[kind].folder, *words),
        command(runs[kind].folder, *words, "--quantization", kind),
    )
    assert auto.status == 0 and auto.out == explicit.out
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert float((model(ids).logits - unquantised_model(ids).logits).abs().max()) > 1e-3


def test_unknown_quantization_in_an_adapter_folder_is_an_error(tmp_path: Path, runs: dict[str, Done]) -> None:
    folder = Path(shutil.copytree(runs["fp8"].folder, tmp_path / "out"))
    text = (folder / "yeonma.json").read_text()
    (folder / "yeonma.json").write_text(text.replace('"quantization": "fp8"', '"quantization": "fp7"'))
    with pytest.raises(UserError, match="quantization is 'fp7'"):
        open_prompt_builder(folder)


def test_compare_uses_training_quantization_for_adapters_and_their_base(
    base: Path, data: Path, runs: dict[str, Done], unquantised_run: Done
) -> None:
    names = [str(base), str(runs["fp8"].folder), str(unquantised_run.folder)]
    rows = open_rows(str(data))
    base_alone, *_ = open_candidates(
        CompareSettings(models=names[:1], data_path=str(data), template="title"), rows
    )
    assert base_alone.quantization == "none"
    candidates = open_candidates(CompareSettings(models=names, data_path=str(data)), rows)
    assert [candidate.quantization for candidate in candidates] == ["fp8", "fp8", "none"]
    assert candidates[0].weights == candidates[1].weights != candidates[2].weights
    unquantised = open_candidates(
        CompareSettings(models=names, data_path=str(data), quantization="none"), rows
    )
    assert {candidate.quantization for candidate in unquantised} == {"none"}
    cpu = torch.device("cpu")
    assert identity_of(candidates[1], torch.float32, cpu) != identity_of(unquantised[1], torch.float32, cpu)
    assert identity_of(candidates[2], torch.float32, cpu) == identity_of(unquantised[2], torch.float32, cpu)


def test_compare_loads_a_quantised_base_once(
    tmp_path: Path, base: Path, data: Path, runs: dict[str, Done]
) -> None:
    words = {"data_path": data, "rows": 3, "max_new_tokens": 3, "output_dir": tmp_path / "report"}
    models = ["--models", str(base), str(runs["fp8"].folder)]
    done = command(tmp_path / "report", "compare", *models, *arguments(words))
    assert done.status == 0, done.err
    assert done.err.count("loading") == 1


def test_server_refuses_adapters_of_different_quantizations(
    runs: dict[str, Done], unquantised_run: Done
) -> None:
    folders = [str(runs["fp8"].folder), str(unquantised_run.folder)]
    with pytest.raises(UserError, match=r"trained on a base with quantization none, but .* with fp8"):
        open_adapters(ServeSettings(adapter_dirs=folders, max_new_tokens=8))
    adapters = open_adapters(ServeSettings(adapter_dirs=folders, max_new_tokens=8, quantization="none"))
    assert len(adapters.prompt_builders) == 2
    settings = ServeSettings(adapter_dirs=folders[:1], max_new_tokens=8)
    adapters = open_adapters(settings)
    model = next(iter(load_served_models(adapters, settings, lambda _: None).values()))
    assert len(list(packed_layers(model.model))) == 14
    reason = "it would not quantise the base to fp8 as Yeonma does"
    assert why_not(list(adapters.prompt_builders.values())) == reason
    assert why_not(list(adapters.prompt_builders.values()), "none") != reason


def test_reference_cache_is_separate_for_each_quantization(tmp_path: Path, base: Path) -> None:
    rows = write_jsonl(tmp_path / "pairs.jsonl", pairs(9))
    settings = {"max_steps": 2, "cache_dir": tmp_path / "cache"}
    for kind in ("none", "fp8", "none"):
        done = tuned(tmp_path / "out", base, rows, quantization=kind, overwrite=True, **settings)
        # the policy starts as the reference: with log-probabilities of another base the margin would not be 0
        assert done.steps[0]["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert len(list((tmp_path / "cache").glob("*.reference"))) == 2


# Refusals


def refused(tmp_path: Path, base: Path, data: Path, **settings: object) -> str:
    """Returns the error of a run that must be refused before weights are read and leave no output folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_model", None)
        done = sft(tmp_path / "out", base, data, **settings)
    assert done.status == 2, done.out
    assert not (tmp_path / "out").exists()
    return done.err


def test_missing_bitsandbytes_is_reported_with_the_install_command(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    error = refused(tmp_path, base, data, quantization="nf4", optimizer="adamw_8bit", template="{nothing")
    assert f"quantization nf4: bitsandbytes is not installed; {install('bitsandbytes')}" in error
    assert f"optimizer adamw_8bit: bitsandbytes is not installed; {install('bitsandbytes')}" in error
    assert "no built-in template" in error  # all problems together, before torch is imported


@pytest.mark.parametrize("kind", [INT8, NF4])
def test_dora_is_refused_on_sharded_quantised_weights(
    tmp_path: Path, base: Path, data: Path, kind: str
) -> None:
    error = refused(tmp_path, base, data, quantization=kind, shard=True, use_dora=True)
    assert f"quantization {kind}: DoRA needs the unquantised weights" in error


def test_dora_is_refused_on_fp8(tmp_path: Path, base: Path, data: Path) -> None:
    assert "DoRA needs the unquantised weights" in refused(
        tmp_path, base, data, quantization="fp8", use_dora=True
    )


@pytest.mark.parametrize("kind", [NF4])
def test_dora_is_trained_on_nf4(tmp_path: Path, base: Path, data: Path, kind: str) -> None:
    done = trained(tmp_path / "out", base, data, quantization=kind, use_dora=True, max_steps=3)
    assert all(torch.isfinite(weight).all() for weight in done.weights.values())


def test_model_without_supported_layers_is_refused(tmp_path: Path, data: Path) -> None:
    folder = model_folder(tmp_path / "gpt2", "gpt2")
    error = refused(tmp_path, folder, data, quantization="fp8", lora_target_modules="[c_attn]")
    assert "has no dense layers that it supports; use int8 or nf4" in error


def test_a_base_that_is_quantised_already_is_refused(tmp_path: Path, data: Path) -> None:
    folder = model_folder(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert f"{folder} is quantised already" in refused(tmp_path, folder, data, quantization="fp8")


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_require_a_gpu(
    tmp_path: Path, base: Path, data: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: name)
    error = refused(tmp_path, base, data, optimizer=kind, device="cpu")
    assert f"optimizer {kind}: it needs a CUDA device, and the device is cpu" in error


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=NF4.marks) for kind in ("adamw_8bit", "paged_adamw_8bit")]
)
def test_run_with_8_bit_optimizer_resumes_to_the_same_bytes(
    tmp_path: Path, base: Path, data: Path, kind: str
) -> None:
    settings = {**SETTINGS, "optimizer": kind, "quantization": "nf4", "lora_r": 64}
    done = trained(tmp_path / "whole", base, data, **settings)
    trained(tmp_path / "out", base, data, **settings)
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    again = trained(
        tmp_path / "out", base, data, **settings, resume_from_checkpoint=tmp_path / "out" / "checkpoint-4"
    )
    assert again.weight_bytes == done.weight_bytes
