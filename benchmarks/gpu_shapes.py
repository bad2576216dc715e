"""Models of known shapes with random weights, and a tokenizer of words: made in the process, nothing is downloaded.

Run as a script with a job file, this makes a folder that all contenders start from: `model/` (weights, tokenizer),
`start/` (one LoRA start), the rows and token ids of `gpu_workloads`, and `prepared.json`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from harness import answer_job

SEED, LORA_R = 42, 16
END = "<end>"

SHAPES: dict[str, dict[str, Any]] = {  # as the config.json files of the models say that they are named after
    "llama-2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3.5-like": {
        "model_type": "qwen3_5_text",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "tie_word_embeddings": True,
    },
    "little-recurrent": {
        "model_type": "qwen3_5_text",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "tie_word_embeddings": True,
    },
    "tiny-recurrent": {
        "model_type": "qwen3_5_text",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "tie_word_embeddings": True,
    },
    "little": {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
REAL = ("llama-2-7b", "llama-3-8b", "qwen3-0.6b")


def word(number: int) -> str:
    return f"w{number}"


def word_tokenizer(vocabulary: int) -> Any:
    """Every word between blanks is one token; the last id ends an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word(number): number for number in range(vocabulary - 1)} | {END: vocabulary - 1}
    words = Tokenizer(models.WordLevel(ids, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)


def random_model(name: str, dtype: str, device: str = "cpu") -> Any:
    """On the CPU, the same weights every time for a device that draws them; as wide as transformers draws them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(SHAPES[name])
    last = shape["vocab_size"] - 1
    ids = {"bos_token_id": None, "eos_token_id": last, "pad_token_id": None}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, **ids, max_position_embeddings=16384)
    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).cpu()


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Make the folder of the module's docstring; returns what prepared.json holds."""
    from gpu_workloads import prepare_workloads

    from yeonma.model.load import LoraShape, add_lora

    folder = Path(job["folder"])
    model, tokenizer = (
        random_model(job["shape"], job["dtype"], job.get("device", "cpu")),
        word_tokenizer(SHAPES[job["shape"]]["vocab_size"]),
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    parameters = sum(weight.numel() for weight in model.parameters())
    embedded = embedding.numel() + (0 if head is embedding else head.numel())
    config = model.config
    about = {
        "name": job["shape"],
        "parameters": parameters,
        "non_embedding_parameters": parameters - embedded,
        "layers": getattr(config, "layer_types", ["full_attention"] * config.num_hidden_layers).count(
            "full_attention"
        ),
        "attention_width": config.num_attention_heads * config.head_dim,
    }
    workloads = prepare_workloads(
        folder, tokenizer, job["workloads"], job["steps"], tiny=job["shape"].startswith("tiny")
    )
    # `yeonma` draws the same numbers from the same seed.
    add_lora(model, LoraShape(LORA_R, LORA_R, 0.0, "all-linear"), SEED).save_pretrained(folder / "start")
    for work in workloads.values():
        if work["start"] != "start":
            other_start(folder / "start", folder / work["start"], work)
    return {"model": about, "workloads": workloads}


def other_start(plain: Path, start: Path, work: dict[str, Any]) -> None:
    """The same LoRA weights with another scale and dropout."""
    shutil.copytree(plain, start, dirs_exist_ok=True)
    config = json.loads((plain / "adapter_config.json").read_text("utf-8"))
    config |= {"lora_alpha": work["lora_alpha"], "lora_dropout": work["lora_dropout"]}
    (start / "adapter_config.json").write_text(json.dumps(config), "utf-8")


if __name__ == "__main__":
    answer_job(prepare, output="prepared.json")
