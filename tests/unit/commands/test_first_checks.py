"""What is wrong with a command's settings is said before torch is imported, in one process for each message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.runs import articles, model_folder, trained, write_jsonl
from yeonma.cli import VERBS
from yeonma.commands import first_checks

ROOT = Path(__file__).resolve().parents[3]
WITHOUT_TORCH = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("torch.", "transformers.", "peft.")):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
from yeonma.cli import main
for arguments in json.loads(sys.argv[1]):
    print("==", *arguments, file=sys.stderr, flush=True)
    print(main(arguments), file=sys.stderr, flush=True)
"""
ROW = '{"document": "x"}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and rows."""
    root = tmp_path_factory.mktemp("first")
    model_folder(root / "base")
    write_jsonl(root / "rows.jsonl", articles(8))
    write_jsonl(root / "bodies.jsonl", [{"body": "x"}])
    write_jsonl(root / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trained(root / "titles", root / "base", root / "rows.jsonl", max_steps=1)
    return root


def answers(folder: Path, commands: list[list[str]]) -> list[str]:
    """What each command prints, in a process that cannot import torch; each must end with status 2."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = [part.partition("\n")[2].strip() for part in done.stderr.split("== ")[1:]]
    assert all(text.endswith("\n2") for text in printed), done.stderr
    return [text.removesuffix("\n2") for text in printed]


def test_messages_come_before_torch_is_imported(folder: Path) -> None:
    no_folder = "no such folder; give the output folder of"
    no_hub = "no such folder, and the hub cannot be reached"
    sft = ("sft", "--base_model", "base", "--data_path", "rows.jsonl", "--output_dir", "o")
    dpo = ("dpo", "--base_model", "base", "--data_path", "pairs.jsonl", "--output_dir", "o")
    inspect = ("inspect", "--base_model", "base", "--data_path", "rows.jsonl")
    compared = ("compare", "--models", "base", "titles", "--data_path", "rows.jsonl")
    expected = {
        ("generate", "nosuch", "--row", ROW): no_folder,
        ("generate", "base", "--row", ROW): "this is a whole model, not an adapter",
        ("generate", "titles"): "nothing to answer",
        ("generate", "titles", "--row", '{"document":'): "--row: not JSON",
        ("generate", "titles", "--row", "[1]"): "--row: a row must be an object",
        ("generate", "titles", "--row", '{"documnt": "x"}'): 'did you mean "documnt"?',
        ("generate", "titles", "--row", ROW, "--columns", "{document: bod}"): 'has no column "bod"',
        ("generate", "titles", "--row", ROW, "--columns", "{dokument: document}"): 'no field "dokument"',
        ("generate", "titles", "--row", ROW, "--template", "title"): "has a template of its own",
        ("generate", "titles", "--row", ROW, "--data_set", "a"): "trained on a single data set",
        ("generate", "titles", "--row", ROW, "--base_model", "no/base"): no_hub,
        ("generate", "titles", "--data_path", "nosuch.jsonl"): "no such file or folder",
        ("generate", "titles", "--data_path", "no/data"): "the hub cannot be reached",
        ("generate", "titles", "--data_path", "bodies.jsonl"): 'bodies.jsonl:1: field "document" is missing',
        ("chat", "nosuch"): no_folder,
        ("serve", "nosuch", "--port", "0"): no_folder,
        (
            "compare",
            "--models",
            "no/model",
            "titles",
            "--data_path",
            "rows.jsonl",
            "--output_dir",
            "r",
        ): no_hub,
        ("compare", "--models", "base", "--data_path", "no.jsonl", "--output_dir", "r"): "no such file",
        (
            "compare",
            "--models",
            "base",
            "--data_path",
            "rows.jsonl",
            "--output_dir",
            "rows.jsonl",
        ): "it is a file",
        ("verify", "nosuch"): "nosuch: no such folder; give the output folder of a run",
        ("verify", "titles", "--base_model", "no/model"): no_hub,
        ("verify", "titles", "--data_path", "no.jsonl"): "no such file or folder",
        ("generate", "titles", "--row", ROW, "--max_new_tokens", "5000"): "leave no room for a prompt",
        ("chat", "titles", "--max_new_tokens", "5000"): "leave no room for a prompt",
        (*compared, "--output_dir", "r", "--columns", "{document: bod}"): 'the data has no column "bod"',
        ("merge", "nosuch", "--output_dir", "m"): no_folder,
        ("merge", "titles", "--output_dir", "base"): "it exists already",
        ("export", "nosuch", "--output_dir", "m"): no_folder,
        ("sft", "--base_model", "no/model", "--data_path", "rows.jsonl", "--output_dir", "o"): no_hub,
        (
            *sft,
            "--lora_target_modules",
            "[q_porj]",
        ): 'no layer of the model is called "q_porj"; it has down_proj, ',
        (*sft, "--exclude_modules", "mlp.q_proj"): 'no layer of the model is called "mlp.q_proj"',
        (*sft, "--lora_layers", "1-4"): "lora_layers: the model has no layers 1-4; it has the layers 0-1",
        (*inspect, "--lora_target_modules", "[nosuch]"): 'no layer of the model is called "nosuch"',
        (*inspect, "--rows", "3,9"): "--rows: there is no row 9; the data has rows 1 to 8",
        (*inspect, "--max_rows", "5", "--rows", "4-6"): "--rows: there is no row 6; the data has rows 1 to 5",
        (*sft, "--early_stopping_patience", "2"): "early_stopping_patience: it follows the validation loss",
        (*sft, "--answer_metrics", "exct"): 'answer_metrics: no metric "exct"; did you mean "exact"?',
        (*sft, "--answer_metrics", "none.py:f"): "answer_metrics none.py: cannot be read",
        (*sft, "--keep_best", "exact"): "keep_best: the run does not measure exact",
        (*sft, "--lr_scheduler", "greedy"): "lr_scheduler: it follows the validation loss",
        (*dpo, "--f_alpha", "0.3"): "f_alpha: only the divergence alpha reads it",
        (*dpo, "--train_on_inputs", "true"): "there is nothing to prefer in it",
        (*dpo, "--token_loss", "dft"): "token_loss: preference losses do not read it",
        ("inspect", "--base_model", "no/model", "--data_path", "rows.jsonl"): no_hub,
        (
            "inspect",
            "--base_model",
            "base",
            "--data_path",
            "rows.jsonl",
            "--rows",
            "a",
        ): 'there is no row "a"',
    }
    if find_spec("vllm") is None:
        expected["serve", "titles", "--engine", "vllm", "--port", "0"] = (
            "vLLM cannot serve this: it is not installed"
        )
    printed = answers(folder, [list(command) for command in expected])
    wrong = [
        (command, text)
        for (command, message), text in zip(expected.items(), printed, strict=True)
        if message not in text
    ]
    assert wrong == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_missing_device_is_said_before_torch_is_imported(folder: Path) -> None:
    training = ["--base_model", "base", "--data_path", "rows.jsonl", "--device", "cuda"]
    commands = [
        ["generate", "titles", "--row", ROW, "--device", "cuda"],
        ["chat", "titles", "--device", "cuda"],
        ["serve", "titles", "--device", "cuda", "--port", "0"],
        ["compare", "--models", "base", "--data_path", "rows.jsonl", "--output_dir", "r", "--device", "cuda"],
        ["merge", "titles", "--output_dir", "m", "--device", "cuda"],
        ["export", "titles", "--output_dir", "m", "--device", "cuda"],
        ["sft", *training, "--output_dir", "o"],
        ["inspect", *training],
    ]
    message = "yeonma: device: there is no usable CUDA device; use --device cpu or auto"
    assert answers(folder, commands) == [message] * len(commands)


@pytest.mark.parametrize(
    ("version_file", "has_cuda"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", False),
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", True),
        ("cuda = None\nhip = '6.4'\n", True),
        ("debug = False\n", True),  # another form: torch itself decides
    ],
)
def test_the_build_of_torch_is_read_from_its_file(version_file: str, has_cuda: bool, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError", encoding="utf-8")
    (tmp_path / "torch" / "version.py").write_text(version_file, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from yeonma.model import device_check as d; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(d._torch_has_cuda())"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(has_cuda)


def test_every_verb_that_opens_an_adapter_is_checked_first() -> None:
    named = {name for name, verb in VERBS.items() if verb.check}
    assert named == {"generate", "chat", "compare", "eval", "verify", "merge", "export"}
    assert all(callable(getattr(first_checks, VERBS[name].check)) for name in named)
