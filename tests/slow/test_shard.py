"""Sharded runs of two processes, compared with runs of one: families, losses, uneven shares, resuming, and memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.faults.zygote import Zygote, together
from tests.pairs import PLAIN, dpo, pairs
from tests.runs import SETTINGS, Done, articles, characters, model_folder, sft, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
VERBS = {"sft": (sft, SETTINGS, articles), "dpo": (dpo, PLAIN, pairs)}
UNEVEN: dict[str, object] = {"batch_size": 5, "micro_batch_size": 1, "val_set_size": 4, "eval_steps": 2}

pytestmark = pytest.mark.slow


def sharded(zygotes: Zygote, verb: str, output: Path, base: Path, data: Path, **settings: object) -> Done:
    options = {"base_model": base, "data_path": data, "output_dir": output, **VERBS[verb][1], **settings}
    return together(zygotes, verb, {**options, "shard": True})


@pytest.mark.parametrize(
    ("verb", "family", "settings"),
    [
        ("sft", "llama", {"gradient_checkpointing": True}),
        ("sft", "llama", {"batch_size": 1, "max_steps": 4, "num_epochs": None}),
        ("sft", "gpt2", {"cutoff_len": 128}),  # a tied head, and Conv1D instead of Linear layers
        ("sft", "bloom", {}),  # one sequence at a time
        ("sft", "gemma2", {"use_dora": True}),
        ("sft", "qwen3_moe", {}),
        ("sft", "llama", {"new_tokens": ["storm", "wind"], "modules_to_save": ["norm"]}),
        ("sft", "llama", {"modules_to_save": ["lm_head"], "loraplus_ratio": 4, "lora_layers": 1}),
        ("dpo", "gpt2", {"cutoff_len": 128, "new_tokens": ["model", "year"]}),  # one matrix for both ends
        ("dpo", "llama", {"use_rslora": True}),
        ("dpo", "bloom", {}),
        ("dpo", "gpt2", {"cutoff_len": 128, "gradient_checkpointing": True}),
        ("dpo", "llama", {"loss": "kto"}),
    ],
)
def test_sharded_run_matches_the_losses_and_weights_of_one_process(
    zygotes: Zygote, tmp_path: Path, verb: str, family: str, settings: dict[str, object]
) -> None:
    base = model_folder(tmp_path / "model", family)
    in_one_process, _, rows = VERBS[verb]
    examples = rows(13)
    if settings.get("loss") == "kto":
        examples = [  # type: ignore[misc]
            {
                "prompt": row["prompt"],
                "completion": row["chosen" if i % 2 else "rejected"],
                "label": i % 2 == 1,
            }
            for i, row in enumerate(examples)
        ]
    data = write_jsonl(tmp_path / "rows.jsonl", examples)
    settings = {**UNEVEN, **settings}
    one = in_one_process(tmp_path / "one", base, data, **settings, cache_dir=tmp_path / "a")
    assert one.status == 0, one.err
    two = sharded(zygotes, verb, tmp_path / "two", base, data, **settings, cache_dir=tmp_path / "b")
    assert two.status == 0, two.err
    assert [line["loss"] for line in two.lines] == pytest.approx(
        [line["loss"] for line in one.lines], abs=1e-5
    )
    for name, weight in two.weights.items():
        assert float((weight - one.weights[name]).abs().max()) < 1e-4, name


def assert_resumes_to_the_same_bytes(zygotes: Zygote, folder: Path, **settings: object) -> None:
    """A sharded run that ended after step 2 goes on to the bytes of one that was not interrupted."""
    base = model_folder(folder / "model")
    data = write_jsonl(folder / "rows.jsonl", articles(13))
    settings = {**UNEVEN, "lora_dropout": 0.2, "save_steps": 2, "num_epochs": 2, **settings}
    uninterrupted = sharded(zygotes, "sft", folder / "whole", base, data, **settings)
    assert uninterrupted.status == 0, uninterrupted.err
    interrupted = folder / "part"
    shutil.copytree(uninterrupted.folder, interrupted)
    for checkpoint in interrupted.glob("checkpoint-*"):  # as if the run had ended after step 2
        if checkpoint.name != "checkpoint-2":
            shutil.rmtree(checkpoint)
    run = json.loads((interrupted / "run.json").read_text())
    (interrupted / "run.json").write_text(json.dumps({**run, "finished": False}))
    (interrupted / "adapter_model.safetensors").unlink()
    resumed = sharded(zygotes, "sft", interrupted, base, data, **settings)
    assert resumed.status == 0, resumed.err
    assert "continuing after step 2 of" in resumed.out
    assert resumed.weight_bytes == uninterrupted.weight_bytes
    assert resumed.losses == uninterrupted.losses


def test_resumed_sharded_run_gives_the_same_bytes(zygotes: Zygote, tmp_path: Path) -> None:
    assert_resumes_to_the_same_bytes(zygotes, tmp_path)


MEMORY = """
import json
import sys
from pathlib import Path
import peft  # and what it imports: code that is imported later would count as weights
import torch
from yeonma.model import load
from yeonma.model.forest_support import check_forest_support
from yeonma.model.sharding import gathered_bytes, local_weight_bytes, shard_weights
from yeonma.train.distributed import process_group, rendezvous, wait
from yeonma.run_folder.progress import status_bytes

with rendezvous() as met, process_group(met, torch.device("cpu")) as group:
    before = {name: status_bytes(name) for name in ("RssAnon", "RssFile")}
    model = load.load_base(load.BaseSource(sys.argv[1]), None, torch.float32)
    load.add_lora(model, load.LoraShape(4, 8, 0.0, "all-linear"), seed=1)
    unsharded, gathered = local_weight_bytes(model), gathered_bytes(model)
    shard_weights(model, torch.device("cpu"))
    after = {name: status_bytes(name) - before[name] for name in before}
    check_forest_support(model)
    passed = {name: status_bytes(name) - before[name] for name in before}
    sizes = {"unsharded": unsharded, "gathered": gathered, "local": local_weight_bytes(model)}
    sizes |= {"after": after, "passed": passed}
    Path(sys.argv[2], f"{group.rank}.json").write_text(json.dumps(sizes))
    wait(group)
"""


def test_each_process_holds_half_of_the_frozen_weights(tmp_path: Path) -> None:
    """By the sizes of the tensors, and by the process's memory: anonymous pages, and pages of the weights' file."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    characters().save_pretrained(tmp_path / "model")
    script = tmp_path / "memory.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{MEMORY}")
    command = [*TORCHRUN, str(script), str(tmp_path / "model"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        sizes = json.loads((tmp_path / f"{rank}.json").read_text())
        unsharded = sizes["unsharded"]
        assert unsharded > 250e6
        assert sizes["local"] == pytest.approx(unsharded / 2, rel=0.01)
        lora = 20e6  # the adapter, and code imported in the meantime
        assert sizes["after"]["RssAnon"] < unsharded / 2 + sizes["gathered"] + lora
        assert sizes["after"]["RssFile"] < 0.2 * unsharded + lora  # the file's pages have been released
        assert sizes["passed"]["RssAnon"] < unsharded / 2 + 2 * sizes["gathered"] + lora
