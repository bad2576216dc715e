"""Full fine-tuning in two processes, compared with one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.faults.zygote import Zygote, together
from tests.pairs import PLAIN, dpo, pairs
from tests.runs import SETTINGS, Done, articles, left_behind, model_folder, sft, write_jsonl

pytestmark = pytest.mark.slow
FULL: dict[str, object] = {
    "train": "full",
    "learning_rate": 1e-3,
    "lora_r": None,
    "lora_alpha": None,
    "adam_epsilon": 1e-5,  # else Adam makes full steps of gradients that are rounding alone, in either direction
}
UNEVEN: dict[str, object] = {
    "batch_size": 5,
    "micro_batch_size": 1,
    "val_set_size": 4,
    "eval_steps": 2,
    "card_rows": 1,
}
VERBS = {"sft": (sft, SETTINGS, articles), "dpo": (dpo, PLAIN, pairs)}


def in_two(zygotes: Zygote, verb: str, output: Path, base: Path, data: Path, **settings: object) -> Done:
    options = {"base_model": base, "data_path": data, "output_dir": output, **VERBS[verb][1], **settings}
    done = together(zygotes, verb, options)
    assert done.status == 0, done.err
    return done


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize(
    "verb, family, dtype",
    [
        ("sft", "llama", "float32"),
        ("sft", "llama", "bfloat16"),
        ("sft", "gpt2", "float32"),  # a tied head
        ("sft", "qwen3_moe", "float32"),
        ("sft", "bloom", "float32"),  # one sequence at a time
        ("dpo", "llama", "float32"),
        ("dpo", "llama", "bfloat16"),
    ],
)
def test_two_processes_are_one(
    zygotes: Zygote, tmp_path: Path, verb: str, family: str, dtype: str, shard: bool
) -> None:
    base = model_folder(tmp_path / "model", family)
    run, _, rows = VERBS[verb]
    data = write_jsonl(tmp_path / "rows.jsonl", rows(13))
    settings = {**UNEVEN, **FULL, "dtype": dtype, **({"cutoff_len": 128} if family == "gpt2" else {})}
    one = run(tmp_path / "one", base, data, **settings, cache_dir=tmp_path / "a")
    assert one.status == 0, one.err
    two = in_two(
        zygotes, verb, tmp_path / "two", base, data, **settings, shard=shard, cache_dir=tmp_path / "b"
    )
    tolerance = 1e-5 if dtype == "float32" else 0.03
    assert [line["loss"] for line in two.lines] == pytest.approx(
        [line["loss"] for line in one.lines], abs=tolerance
    )
    if dtype == "float32":
        before, alone, shared = (
            load_file(folder / "model.safetensors") for folder in (base, one.folder, two.folder)
        )
        assert all(float((shared[name] - alone[name]).abs().max()) < 1e-5 for name in alone)
        assert max(float((alone[name] - before[name]).abs().max()) for name in alone) > 1e-3


def test_a_resumed_sharded_run_gives_the_same_bytes(zygotes: Zygote, tmp_path: Path) -> None:
    """Of checkpoints, of which each is a whole model, and of the result, which is the best of them."""
    base = model_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(13))
    settings = {**UNEVEN, **FULL, "dtype": "bfloat16", "save_steps": 2, "num_epochs": 3, "shard": True}
    settings |= {"learning_rate": 1.0, "lr_scheduler": "constant"}  # the first evaluation is the best
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    whole = in_two(zygotes, "sft", tmp_path / "whole/out", base, data, **settings)
    assert "using the model of step" in whole.out
    interrupted = tmp_path / "part/out"
    shutil.copytree(whole.folder, interrupted)
    for checkpoint in interrupted.glob("checkpoint-*"):  # as if the run had ended after step 2
        if checkpoint.name != "checkpoint-2":
            shutil.rmtree(checkpoint)
    record = json.loads((interrupted / "run.json").read_text("utf-8"))
    (interrupted / "run.json").write_text(json.dumps({**record, "finished": False}), "utf-8")
    (interrupted / "model.safetensors").unlink()
    resumed = in_two(zygotes, "sft", interrupted, base, data, **settings)
    assert "continuing after step 2 of" in resumed.out
    expected, found = left_behind(whole.folder), left_behind(interrupted)
    assert {name for name in expected if expected[name] != found[name]} <= {".lock"}
