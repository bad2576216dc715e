"""llama.cpp reads an exported GGUF file as Yeonma reads the merged model: prompts, their ids, greedy answers.

`make llama` installs xllamacpp, a wheel with llama.cpp's server, in .venv-llama; or $YEONMA_LLAMA_PYTHON names a Python
that has it. The converter is fetched from PyPI, SmolLM2 from the hub or from there.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runs import command
from tests.slow.engines import KINDS, NEW_TOKENS, adapters, asked, engine_base, engine_python
from yeonma import load
from yeonma.data.bundled_samples import FOLDER as SAMPLES
from yeonma.errors import UserError
from yeonma.export.gguf_converter import CONVERTER, convert
from yeonma.export.tool_folder import install_tool
from yeonma.model.load import load_tokenizer
from yeonma.model.smollm2 import fetch
from yeonma.model.source import find_base

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MAX_NEW_TOKENS = 24
PUBLISHED_IDS = {
    "½": [16738],
    "  ½": [256, 16738],
    " ²³ x² ₂": [216, 19133, 39050, 1792, 19133, 216, 44059],
    "٢٣٤ عام ٢٠٢٤": [
        164,
        112,
        164,
        113,
        164,
        114,
        45704,
        10805,
        21706,
        216,
        164,
        112,
        164,
        250,
        164,
        112,
        164,
        114,
    ],
    "123abc456 7 8  9": [33, 34, 35, 25276, 36, 37, 38, 216, 39, 216, 40, 256, 41],
    "가격은 12,300원": [181, 125, 218, 181, 127, 119, 26638, 218, 216, 33, 34, 28, 35, 32, 32, 183, 245, 234],
    "😀1😀 2": [10813, 242, 218, 33, 10813, 242, 218, 216, 34],
    "  12  ": [256, 33, 34, 256],
    "it's 5'll 6're": [269, 506, 216, 37, 3060, 216, 38, 2316],
}


@pytest.fixture(scope="module")
def llama_python() -> str:
    return engine_python("YEONMA_LLAMA_PYTHON", ".venv-llama", "no llama.cpp: `make llama`")


@pytest.fixture(scope="module")
def smollm2(llama_python: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("YEONMA_CACHE")  # the default cache may hold the model and the converter
        try:
            install_tool(CONVERTER)
            return fetch(print)
        except UserError as error:
            pytest.skip(f"not to be had here: {error}")


@pytest.fixture(scope="module")
def tiny(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter for each kind of template on a tiny base."""
    folder = tmp_path_factory.mktemp("tiny")
    return adapters(engine_base(folder / "base", smollm2), folder)


@pytest.fixture(scope="module")
def exported(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on SmolLM2, merged, and the merged model as GGUF."""
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("YEONMA_CACHE")
        options = ["--data_path", str(SAMPLES / "news_en.jsonl"), "--template", str(SAMPLES / "title_en.txt")]
        options += ["--max_steps", "6", "--learning_rate", "1e-3", "--batch_size", "8", "--card_rows", "3"]
        options += ["--val_data_path", str(SAMPLES / "news_en_validation.jsonl"), "--eval_steps", "100"]
        for verb in (
            ["sft", "--base_model", smollm2, "--output_dir", str(folder / "OUT"), *options],
            ["merge", str(folder / "OUT"), "--output_dir", str(folder / "M")],
            ["export", str(folder / "M"), "--output_dir", str(folder / "G"), "--format", "ollama"],
        ):
            done = command(folder, *verb)
            assert done.status == 0, done.out + done.err
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_prompts_ids_and_answers_of_yeonma(
    tiny: dict[str, Path], kind: str, llama_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("YEONMA_CACHE")
    rows = asked(tiny[kind], kind)
    assert len(rows) == 16
    assert command(tmp_path, "merge", str(tiny[kind]), "--output_dir", str(tmp_path / "M")).status == 0
    convert(tmp_path / "M", tmp_path / "model.gguf", "f32", "tiny")
    request = {
        "gguf": str(tmp_path / "model.gguf"),
        "context": 1024,
        "new_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "messages": [row.messages for row in rows],
        "texts": [row.prompt for row in rows],
    }
    response = answers(llama_python, request)
    assert response["prompts"] == [row.prompt for row in rows]
    assert response["ids"] == [row.prompt_ids for row in rows]
    assert response["answers"] == [row.answer_ids for row in rows]


def test_llama_cpp_answers_with_the_merged_models_text(exported: Path, llama_python: str) -> None:
    merged = load(exported / "M", dtype="float32", device="cpu")
    samples = json.loads((exported / "M" / "samples.json").read_text())["samples"]
    rows = [{"document": sample["row"]["document"]} for sample in samples]
    ids = [merged.prompt_ids(row).tolist() for row in rows]
    assert ids == [sample["prompt_ids"] for sample in samples]
    expected = [merged.generate(row, max_new_tokens=MAX_NEW_TOKENS) for row in rows]
    request = {
        "gguf": str(exported / "G" / "G-f16.gguf"),
        "context": 1024,
        "new_tokens": MAX_NEW_TOKENS,
        "messages": [[{"role": "user", "content": row["document"]}] for row in rows],
        "texts": [merged.prompt_builder.tokenizer.decode(prompt_ids) for prompt_ids in ids],
        "chats": True,
    }
    response = answers(llama_python, request)
    assert response["ids"] == ids
    assert [text.rstrip() for text in response["chats"]] == [text.rstrip() for text in expected]


def test_the_demos_tokenizer_is_the_published_one(smollm2: str) -> None:
    """The ids are llama.cpp's for the published GGUF file."""
    tokenizer = load_tokenizer(find_base(smollm2))
    ids = {text: tokenizer(text, add_special_tokens=False).input_ids for text in PUBLISHED_IDS}
    assert ids == PUBLISHED_IDS


def answers(python: str, request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [python, str(ROOT / "tests" / "slow" / "llama_server.py")],
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
