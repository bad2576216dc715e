"""llama.cpp's own server, right and wrong: `yeonma verify --served` names what differs from training.

`make llama` installs it; or $YEONMA_LLAMA_PYTHON names a Python that has xllamacpp.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.runs import command, trained, write_jsonl
from tests.served_runs import verify
from tests.slow.engines import engine_base, engine_python
from yeonma.errors import UserError
from yeonma.export.gguf_converter import CONVERTER, convert
from yeonma.export.gguf_quantiser import quantise
from yeonma.export.tool_folder import install_tool
from yeonma.model.smollm2 import fetch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TITLES = {
    "A storm closed the harbour on Monday.": "Storm closes harbour",
    "The council opened a new library this year.": "New library opens",
    "Boats waited for the wind in the afternoon. " * 40: "Boats wait for wind",
    "A model of the old bridge was found.": "Old bridge model found",
    "월요일에 폭풍이 항구를 닫았다.": "폭풍에 멈춘 항구",
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Files:
    run: Path
    right: Path
    q8_0: Path
    base: Path
    other: Path
    with_bos: Path


@pytest.fixture(scope="module")
def llama_python() -> str:
    return engine_python("YEONMA_LLAMA_PYTHON", ".venv-llama", "no llama.cpp: `make llama`")


@pytest.fixture(scope="module")
def files(llama_python: str, tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("YEONMA_CACHE")  # the default cache may hold the model and the converter
        try:
            install_tool(CONVERTER)
            base = engine_base(root / "base", fetch(print))
        except UserError as error:
            pytest.skip(f"not to be had here: {error}")
        run = run_on(base, root / "run", TITLES)
        other = run_on(base, root / "other", {text: title[::-1].upper() for text, title in TITLES.items()})
        shutil.copytree(base, root / "asked-base")
        shutil.copy(run / "chat_template.jinja", root / "asked-base")
        convert(root / "asked-base", root / "base.gguf", "f16", "base")
        made = {
            name: exported(folder, root / name, outtype)
            for name, folder, outtype in (
                ("right", run, "f16"),
                ("q8_0", run, "q8_0"),
                ("wrong", other, "f16"),
            )
        }
    shutil.copy(made["right"], root / "bos.gguf")
    fields = gguf.GGUFReader(root / "bos.gguf", "r+").fields["tokenizer.ggml.add_bos_token"]
    fields.parts[fields.data[0]][0] = True
    return Files(run, made["right"], made["q8_0"], root / "base.gguf", made["wrong"], root / "bos.gguf")


def run_on(base: Path, output: Path, titles: Mapping[str, str]) -> Path:
    """The folder of a run that has learned these titles by heart."""
    rows = [{"document": text, "title": title} for text, title in titles.items()]
    data = write_jsonl(output.with_suffix(".jsonl"), rows * 8)
    held_out = write_jsonl(output.with_suffix(".held-out.jsonl"), rows)
    settings = {"template": "### Text:\n{document}\n\n### Title:\n{title}\n", "val_data_path": held_out}
    settings |= {"num_epochs": 10, "learning_rate": 1e-2, "batch_size": 8, "card_rows": 5, "lora_r": 16}
    return trained(output, base, data, eval_steps=1000, save_steps=1000, **settings).folder


def exported(run: Path, folder: Path, outtype: str) -> Path:
    words = ["export", str(run), "--output_dir", str(folder), "--outtype", outtype]
    done = command(folder, *words)
    assert done.status == 0, done.err
    (file,) = folder.glob("*.gguf")
    return file


@contextmanager
def llama_server(python: str, file: Path, log: Path, **options: Any) -> Iterator[str]:
    """The address of llama.cpp's server with a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [python, str(Path(__file__).with_name("llama_open.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"gguf": str(file), "port": port, **options}) + "\n")
        process.stdin.flush()
        started = process.stdout.readline()
        assert started, log.read_text()
        yield json.loads(started)["address"]
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize("name", ["right", "q8_0"])
def test_right_server_raises_no_alarm(files: Files, llama_python: str, tmp_path: Path, name: str) -> None:
    with llama_server(llama_python, getattr(files, name), tmp_path / "log") as url:
        status, causes, found = verify(files.run, url)
    assert (status, causes) == (0, [])
    assert [found[f"served {check}"] for check in ("prompts", "weights", "answers")] == ["well"] * 3


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("base", {}, "adapter_not_applied"),
        ("other", {}, "other_weights"),
        ("with_bos", {}, "added_bos"),
        ("right", {"chat_template": CHATML}, "another_template"),
        ("right", {"context": 256}, "context_cut"),
        ("right", {"sampling": {"ignore_eos": True}}, "no_end"),
        ("right", {"sampling": {"penalty_repeat": 2.5}}, "penalty"),
    ],
    ids=["base alone", "other adapter", "bos", "template", "context", "no end", "penalty"],
)
def test_wrong_server_is_named(
    files: Files, llama_python: str, tmp_path: Path, name: str, options: dict[str, Any], cause: str
) -> None:
    with llama_server(llama_python, getattr(files, name), tmp_path / "log", **options) as url:
        status, causes, _ = verify(files.run, url)
    assert (status, causes) == (1, [cause])


def test_adapter_as_gguf_on_its_base_answers_as_trained(
    files: Files, llama_python: str, tmp_path: Path
) -> None:
    lora = adapter_file(files.run, tmp_path / "lora")
    with llama_server(llama_python, files.base, tmp_path / "log", lora=str(lora)) as url:
        assert verify(files.run, url)[:2] == (0, [])
    with llama_server(llama_python, files.base, tmp_path / "log", lora=str(lora), scale=0.5) as url:
        assert verify(files.run, url)[:2] == (1, ["adapter_in_part"])


def test_adapter_as_gguf_has_pefts_scale_of_every_layer(files: Files, tmp_path: Path) -> None:
    """rsLoRA, and alphas and ranks that differ from layer to layer: the product is PEFT's, to float16's rounding."""
    run = tmp_path / "run"
    shutil.copytree(files.run, run)
    config = json.loads((run / "adapter_config.json").read_text())
    pattern = {"layers.0.self_attn.v_proj": 40}
    config |= {"use_rslora": True, "alpha_pattern": pattern, "rank_pattern": {"layers.1.self_attn.v_proj": 4}}
    (run / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(run / "adapter_model.safetensors")
    place = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
    weights[f"{place}A.weight"] = weights[f"{place}A.weight"][:4].contiguous()
    weights[f"{place}B.weight"] = weights[f"{place}B.weight"][:, :4].contiguous()
    save_file(weights, run / "adapter_model.safetensors")
    lora = adapter_file(run, tmp_path / "lora")
    reader = gguf.GGUFReader(lora)
    stored = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    base = AutoModelForCausalLM.from_pretrained(files.run.parent / "base")
    layers = PeftModel.from_pretrained(base, run).get_base_model().model.layers
    for number, layer in enumerate(layers):
        first, second = (stored[f"blk.{number}.attn_v.weight.lora_{name}"] for name in "ab")
        wanted = layer.self_attn.v_proj.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(second @ first * alpha / len(first), wanted, rtol=0.01, atol=1e-3)


def test_k_quants_are_those_of_llama_cpp_and_small_rows_are_told(files: Files, tmp_path: Path) -> None:
    done = command(
        tmp_path, "export", str(files.run), "--output_dir", str(tmp_path / "Q"), "--outtype", "q4_k_m"
    )
    assert done.status == 0, done.err
    assert "16 of 16 matrices cannot be q4_k_m" in done.out
    (file,) = (tmp_path / "Q").iterdir()
    assert file.stat().st_size < 0.6 * files.right.stat().st_size
    (config,) = (files.run.parent / "base").glob("config.json")
    wide = tmp_path / "wide"
    shutil.copytree(config.parent, wide)
    shape = {**json.loads(config.read_text()), "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(wide)
    convert(wide, tmp_path / "wide.gguf", "f32", "wide")
    types = quantise(tmp_path / "wide.gguf", tmp_path / "wide-q4.gguf", "q4_k_m")
    assert (types.matrices, types.fallen_back) == (16, 0)


def adapter_file(run: Path, folder: Path) -> Path:
    done = command(folder, "export", str(run), "--output_dir", str(folder), "--format", "lora")
    assert done.status == 0, done.err
    (file,) = folder.glob("*.gguf")
    return file
