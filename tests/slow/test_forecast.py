"""The memory forecast compared with the peak memory of real runs, each in its own process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.runs import TEMPLATE, arguments, characters, read_lines, write_jsonl
from yeonma.model.kernels.linear import has_onednn

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc"),
]

FORECAST = """
import sys
from yeonma.inspect.estimate import estimate
from yeonma.config.parse import read_config
from yeonma.model import load
from yeonma.config.settings import TRAINING, RunConfig
from yeonma.train.prepare import prepare

config = read_config(RunConfig, sys.argv[1:], verb="sft", groups=TRAINING).config
source = load.find_base(config.model.base_model)
prepared = prepare(config, source, None, lambda text: None)
print(estimate(config, source, prepared, with_alternatives=False).memory.peak)
"""

SHAPES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "smollm2": (
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        {"batch_size": 3, "micro_batch_size": 2, "max_steps": 1},
    ),
    "wide": (
        {"vocab_size": 97, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2,
         "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False},
        {"batch_size": 2, "micro_batch_size": 1, "max_steps": 1, "gradient_checkpointing": True},
    ),
    "deep": (
        {"vocab_size": 97, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 32,
         "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False},
        {"batch_size": 5, "micro_batch_size": 5, "max_steps": 1},
    ),
    "vocabulary": (
        {"vocab_size": 150_000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False},
        {"batch_size": 2, "micro_batch_size": 1, "max_steps": 2, "train_on_inputs": True},
    ),
}  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """That of a run by itself: without the number of routines that tests keep."""
    kept = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    return {name: value for name, value in os.environ.items() if name not in kept} | more


def save_model(path: Path, shape: dict[str, object]) -> Path:
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**shape, **tokens, max_position_embeddings=2048)  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(path)
    characters().save_pretrained(path)
    return path


def save_rows(path: Path) -> Path:
    """Documents of 100 to 260 characters, each of which is a token."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(length)).strip() + "."

    lines = [
        {"document": f"{number}. {text(rng.randint(100, 260))}", "title": text(rng.randint(20, 60))}
        for number in range(12)
    ]
    return write_jsonl(path, lines)


@pytest.mark.parametrize("name", SHAPES)
def test_the_forecast_is_within_15_percent_of_the_measured_peak(name: str, tmp_path: Path) -> None:
    shape, settings = SHAPES[name]
    settings = {
        "base_model": save_model(tmp_path / "model", shape),
        "data_path": save_rows(tmp_path / "rows.jsonl"),
        "output_dir": tmp_path / "out",
        "template": TEMPLATE,
        "card_rows": 0,
        **settings,
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command, *arguments(settings)],
            cwd=ROOT, env=environment(YEONMA_CACHE=str(tmp_path / "cache")), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    forecast = int(run("-c", FORECAST).splitlines()[-1])
    run("-m", "yeonma", "sft")
    measured = max(line["peak_memory_bytes"] for line in read_lines(tmp_path / "out"))
    assert measured > 700e6
    assert forecast == pytest.approx(measured, rel=0.15)


ONEDNN_MEMORY = """
from pathlib import Path
import torch
from yeonma.model.kernels.linear import product

def resident():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024

weight, inputs = torch.ones(512, 512), torch.ones(1000, 512)
product(inputs, weight)
before = resident()
for rows in range(900, 100, -1):  # each output fits where the one before was
    product(inputs[:rows], weight)
print(resident() - before)
"""


@pytest.mark.skipif(not has_onednn(), reason="oneDNN plays no part here")
def test_onednn_memory_for_many_shapes_is_bounded() -> None:
    """Without the bound, oneDNN would keep 500 MB for 800 shapes."""
    done = subprocess.run(
        [sys.executable, "-c", ONEDNN_MEMORY],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 250e6
