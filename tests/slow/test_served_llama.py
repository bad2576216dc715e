"""Files for llama.cpp: adapters as GGUF, and k-quants. tests/slow/test_seeded_llama.py asks its server about faults.

`make llama` installs it; or $YEONMA_LLAMA_PYTHON names a Python that has xllamacpp.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.runs import command
from tests.seeded.llama import TITLES, adapter_file, exported, llama_server, run_on
from tests.served_runs import verify
from tests.slow.engines import engine_base, engine_python
from yeonma.errors import UserError
from yeonma.export.gguf_converter import CONVERTER, convert
from yeonma.export.gguf_quantiser import quantise
from yeonma.export.tool_folder import install_tool
from yeonma.model.smollm2 import fetch

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Files:
    run: Path
    right: Path
    base: Path


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
        shutil.copytree(base, root / "asked-base")
        shutil.copy(run / "chat_template.jinja", root / "asked-base")
        convert(root / "asked-base", root / "base.gguf", "f16", "base")
        right = exported(run, root / "right", "f16")
    return Files(run, right, root / "base.gguf")


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
