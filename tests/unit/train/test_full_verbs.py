"""A fully fine-tuned model in the other verbs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import yeonma
from tests.runs import Done, articles, command, model_folder, trained, write_jsonl
from tests.unit.export.test_export import stand_in
from tests.unit.train.test_full import TWO_EPOCHS
from yeonma.adapter.prompt_builder import open_prompt_builder
from yeonma.config.settings import ServeSettings
from yeonma.errors import UserError
from yeonma.serve.server import load_served_models, open_adapters
from yeonma.serve.vllm import VllmPlan, vllm_command, why_not

ROW = {"document": "storm harbour."}
__all__ = ["stand_in"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(24))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    return trained(tmp_path_factory.mktemp("whole") / "out", base, data, **TWO_EPOCHS)


def plain_answer(folder: Path, tokens: int) -> str:
    """By transformers alone, from the chat template in the folder."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": ROW["document"]}], add_generation_prompt=True, return_tensors="pt"
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_answers_are_those_of_transformers(run: Done) -> None:
    """Also those of a checkpoint, and from Python."""
    for folder in (run.folder, run.folder / "checkpoint-4"):
        words = ["generate", str(folder), "--row", json.dumps(ROW), "--max_new_tokens", "12"]
        done = command(folder, *words)
        assert done.status == 0, done.err
        assert done.out.removesuffix("\n") == plain_answer(folder, 12)
    assert yeonma.load(run.folder).generate(ROW, max_new_tokens=12) == plain_answer(run.folder, 12)
    with pytest.raises(UserError, match="all weights of this model were trained; use the base model itself"):
        yeonma.load(run.folder, adapter_weights=False).generate(ROW)


def test_compare_with_the_base(tmp_path: Path, run: Done, base: Path, data: Path) -> None:
    words = ["compare", "--models", f"[{base}, {run.folder}]", "--data_path", str(data), "--rows", "4"]
    done = command(tmp_path, *words, "--output_dir", str(tmp_path / "report"))
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "report/report.json").read_text("utf-8"))
    assert "that of out" in json.dumps(report) and "its own" in json.dumps(report)


def test_serve(run: Done) -> None:
    settings = ServeSettings(adapter_dirs=[str(run.folder)])
    served = open_adapters(settings)
    assert served.names == ["out"]
    models = load_served_models(served, settings, lambda _: None)
    assert models.keys() == {"out"}
    with models["out"].active():
        weights = dict(models["out"].model.named_parameters())
    stored = load_file(run.folder / "model.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in stored.items())
    with pytest.raises(UserError, match="it is served alone"):
        open_adapters(ServeSettings(adapter_dirs=[str(run.folder), str(run.folder / "checkpoint-4")]))


def test_vllm_gets_the_folder_as_its_model(run: Done) -> None:
    assert why_not([open_prompt_builder(run.folder)]) == ""
    plan = VllmPlan(str(run.folder), "out", None, {}, "127.0.0.1", 8000, "auto", False, 0.0, 1024)
    words = vllm_command(plan)
    assert words[words.index("--tokenizer") + 1] == str(run.folder)
    assert words[words.index("--chat-template") + 1] == str(run.folder / "chat_template.jinja")
    assert not any("lora" in word for word in words)


def test_export_converts_the_folder_itself(stand_in: Path, tmp_path: Path, run: Done) -> None:
    before = sorted(path.name for path in run.folder.iterdir())
    done = command(tmp_path, "export", str(run.folder), "--output_dir", str(tmp_path / "G"))
    assert done.status == 0, done.err
    assert (tmp_path / "G/G-f16.gguf").is_file()
    assert sorted(path.name for path in run.folder.iterdir()) == before


def test_push_sends_the_model_and_not_the_run(tmp_path: Path, run: Done) -> None:
    words = [
        "push",
        str(run.folder),
        "--repo",
        "someone/model",
        "--base_model",
        "someone/base",
        "--hide_paths",
        "true",
    ]
    done = command(tmp_path, *words, "--dry_run", "true")
    assert done.status == 0, done.err
    sent, _, kept = done.out.partition("not sent:")
    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "yeonma.json",
    ):
        assert f"  {name} " in sent
    assert "checkpoint-4/" in kept and "run.json" in kept and "metrics.jsonl" in kept


def test_there_is_nothing_to_merge(tmp_path: Path, run: Done) -> None:
    done = command(tmp_path, "merge", str(run.folder), "--output_dir", str(tmp_path / "M"))
    assert done.status == 2 and "there is no adapter to merge; use it as it is" in done.err


def verified(folder: Path) -> tuple[int, dict[str, str]]:
    done = command(folder, "verify", str(folder), "--json", "true")
    found = json.loads(done.out)
    return done.status, {one["check"]: one["outcome"] for one in found["findings"]}


def test_verify(tmp_path: Path, run: Done) -> None:
    status, outcomes = verified(run.folder)
    assert status == 0 and outcomes["model"] == outcomes["run"] == outcomes["base's content"] == "well"
    assert outcomes["files"] == outcomes["checkpoint-4"] == "well" and "adapter" not in outcomes
    assert verified(run.folder / "checkpoint-4")[0] == 0
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in run.folder.iterdir():
        if path.is_file() and path.name not in ("run.json", "metrics.jsonl"):
            shutil.copyfile(path, alone / path.name)
    status, outcomes = verified(alone)
    assert status == 0 and outcomes["model"] == outcomes["files"] == "well"
    weights = load_file(alone / "model.safetensors")
    weights["model.norm.weight"][0] = np.nan
    save_file(weights, alone / "model.safetensors", {"format": "pt"})
    status, outcomes = verified(alone)
    assert status == 1 and outcomes["model"] == outcomes["files"] == "differs"
    del weights["model.norm.weight"]
    save_file(weights, alone / "model.safetensors", {"format": "pt"})
    os.unlink(alone / "manifest.json")
    assert verified(alone)[1]["model"] == "differs"


def test_inspect_forecasts_weights_gradients_and_averages(tmp_path: Path, base: Path, data: Path) -> None:
    for dtype, sizes in (("float32", (4, 0, 4, 8)), ("bfloat16", (2, 4, 4, 8))):
        words = ["--base_model", str(base), "--data_path", str(data), "--train", "full", "--dtype", dtype]
        done = command(tmp_path, "inspect", *words, "--template", "{document}\n{title}", "--json", "true")
        assert done.status == 0, done.err
        about = json.loads(done.out.splitlines()[-1])
        forecast, memory = about["forecast"], about["forecast"]["memory"]
        numbers = sum(weight.numel() for weight in load_file(base / "model.safetensors").values())
        assert (forecast["parameters_trained"], forecast["parameters_frozen"]) == (numbers, 0)
        names = ("weights", "copies", "gradients", "optimizer")
        found = [memory[name] / numbers for name in names]
        assert np.allclose(found, sizes, rtol=0.02) and memory["lora"] == 0 and about["adapter"] is None
        names_of_others = [one["name"] for one in forecast["alternatives"]]
        assert "train lora" in names_of_others and "shard true" not in names_of_others
        words += ["--nproc", "2", "--shard", "true", "--template", "{document}\n{title}", "--json", "true"]
        done = command(tmp_path, "inspect", *words)
        memory = json.loads(done.out.splitlines()[-1])["forecast"]["memory"]
        found = [memory[name] / numbers for name in ("weights", "copies", "optimizer")]
        assert (
            np.allclose(found, [sizes[0] / 2, sizes[1] / 2, sizes[3] / 2], rtol=0.02) and memory["gathered"]
        )
