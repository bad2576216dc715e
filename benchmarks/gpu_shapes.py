"""Models of known shapes with random weights, and a tokenizer of words: made in the process, nothing is downloaded.

Run as a script with a job file, this makes a folder that all contenders start from: `model/` (weights, tokenizer),
`start/` (one LoRA start), the rows and token ids of `gpu_workloads`, and `prepared.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import answer_job

SEED, LORA_R = 42, 16
END = "<end>"

SHAPES: dict[str, dict[str, Any]] = {  # as the models' own config.json files say
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
REAL = tuple(name for name in SHAPES if name != "tiny")


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


def random_model(name: str, dtype: str) -> Any:
    """On the CPU, the same weights every time; what is drawn is as wide as transformers draws it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(SHAPES[name])
    last = shape["vocab_size"] - 1
    ids = {"bos_token_id": None, "eos_token_id": last, "pad_token_id": None}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, **ids, max_position_embeddings=16384)
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Make the folder of the module's docstring; returns what prepared.json holds."""
    from gpu_workloads import prepare_workloads

    from yeonma.model.load import LoraShape, add_lora

    folder = Path(job["folder"])
    model, tokenizer = (
        random_model(job["shape"], job["dtype"]),
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
        "layers": config.num_hidden_layers,
        "attention_width": config.num_attention_heads * config.head_dim,
    }
    workloads = prepare_workloads(
        folder, tokenizer, job["workloads"], job["steps"], tiny=job["shape"] == "tiny"
    )
    # `yeonma` draws the same numbers from the same seed.
    add_lora(model, LoraShape(LORA_R, LORA_R, 0.0, "all-linear"), SEED).save_pretrained(folder / "start")
    return {"model": about, "workloads": workloads}


if __name__ == "__main__":
    answer_job(prepare, output="prepared.json")
