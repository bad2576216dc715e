"""The table of docs/choose.md: Korean models, the memory that training an adapter takes, and their licences.

    python scripts/choose.py --trace   trace every model: choose.json anew
    python scripts/choose.py           the table of both pages from choose.json; --check compares

No weights are needed, and nothing is measured on a GPU: the forecast's own code (`yeonma/model/memory_trace.py`) runs
one row of 2,048 tokens through each model on PyTorch's meta device. The sizes of layers are those known of each
config.json; a model whose parameters are not as many as its publisher says ends the script. Tracing takes ten minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from page_tables import ROOT, write_pages

KEPT = ROOT / "scripts" / "choose.json"
BEGIN, END = "<!-- models -->", "<!-- /models -->"
TOKENS, RANK = 2048, 16


@dataclass(frozen=True)
class Shape:
    """A model as its config.json has it."""

    kind: str
    """Its model_type in transformers."""
    billions: float
    """Parameters, as published; of a model for images, those of its language model as counted here."""
    layers: int
    hidden: int
    intermediate: int
    heads: tuple[int, int]
    """Of queries, and of keys and values."""
    vocabulary: int
    tied: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        from transformers import AutoConfig

        text = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 32768,
            **self.more,
        }
        if self.kind != "exaone4_5":
            return AutoConfig.for_model(self.kind, **text)
        return AutoConfig.for_model(
            self.kind, text_config={"model_type": "exaone4", **text}, tie_word_embeddings=self.tied
        )


MODELS: dict[str, Shape] = {
    "LGAI-EXAONE/EXAONE-4.0-1.2B": Shape(
        "exaone4", 1.28, 30, 2048, 4096, (32, 8), 102400, True,
        {"layer_types": ["full_attention"] * 30, "sliding_window": None},
    ),
    "K-intelligence/Midm-2.0-Mini-Instruct": Shape(
        "llama", 2.3, 48, 1792, 4608, (32, 8), 131392, True, {"head_dim": 128}
    ),
    "kakaocorp/kanana-2-3b-instruct": Shape(
        "qwen3", 3.51, 32, 2560, 8192, (32, 8), 128256, False, {"head_dim": 128}
    ),
    "skt/A.X-4.0-Light": Shape("qwen2", 7.26, 28, 3584, 18944, (28, 4), 102400),
    "kakaocorp/kanana-1.5-8b-instruct-2505": Shape("llama", 8.03, 32, 4096, 14336, (32, 8), 128256),
    "MLP-KTLim/llama-3-Korean-Bllossom-8B": Shape("llama", 8.03, 32, 4096, 14336, (32, 8), 128256),
    "upstage/SOLAR-10.7B-Instruct-v1.0": Shape("llama", 10.7, 48, 4096, 14336, (32, 8), 32000),
    "K-intelligence/Midm-2.0-Base-Instruct": Shape(
        "llama", 11.5, 48, 4096, 14336, (32, 8), 131392, False, {"head_dim": 128}
    ),
    "naver-hyperclovax/HyperCLOVAX-SEED-Think-14B": Shape(
        "hyperclovax", 14.74, 38, 6144, 14336, (48, 8), 110592, False, {"head_dim": 128}
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": Shape(
        "exaone4", 32.0, 64, 5120, 27392, (40, 8), 102400, False, {"head_dim": 128}
    ),
    "LGAI-EXAONE/EXAONE-4.5-33B": Shape(
        "exaone4_5", 32.5, 64, 5120, 27392, (40, 8), 153600, False, {"head_dim": 128}
    ),
    "skt/A.X-4.0": Shape("qwen2", 71.9, 80, 8192, 29568, (64, 8), 102400),
    "upstage/Solar-Open-100B": Shape(
        "solar_open", 102.6, 48, 4096, 10240, (64, 8), 196608, False, {"head_dim": 128}
    ),
    "LGAI-EXAONE/K-EXAONE-236B-A23B": Shape(
        "exaone_moe", 236.0, 48, 6144, 18432, (64, 8), 153600, False,
        {"head_dim": 128, "num_experts": 128, "moe_intermediate_size": 2048, "sliding_window": 128},
    ),
}  # fmt: skip
"""Sizes as known of each name's config.json, parameters as its card or its publisher has them.
Where a size was not found, it is the one with which the parameters come out: kanana-2-3b's intermediate."""


def traced(shape: Shape) -> dict[str, int]:
    """Bytes by the run's own forward and backward over one row, without numbers."""
    import numpy as np
    import torch

    from yeonma.batch.forest import lay_out
    from yeonma.model.load import LoraShape
    from yeonma.model.memory_trace import trace
    from yeonma.policy import blueprint

    forest = lay_out([np.arange(TOKENS, dtype=np.int32)], [np.arange(TOKENS) > 0])
    lora = LoraShape(RANK, 16, 0.0, "all-linear", experts=False)
    found: dict[str, int] = {}
    for way in ("none", "nf4"):
        drawn = blueprint(shape.config(), torch.bfloat16, lora, gradient_checkpointing=True, quantization=way)
        passed = trace(drawn, forest, has_gradients=True)
        # LoRA weights, their gradients and AdamW's averages are four times as much as the LoRA weights
        work = passed.activations + passed.logits + passed.workspace + 4 * drawn.trained_bytes
        found |= {"frozen": drawn.frozen, "trained": drawn.trained}
        found[way] = drawn.weight_bytes + work
    return found


def check_count(name: str, shape: Shape, frozen: int) -> None:
    """Raises ValueError if a model does not have as many parameters as its publisher says."""
    if abs(frozen / 1e9 - shape.billions) > 0.02 * shape.billions:
        raise ValueError(f"{name}: {frozen / 1e9:.2f} billion parameters, published are {shape.billions}")


HEADS = {
    "docs/choose.md": ("model", "class", "billions", "GB", "GB with nf4", "licence"),
    "docs/choose.ko.md": ("모델", "클래스", "파라미터(십억)", "GB", "nf4일 때 GB", "라이선스"),
}


def table(page: str, kept: Mapping[str, Mapping[str, int]]) -> str:
    from yeonma.adapter.base_licence import base_licence

    rows = [HEADS[page], ("---",) * len(HEADS[page])]
    for name, shape in MODELS.items():
        numbers, licence = kept[name], base_licence(name)
        stated = f"[{licence.name}]({licence.where})" if licence else ""
        size = (f"{numbers[way] / 1e9:.1f}" for way in ("none", "nf4"))
        link = f"[{name.partition('/')[2]}](https://huggingface.co/{name})"
        rows.append((link, f"`{shape.kind}`", f"{numbers['frozen'] / 1e9:.1f}", *size, stated))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", action="store_true", help="trace the models")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where a page is out of step"
    )
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.trace:
        kept = {}
        for name, shape in MODELS.items():
            kept[name] = traced(shape)
            print(name, kept[name], flush=True)
            check_count(name, shape, kept[name]["frozen"])
        KEPT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    texts = {page: table(page, kept) for page in HEADS}
    differs = write_pages(BEGIN, END, texts, "scripts/choose.json", check=given.check)
    return int(given.check and differs)


if __name__ == "__main__":
    sys.exit(main())
