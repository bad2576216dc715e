"""Full fine-tuning in two processes, compared with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.zygote import Zygote, together
from tests.pairs import PLAIN, dpo, pairs
from tests.runs import SETTINGS, Done, articles, model_folder, sft, write_jsonl

pytestmark = pytest.mark.slow
FULL: dict[str, object] = {"train": "full", "learning_rate": 1e-3, "lora_r": None, "lora_alpha": None}
UNEVEN: dict[str, object] = {
    "batch_size": 5,
    "micro_batch_size": 1,
    "val_set_size": 4,
    "eval_steps": 2,
    "card_rows": 1,
}
VERBS = {"sft": (sft, SETTINGS, articles), "dpo": (dpo, PLAIN, pairs)}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def in_two(zygotes: Zygote, verb: str, output: Path, base: Path, data: Path, **settings: object) -> Done:
    options = {"base_model": base, "data_path": data, "output_dir": output, **VERBS[verb][1], **settings}
    done = together(zygotes, verb, options)
    assert done.status == 0, done.err
    return done


@pytest.mark.parametrize("verb", ["sft", "dpo"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_are_one(zygotes: Zygote, tmp_path: Path, verb: str, dtype: str) -> None:
    base = model_folder(tmp_path / "model")
    run, _, rows = VERBS[verb]
    data = write_jsonl(tmp_path / "rows.jsonl", rows(13))
    settings = {**UNEVEN, **FULL, "dtype": dtype}
    one = run(tmp_path / "one", base, data, **settings, cache_dir=tmp_path / "a")
    assert one.status == 0, one.err
    two = in_two(zygotes, verb, tmp_path / "two", base, data, **settings, cache_dir=tmp_path / "b")
    tolerance = 1e-5 if dtype == "float32" else 0.03
    assert [line["loss"] for line in two.lines] == pytest.approx(
        [line["loss"] for line in one.lines], abs=tolerance
    )
    if dtype == "float32":
        for name, weight in weights_of(two.folder).items():
            assert float((weight - weights_of(one.folder)[name]).abs().max()) < 1e-4, name
