"""Runs of several processes match runs of one, and the tutorial's command runs unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.runs import SETTINGS, Done, arguments, articles, model_folder, trained, write_jsonl
from tests.tokenizers import byte_level

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
YEONMA = [sys.executable, "-m", "yeonma", "sft"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(21))


def run_command(command: list[str], output: Path, base: Path, data: Path, **settings: object) -> Done:
    """Like `tests.runs.sft`, but in separate processes."""
    options = {"base_model": base, "data_path": data, "output_dir": output, **SETTINGS, **settings}
    done = subprocess.run([*command, *arguments(options)], cwd=ROOT, capture_output=True, text=True)
    return Done(done.returncode, output, done.stdout, done.stderr)


def assert_same_run(several: Done, one: Done) -> None:
    assert (several.status, several.err) == (0, "")
    for name in ("step", "epoch", "examples", "tokens", "trained_tokens", "learning_rate"):
        assert [line.get(name) for line in several.lines] == [line.get(name) for line in one.lines]
    losses = [line["loss"] for line in one.lines]
    assert [line["loss"] for line in several.lines] == pytest.approx(losses, abs=1e-5)
    for name, weight in several.weights.items():
        assert float((weight - one.weights[name]).abs().max()) < 1e-3, name
    assert len(list(several.folder.rglob("metrics.jsonl"))) == 1
    assert {path.name for path in several.folder.iterdir()} == {path.name for path in one.folder.iterdir()}
    step_lines = [line for line in several.out.splitlines() if " step " in f" {line}"]
    assert len(step_lines) == len(one.lines)  # only one process prints


def test_two_torchrun_processes_match_the_results_of_one(tmp_path: Path, base: Path, data: Path) -> None:
    settings: dict[str, object] = {"batch_size": 5, "val_set_size": 4, "eval_steps": 2, "num_epochs": 2}
    one = trained(tmp_path / "one", base, data, **settings)
    assert {line["examples"] for line in one.steps} == {5, 2}
    two = run_command([*TORCHRUN, "sft-trainer.py"], tmp_path / "two", base, data, **settings)
    assert_same_run(two, one)
    # also equal although each process has its own hash seed, which changes the order of sets
    config = "adapter_config.json"
    assert (two.folder / config).read_bytes() == (one.folder / config).read_bytes()


def test_a_step_may_have_fewer_rows_than_there_are_processes(tmp_path: Path, base: Path, data: Path) -> None:
    settings: dict[str, object] = {"batch_size": 1, "max_steps": 4, "num_epochs": None}
    one = trained(tmp_path / "one", base, data, **settings)
    assert_same_run(run_command(YEONMA, tmp_path / "two", base, data, **settings, nproc=2), one)


GRADIENTS = """
import torch
from yeonma.train.distributed import process_group, rendezvous, sum_gradients

with rendezvous() as met, process_group(met, torch.device("cpu")) as group:
    both, first, none = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, 2.0]) * (group.rank + 1)
    first.grad = torch.tensor([5.0, 0.0]) if group.first else None
    loss = sum_gradients(group, [both, none, first], torch.tensor([0.5]))
    if not group.first:
        print(both.grad.tolist(), first.grad.tolist(), none.grad, loss.tolist())
"""


def test_a_parameter_keeps_a_gradient_if_any_process_has_one(tmp_path: Path) -> None:
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    done = subprocess.run(
        [*TORCHRUN, str(tmp_path / "gradients.py")], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[3.0, 6.0] [5.0, 0.0] None [1.0]\n"


def test_several_processes_report_an_error_once(tmp_path: Path, base: Path, data: Path) -> None:
    done = run_command(YEONMA, tmp_path / "out", base, data, early_stopping_patience=2, nproc=2)
    cure = "give val_set_size, val_split or val_data_path"
    message = f"yeonma: early_stopping_patience: it follows the validation loss; {cure}\n"
    assert (done.status, done.err) == (2, message)
    assert not done.folder.exists()


TUTORIAL = r"""
torchrun --nproc_per_node=4 --master_port=1234 sft-trainer.py \
    --base_model beomi/llama-2-ko-7b --data-path daekeun-ml/naver-news-summarization-ko --output_dir ./title-generator \
    --batch_size 8 --micro_batch_size 1 --num_epochs 3 --learning_rate 1e-5 --cutoff_len 2048 --val_set_size 0 \
    --lora_r 16 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules '[gate_proj, down_proj, up_proj]' \
    --train_on_inputs False --add_eos_token True --group_by_length False --lr_scheduler 'linear' --warmup_steps 100
"""


def test_tutorial_command_runs_unchanged(tmp_path: Path) -> None:
    tokenizer = byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    model = tmp_path / "beomi" / "llama-2-ko-7b"  # folders named like the repositories on the hub
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = tmp_path / "daekeun-ml" / "naver-news-summarization-ko"
    rows.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([news(number) for number in range(10)]), rows / "train.parquet")
    (tmp_path / "sft-trainer.py").write_bytes((ROOT / "sft-trainer.py").read_bytes())

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", TUTORIAL], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    run = Done(done.returncode, tmp_path / "title-generator", done.stdout, done.stderr)
    assert [line["examples"] for line in run.steps] == [8, 2] * 3
    rates = [step / 100 * 1e-5 for step in range(6)]
    assert [line["learning_rate"] for line in run.steps] == pytest.approx(rates)
    adapter = json.loads((run.folder / "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (16, 16, 0.05)
    assert "### 제목:\n{title}" in (run.folder / "template.txt").read_text()


def news(number: int) -> dict[str, str]:
    return {
        "date": f"2022-07-0{number % 9 + 1} 17:21:00",
        "category": "economy",
        "press": "YTN",
        "title": f"{number}호 도서관, 한 해 더 연다",
        "document": "시의회는 오래된 도서관을 한 해 더 열어 두기로 했다. " * (number + 1),
        "link": f"https://news.example/{number}",
        "summary": "도서관이 한 해 더 열린다.",
    }


@pytest.mark.parametrize("processes", [2, 3])
def test_a_mixture_has_the_same_rows_in_any_number_of_processes(
    processes: int, tmp_path: Path, base: Path, data: Path
) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", articles(5, seed=3))
    last = write_jsonl(tmp_path / "last.jsonl", articles(9, seed=4))
    data_path = [
        {"path": str(data), "weight": 4},
        {"path": str(more), "weight": 2},
        {"path": str(last), "weight": 1},
    ]
    settings: dict[str, object] = {"batch_size": 5, "max_steps": 6, "val_set_size": 2, "eval_steps": 3}
    one = trained(tmp_path / "one", base, data_path, **settings)  # type: ignore[arg-type]
    several = run_command(
        YEONMA,
        tmp_path / "several",
        base,
        data_path,
        **settings,
        num_epochs=None,
        nproc=processes,  # type: ignore[arg-type]
    )
    assert_same_run(several, one)
    rows = [(done.folder / "trained_rows.jsonl").read_text("utf-8") for done in (one, several)]
    assert rows[0] == rows[1]
    for looks in zip(one.looks, several.looks, strict=True):
        assert looks[1]["losses"] == pytest.approx(looks[0]["losses"], abs=1e-5)
