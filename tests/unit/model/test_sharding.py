"""Frozen weights sharded over two processes, compared with the unsharded model in one pass and in a short run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models import tiny_model
from tests.pairs import PLAIN, pairs, tuned
from tests.runs import Done, arguments, model_folder, write_jsonl
from yeonma.model.sharding import gathered_bytes, local_weight_bytes, parts_of
from yeonma.train import model_card
from yeonma.train.step import idle_passes

ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

PASSES = """
import json
import numpy as np
import torch
from tests.models import tiny_model
from yeonma.errors import UserError
from yeonma.model import load
from yeonma.model.attention.dispatch import FOREST
from yeonma.model.forest_support import check_forest_support
from yeonma.model.logprobs import example_logprobs
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.sharding import local_weight_bytes, shard_weights
from yeonma.train.distributed import process_group, rendezvous

ids = [np.random.default_rng(seed).integers(3, 97, 30, dtype=np.int32) for seed in (1, 2)]
trained = [np.arange(30) > 9] * 2


def adapted(family):
    model = tiny_model(family)
    load.add_lora(model, load.LoraShape(4, 8, 0.0, "all-linear"), seed=1)
    with torch.no_grad():  # the second factor begins at 0, and with it the first one's gradient
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return model


def loss_and_gradients(model):
    support = check_forest_support(model)
    patch_kernels(model)
    loss = -example_logprobs(model, support, ids, trained, share_prefix=True).sum()
    loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return support, float(loss), grads


with rendezvous() as met, process_group(met, torch.device("cpu")) as group:
    results = {}
    for family in ("llama", "bloom", "gemma2"):  # by forests, one by one with a tied head, by forests with one
        unsharded, model = adapted(family), adapted(family)
        support, loss, grads = loss_and_gradients(unsharded)
        before = local_weight_bytes(model)
        shard_weights(model, torch.device("cpu"))
        other_support, other_loss, other_grads = loss_and_gradients(model)
        results[family] = {
            "forest": [support.forest, other_support.forest],
            "head": [support.head is not None, other_support.head is not None],
            "loss": [loss, other_loss],
            "gradient": max(float((grad - other_grads[name]).abs().max()) for name, grad in grads.items()),
            "share": local_weight_bytes(model) / before,
        }
    model = adapted("llama")
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.base_layer.weight[-1, -1] = torch.nan  # in the last part
    shard_weights(model, torch.device("cpu"))
    try:
        load.check_finite(model, "tiny")
    except UserError as error:
        results["broken"] = str(error)
    if group.rank == 0:
        print(json.dumps(results))
"""


@pytest.mark.slow
def test_sharded_model_gives_the_unsharded_losses_and_gradients(tmp_path: Path) -> None:
    script = tmp_path / "passes.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{PASSES}")
    done = subprocess.run([*TORCHRUN, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert "layers.1.mlp.up_proj" in results.pop("broken")  # the first process has no shard of it
    assert {family: result["forest"] for family, result in results.items()} == {
        "llama": [True, True],
        "bloom": [False, False],
        "gemma2": [True, True],
    }
    for result in results.values():
        assert result["head"][0] == result["head"][1]
        assert result["loss"][0] == pytest.approx(result["loss"][1], rel=1e-6)
        assert result["gradient"] < 1e-4
        assert result["share"] == pytest.approx(0.5, abs=0.02)  # a weight of 97 rows is split 49 to 48


@pytest.mark.slow
def test_sharded_run_gives_the_result_of_a_run_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DPO run with steps in which a process has no examples, with validation rows, a reference and the model card."""
    monkeypatch.setattr(model_card, "MAX_NEW_TOKENS", 128)  # as in the processes of the other run
    base = model_folder(tmp_path / "llama")
    data = write_jsonl(tmp_path / "rows.jsonl", pairs(9))
    settings: dict[str, object] = {
        "batch_size": 2, "micro_batch_size": 1, "max_steps": 4, "val_set_size": 3, "eval_steps": 2, "card_rows": 2
    }  # fmt: skip
    unsharded = tuned(tmp_path / "one", base, data, **settings, num_epochs=None, cache_dir=tmp_path / "a")
    sharded_settings = {
        **PLAIN,
        "base_model": base,
        "data_path": data,
        "output_dir": tmp_path / "two",
        **settings,
    }
    sharded_settings |= {"num_epochs": None, "nproc": 2, "shard": True, "cache_dir": tmp_path / "b"}
    process = subprocess.run(
        [sys.executable, "-m", "yeonma", "dpo", *arguments(sharded_settings)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    sharded = Done(process.returncode, tmp_path / "two", process.stdout, process.stderr)
    assert (sharded.status, sharded.err) == (0, "")
    assert sharded.out.count("weights sharded over 2 processes") == 1
    assert [line["loss"] for line in sharded.lines] == pytest.approx(
        [line["loss"] for line in unsharded.lines], abs=1e-5
    )
    for name, weight in sharded.weights.items():
        torch.testing.assert_close(weight, unsharded.weights[name], atol=1e-5, rtol=0)
    card = "README.md"
    answers = [
        (run.folder / card).read_text().partition("## Use")[0].partition("## Before")[2]
        for run in (unsharded, sharded)
    ]
    assert answers[0] == answers[1] != ""


def test_shard_has_no_effect_in_a_single_process(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", pairs(5))
    done = tuned(tmp_path / "out", model_folder(tmp_path / "llama"), data, shard=True)
    assert done.out.count("shard has no effect in a single process") == 1
    assert "shared out" not in done.out


def test_processes_with_fewer_passes_make_idle_passes() -> None:
    assert idle_passes([[1, 1, 1], [1], []], 0) == [0, 0, 0]
    assert idle_passes([[1, 1, 1], [1], []], 1) == [0, 1, 1]
    assert idle_passes([[1, 1, 1], [1], []], 2) == [1, 1, 1]
    assert idle_passes([[2, 1], [3, 2, 2]], 0) == [1, 1, 2]  # sequence by sequence
    assert idle_passes([[2, 1], [3, 2, 2]], 1) == [0, 0, 0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "qwen3_moe", "qwen3_next"])
def test_layers_are_found_in_every_family(family: str) -> None:
    model = tiny_model(family)
    parts = parts_of(model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(parts) == 2 + (0 if tied else 2)
    inside = {weight for part in parts for weight in part.parameters()}
    outside = [weight for weight in model.parameters() if weight not in inside]
    assert all(weight.ndim == 1 for weight in outside) or tied or family == "gpt2"  # its position embedding
    assert 0 < gathered_bytes(model) <= local_weight_bytes(model)
    model._no_split_modules = None  # as in a model that comes with its own code
    assert parts_of(model) == parts
