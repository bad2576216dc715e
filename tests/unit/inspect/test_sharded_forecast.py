"""The forecast of a quantised base that is sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.quantised import KINDS
from tests.runs import articles, command, model_folder, write_jsonl


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sharded")
    base, data = model_folder(folder / "llama"), write_jsonl(folder / "rows.jsonl", articles(9))
    return [
        *(
            "inspect",
            "--base_model",
            str(base),
            "--data_path",
            str(data),
            "--template",
            "{document}\n{title}",
        ),
        *("--rows", "none", "--nproc", "2", "--cache_dir", str(folder / "cache"), "--json", "true"),
    ]


def forecast(place: Path, words: list[str], *more: str) -> dict[str, Any]:
    done = command(place, *words, *more)
    assert done.status == 0, done.err
    found: dict[str, Any] = json.loads(done.out.splitlines()[-1])["forecast"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_holds_half_of_the_packed_weights(tmp_path: Path, words: list[str], kind: str) -> None:
    whole = forecast(tmp_path, words, "--quantization", kind)
    shared = forecast(tmp_path, words, "--quantization", kind, "--shard", "true")
    memory, other = whole["memory"], shared["memory"]
    assert other["weights"] == pytest.approx(memory["weights"] / 2, abs=1) and memory["gathered"] == 0
    assert 0 < other["gathered"] <= memory["weights"] - other["weights"]
    for part in ("lora", "gradients", "optimizer", "activations", "logits"):
        assert other[part] == memory[part], part


def test_more_processes_and_fewer_bits_are_proposed_together(tmp_path: Path, words: list[str]) -> None:
    on_a_gpu = ["--gpu", "24GB", "--quantization", "fp8"]
    assert "shard true" in {one["name"] for one in forecast(tmp_path, words, *on_a_gpu)["alternatives"]}
    sharded = {
        one["name"] for one in forecast(tmp_path, words, "--gpu", "24GB", "--shard", "true")["alternatives"]
    }
    assert {"quantization int8", "quantization nf4"} <= sharded
    dora = ["--shard", "true", "--use_dora", "true"]
    names = {one["name"] for one in forecast(tmp_path, words, *dora)["alternatives"]}
    assert not any(name.startswith("quantization") for name in names)
