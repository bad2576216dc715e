"""The numbers of docs/scale.md: what fits on which GPUs, and how a step's time follows the number of processes.

    python scripts/scale.py --data alpaca.json --tokenizer FOLDER   trace the models, balance the rows: scale.json anew
    python scripts/scale.py                                         the page's tables from scale.json; --check compares

Nothing is measured on a GPU: shapes and operations are traced on PyTorch's meta device by the forecast's own code
(`yeonma/model/memory_trace.py`), and bandwidths are what vendors say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from math import ceil, log2
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, KEPT = ROOT / "docs" / "scale.md", ROOT / "scripts" / "scale.json"

SHAPES = {  # public configs: Llama 2 7B and 13B, Llama 3.1 70B
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
TOKENS, RANK = 2048, 16
CARDS = (24, 48, 80, 141)  # GB
COUNTS = (1, 2, 4, 8, 16, 32, 64)
USABLE = 0.9  # of a card: the driver, NCCL's buffers and holes between tensors take the rest; an assumption

PEAK = 989e12  # operations a second, H100 SXM, bfloat16, dense
NVLINK = 450e9  # bytes a second, one way, of one H100
NETWORKS = {"8 x 400 Gb/s": 8 * 50e9, "1 x 100 Gb/s": 12.5e9}  # bytes a second into a node of eight GPUs
REACHED = 0.7  # of a bandwidth; an assumption
LATENCY = 20e-6  # seconds for each of the 2 log2(P) rounds of an all-reduce; an assumption
NODE = 8
PROCESSES = (1, 2, 4, 8, 16, 64, 256, 1024)
UNIT_TOKENS, MICRO = 1024, 4
FIXED_BATCH, UNITS_EACH = 512, 8
BATCHES, RANKS = (64, 256, 1024, 4096), (2, 8, 64, 256, 1024)

Kept = Mapping[str, Any]


def traced() -> dict[str, Any]:
    """By the run's own forward and backward over one row of 2,048 tokens, without numbers."""
    import numpy as np
    import torch
    from transformers import LlamaConfig

    from yeonma.batch.forest import lay_out
    from yeonma.model.load import LoraShape
    from yeonma.model.memory_trace import trace
    from yeonma.policy import blueprint

    found = {}
    for name, shape in SHAPES.items():
        config = LlamaConfig(**shape, max_position_embeddings=4096)  # type: ignore[arg-type]
        forest = lay_out([np.arange(TOKENS, dtype=np.int32)], [np.arange(TOKENS) > 0])
        lora = LoraShape(RANK, 16, 0.0, "all-linear")
        each: dict[str, Any] = {}
        for checkpointing in (False, True):
            drawn = blueprint(
                config,
                torch.bfloat16,
                lora,
                gradient_checkpointing=checkpointing,
            )
            passed = trace(drawn, forest, has_gradients=True)
            key = "checkpointed" if checkpointing else "activations"
            each[key] = passed.activations + passed.logits + passed.workspace
            each["flops_checkpointed" if checkpointing else "flops"] = passed.flops // TOKENS
        nf4 = blueprint(config, torch.bfloat16, lora, gradient_checkpointing=True, quantization="nf4")
        passed = trace(nf4, forest, has_gradients=True)
        each |= {
            "frozen": drawn.frozen,
            "trained": drawn.trained,
            "weights": drawn.weight_bytes,
            "lora": drawn.trained_bytes,
            "gathered": drawn.gathered_bytes,
            "nf4": nf4.weight_bytes,
            "nf4_gathered": nf4.gathered_bytes,
            "nf4_checkpointed": passed.activations + passed.logits + passed.workspace,
        }
        found[name] = each
    return found


def imbalances(data: Path, tokenizer: str) -> dict[str, Any]:
    """The most tokens of a process over the mean, by the very function that shares a step out. Rows are drawn from the
    file's lengths, again and again where a batch is larger than the file."""
    import numpy as np
    from transformers import AutoTokenizer

    from yeonma.batch.plan import shares

    encode = AutoTokenizer.from_pretrained(tokenizer)
    texts = ["\n\n".join(str(value) for value in row.values()) for row in json.loads(data.read_text("utf-8"))]
    lengths = np.array([len(ids) for ids in encode(texts)["input_ids"]])
    draw = np.random.default_rng(0)

    def one(batch: int, ranks: int) -> float:
        ratios = []
        for _ in range(10):
            drawn = draw.choice(lengths, batch, replace=batch > len(lengths)).tolist()
            loads = [sum(drawn[i] for i in share) for share in shares(drawn, ranks)]
            ratios.append(max(loads) * ranks / sum(loads))
        return round(sum(ratios) / len(ratios), 4)

    pairs = {(batch, ranks) for batch in BATCHES for ranks in RANKS}
    pairs |= {(batch, each) for each in PROCESSES for batch in (FIXED_BATCH, UNITS_EACH * each)}
    return {
        "rows": len(lengths),
        "mean": round(float(lengths.mean()), 1),
        "longest": int(lengths.max()),
        "ratios": {f"{batch}/{ranks}": one(batch, ranks) for batch, ranks in sorted(pairs)},
    }


def bytes_of(model: Mapping[str, int], way: str, gpus: int) -> float:
    """On each GPU, with gradient checkpointing. LoRA weights, their gradients and AdamW's averages are four times as
    much as the LoRA weights."""
    whole = model["nf4" if "nf4" in way else "weights"]
    held = whole / gpus
    gathered = min(model["nf4_gathered" if "nf4" in way else "gathered"], whole - held)
    kept = model["nf4_checkpointed" if "nf4" in way else "checkpointed"]
    return float(held + gathered + 4 * model["lora"] + kept)


def step_seconds(
    model: Mapping[str, int],
    processes: int,
    batch: int,
    imbalance: float,
    network: float,
    efficiency: float,
    sharded: bool,
) -> dict[str, float]:
    """Of one step: its parts, and their sum. Sharded models are taken to run with gradient checkpointing."""
    bandwidth = REACHED * (NVLINK if processes <= NODE else min(NVLINK, network))
    units = imbalance * batch / processes
    compute = units * UNIT_TOKENS * model["flops_checkpointed" if sharded else "flops"] / (efficiency * PEAK)
    others = (processes - 1) / processes
    rounds = 2 * ceil(log2(processes)) if processes > 1 else 0
    reduce = 2 * others * model["lora"] / bandwidth + rounds * LATENCY
    gather = (
        2 * ceil(max(1.0, batch / processes) / MICRO) * others * model["weights"] / bandwidth
        if sharded
        else 0.0
    )
    return {"compute": compute, "reduce": reduce, "gather": gather, "step": max(compute, gather) + reduce}


def enough_tokens(model: Mapping[str, int], bandwidth: float, efficiency: float) -> int:
    """Of a micro-batch, so that gathering the weights for it takes no longer than computing it."""
    return ceil(
        2 * model["weights"] / (REACHED * bandwidth) * efficiency * PEAK / model["flops_checkpointed"]
    )


def tables(kept: Kept) -> dict[str, str]:
    efficiency = kept["efficiency"]
    models: Mapping[str, Mapping[str, int]] = kept["models"]
    ratios = kept["balance"]["ratios"]
    parts = [
        (
            name, f"{each['frozen'] / 1e9:.2f}", f"{each['trained'] / 1e6:.1f}", *(_gb(each[key]) for key in (
                "weights", "nf4", "lora")), _gb(3 * each["lora"]), _gb(each["gathered"]), _gb(each["activations"]),
            _gb(each["checkpointed"]),
        )
        for name, each in models.items()
    ]  # fmt: skip
    fits = []
    for name, each in models.items():
        ways = [("plain", 1, "any"), ("nf4", 1, "any")]
        ways += [("nf4, sharded", count, str(count)) for count in COUNTS[1:4]]
        ways += [("sharded", count, str(count)) for count in COUNTS[1:]]
        for way, count, told in ways:
            size = bytes_of(each, way, count)
            yes = ["yes" if size <= USABLE * card * 1e9 else "" for card in CARDS]
            fits.append((name, way, told, _gb(size), *yes))
    return {
        "parts": _table(
            "model", "billions frozen", "millions trained", "weights", "weights in nf4", "LoRA",
            "gradients and AdamW", "gathered", "activations", "with checkpointing", rows=parts,
        ),
        "fits": _table("model", "weights", "GPUs", "GB on each", *(f"{card} GB" for card in CARDS), rows=fits),
        "balance": _table(
            "batch_size", *(f"{ranks} processes" for ranks in RANKS),
            rows=[(str(batch), *(f"{ratios[f'{batch}/{ranks}']:.2f}" for ranks in RANKS)) for batch in BATCHES],
        ),
        "enough": _table(
            "model", "within a node", *(f"nodes with {name}" for name in NETWORKS),
            rows=[
                (name, *(f"{enough_tokens(each, width, efficiency):,}" for width in (NVLINK, *NETWORKS.values())))
                for name, each in models.items()
            ],
        ),
        **{
            f"{kind} {name}": _steps(models[name], ratios, efficiency, fixed=kind == "fixed", sharded=name == "70B")
            for kind in ("growing", "fixed") for name in ("7B", "70B")
        },
    }  # fmt: skip


def _steps(
    model: Mapping[str, int], ratios: Mapping[str, float], efficiency: float, *, fixed: bool, sharded: bool
) -> str:
    rows = []
    alone = step_seconds(model, 1, 1, 1.0, NVLINK, efficiency, sharded)["step"]  # of one unit
    for count in PROCESSES[1:] if sharded else PROCESSES:
        batch = FIXED_BATCH if fixed else UNITS_EACH * count
        row = [f"{count:,}", f"{batch:,}"]
        for index, network in enumerate(NETWORKS.values()):
            if index and count <= NODE:
                row += ["", ""]
                continue
            found = step_seconds(
                model, count, batch, ratios[f"{batch}/{count}"], network, efficiency, sharded
            )
            if not index:
                row += [
                    _seconds(found[key]) for key in ("compute", "reduce", *(["gather"] if sharded else []))
                ]
            row += [_seconds(found["step"]), f"{alone * batch / count / found['step']:.0%}"]
        rows.append(tuple(row))
    heads = ["processes", "batch_size", "compute", "all-reduce", *(["gather"] if sharded else [])]
    for name in NETWORKS:
        heads += [f"step, {name}", "of the ideal"]
    return _table(*heads, rows=rows)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 10e9 else f"{size / 1e9:.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms" if seconds < 0.01 else f"{seconds:.3g} s"


def _table(*heads: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page_of(page: str, kept: Kept) -> str:
    """The page with its tables between their comments. Raises ValueError where a place is missing."""
    for name, table in tables(kept).items():
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (begin and end):
            raise ValueError(f"docs/scale.md has no place for {name}")
        page = f"{before}{begin}\n{table}\n\n{end}{after}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a JSON list of rows whose lengths are balanced")
    parser.add_argument("--tokenizer", help="name or folder of the tokenizer that counts them")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where the page is out of step"
    )
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.data and given.tokenizer:
        from yeonma.inspect.forecast import EFFICIENCY

        kept = {
            "efficiency": EFFICIENCY["cuda"][1],
            "models": traced(),
            "balance": imbalances(given.data, given.tokenizer),
        }
        KEPT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    fresh = page_of(page, json.loads(KEPT.read_text(encoding="utf-8")))
    if fresh != page and not given.check:
        PAGE.write_text(fresh, encoding="utf-8")
    return int(given.check and fresh != page)


if __name__ == "__main__":
    sys.exit(main())
