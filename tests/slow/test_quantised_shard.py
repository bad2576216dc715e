"""Quantised bases sharded over two processes, compared with one process: passes, runs, resuming, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.faults.zygote import Zygote
from tests.pairs import dpo, pairs
from tests.published import fp8_folders, mxfp4_folders, packed_folder
from tests.quantised import KINDS, NF4, needs_bitsandbytes
from tests.runs import articles, characters, model_folder, sft, write_jsonl
from tests.slow.test_shard import ROOT, TORCHRUN, UNEVEN, assert_resumes_to_the_same_bytes, sharded

pytestmark = pytest.mark.slow

PASSES = """
import json
from contextlib import nullcontext
import numpy as np
import torch
from tests.quantised import draw_second_factor
from yeonma.errors import UserError
from yeonma.model import load
from yeonma.model.attention.dispatch import FOREST
from yeonma.model.forest_support import attention
from yeonma.model.logprobs import example_logprobs
from yeonma.model.quantized import packed_layers, quantise_rows
from yeonma.model.sharding import local_shard, local_weight_bytes
from yeonma.policy import build_policy
from yeonma.train.distributed import process_group, rendezvous

ids = [np.random.default_rng(seed).integers(3, 97, 30, dtype=np.int32) for seed in (1, 2)]
trained = [np.arange(30) > 9] * 2
CPU = torch.device("cpu")


def policy_of(folder, kind, dtype, **options):
    shape = load.LoraShape(4, 8, 0.0, "all-linear", experts=False)
    return build_policy(
        load.find_base(folder), shape, device=CPU, dtype=getattr(torch, dtype), quantization=kind, trainable=True,
        **options,
    )


def result_of(policy):
    weights = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
    begun = {name: weight.detach().clone() for name, weight in weights.items()}
    draw_second_factor(policy.model)
    with attention(policy.transformers_model, FOREST) if policy.support.forest else nullcontext():
        loss = -example_logprobs(
            policy.transformers_model, policy.support, ids, trained, share_prefix=True
        ).sum()
        loss.backward()
    return float(loss), {name: weight.grad for name, weight in weights.items()}, begun


def bits_of(policy):
    return {name: weight.bits for name, weight in packed_layers(policy.transformers_model)}


def share_of(bits, group):
    return torch.chunk(bits, group.count)[group.rank] if len(bits) > group.rank else bits[:0]


with rendezvous() as met, process_group(met, CPU) as group:
    results = {}
    for name, folder, kind, dtype, checkpointing in json.loads(CASES):
        options = {"checkpointing": checkpointing}
        one = policy_of(folder, kind, dtype, **options)
        two = policy_of(folder, kind, dtype, shard=True, **options)
        loss, grads, begun = result_of(one)
        other_loss, other_grads, other_begun = result_of(two)
        bits, shards = bits_of(one), bits_of(two)
        results[name] = {
            "loss": [loss, other_loss],
            "gradient": max(float((grad - other_grads[key]).abs().max()) for key, grad in grads.items()),
            "largest": max(float(grad.abs().max()) for grad in grads.values()),
            "begun": [sorted(begun) == sorted(other_begun), all(
                torch.equal(weight, other_begun[key]) for key, weight in begun.items()
            )],
            "bits": [list(bits) == list(shards), all(
                torch.equal(share_of(whole, group).view(torch.uint8), local_shard(shards[key]).view(torch.uint8))
                for key, whole in bits.items()
            )],
            "layers": len(bits),
            "kernels": [str(one.kernels), str(two.kernels)],
            "share": local_weight_bytes(two.transformers_model) / local_weight_bytes(one.transformers_model),
        }
    if BROKEN:
        try:
            policy_of(*BROKEN, shard=True)
        except UserError as error:
            results["broken"] = str(error)
    every = [None] * group.count
    torch.distributed.all_gather_object(every, results)
    if group.rank == 0:
        print(json.dumps(every))
"""


def passes(place: Path, cases: list[tuple[Any, ...]], broken: tuple[str, str, str] | None) -> list[Any]:
    """The results of both processes."""
    script = place / "passes.py"
    head = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nCASES = {json.dumps(cases)!r}\nBROKEN = {broken!r}\n"
    )
    script.write_text(f"{head}{PASSES}")
    done = subprocess.run([*TORCHRUN, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return results


@needs_bitsandbytes
def test_sharded_packed_weights_give_the_losses_and_gradients_of_one_process(tmp_path: Path) -> None:
    folders = {family: model_folder(tmp_path / family, family) for family in ("llama", "gpt2", "qwen3_moe")}
    cases: list[tuple[Any, ...]] = [
        (f"{family} {kind}", str(folder), kind, "float32", False)
        for family, folder in folders.items()
        for kind in ("int8", "nf4", "fp8")
        if (family, kind) != ("gpt2", "fp8")  # which has no layer that fp8 takes
    ]
    llama = folders["llama"]
    cases += [(f"checkpointing {kind}", str(llama), kind, "float32", True) for kind in ("int8", "nf4", "fp8")]
    cases += [(f"bfloat16 {kind}", str(llama), kind, "bfloat16", False) for kind in ("int8", "nf4", "fp8")]
    options: dict[str, dict[str, Any]] = {
        "published nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "published fp4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        "published double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        "published int8": {"load_in_8bit": True},
    }
    for name, packing in options.items():
        folder = packed_folder(tmp_path / name.replace(" ", "-"), llama, **packing)
        cases.append((name, str(folder), "none", "float32", False))
    for name, published in (("mxfp4", mxfp4_folders), ("fp8", fp8_folders)):
        folder, _ = published(tmp_path / f"of-{name}")
        cases.append((f"{name} to nf4", str(folder), "nf4", "float32", False))
    broken = model_folder(tmp_path / "broken")
    model = LlamaForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = torch.nan  # of which the first process has no part
    model.save_pretrained(broken)
    first, second = passes(tmp_path, cases, (str(broken), "int8", "float32"))
    assert first.pop("broken") == second.pop("broken")
    assert set(first) == {name for name, *_ in cases}
    for name, result in first.items():
        for one in (result, second[name]):
            assert one["bits"] == [True, True] and one["layers"] > 3, name
            assert one["begun"] == [True, True], name
        one, two = (kernels.replace("oneDNN 1/1, ", "") for kernels in result["kernels"])
        assert one == two, name  # but for the head, whose products are FSDP2's
        # a difference in the last bit may be rounded to the neighbouring fp8 number
        rounding = 5e-2 if "fp8" in name and "to nf4" not in name else 2e-2 if "bfloat16" in name else 1e-5
        assert result["loss"][0] == pytest.approx(result["loss"][1], rel=rounding), name
        assert result["gradient"] <= rounding * result["largest"], name
        both = result["share"] + second[name]["share"]
        assert both == pytest.approx(1, abs=0.08), name  # scales count as weights once they are sharded
        assert result["share"] == pytest.approx(0.5, abs=0.05), name


@pytest.mark.parametrize(
    ("verb", "kind", "settings"),
    [
        ("sft", NF4.values[0], {}),
        ("sft", "int8", {"gradient_checkpointing": True, "modules_to_save": ["norm"]}),
        ("sft", "fp8", {}),
        (
            "sft",
            NF4.values[0],
            {"batch_size": 1, "max_steps": 4, "num_epochs": None, "new_tokens": ["storm"]},
        ),
        ("dpo", NF4.values[0], {}),
    ],
)
@needs_bitsandbytes
def test_sharded_quantised_run_matches_one_process(
    zygotes: Zygote, tmp_path: Path, verb: str, kind: str, settings: dict[str, object]
) -> None:
    base = model_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(13) if verb == "sft" else pairs(13))
    settings = {**UNEVEN, **settings, "quantization": kind}
    run = sft if verb == "sft" else dpo
    one = run(tmp_path / "one", base, data, **settings, cache_dir=tmp_path / "a")
    assert one.status == 0, one.err
    two = sharded(zygotes, verb, tmp_path / "two", base, data, **settings, cache_dir=tmp_path / "b")
    assert two.status == 0, two.err
    assert f"dense layers in {kind}: " in two.out and "weights sharded over 2 processes" in two.out
    tolerance = 2e-2 if kind == "fp8" else 1e-5
    assert two.losses == pytest.approx(one.losses, abs=tolerance)
    for name, weight in two.weights.items():
        assert float((weight - one.weights[name]).abs().max()) < 10 * tolerance, name


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_sharded_quantised_run_gives_the_same_bytes(
    zygotes: Zygote, tmp_path: Path, kind: str
) -> None:
    assert_resumes_to_the_same_bytes(zygotes, tmp_path, quantization=kind)


MEMORY = """
import json
import sys
from pathlib import Path
import bitsandbytes  # and what it imports, and PEFT: code that is imported later would count as weights
import peft
import torch
from yeonma.model import load
from yeonma.model.forest_support import check_forest_support
from yeonma.model.sharding import gathered_bytes, local_weight_bytes
from yeonma.policy import build_policy
from yeonma.run_folder.progress import status_bytes
from yeonma.train.distributed import process_group, rendezvous, wait

with rendezvous() as met, process_group(met, torch.device("cpu")) as group:
    before = {name: status_bytes(name) for name in ("RssAnon", "RssFile")}
    policy = build_policy(
        load.BaseSource(sys.argv[1]), load.LoraShape(4, 8, 0.0, "all-linear"), device=torch.device("cpu"),
        dtype=torch.float32, quantization=sys.argv[3], trainable=True, shard=True,
    )
    after = {name: status_bytes(name) - before[name] for name in before}
    sizes = {"local": local_weight_bytes(policy.transformers_model), "after": after}
    Path(sys.argv[2], f"{group.rank}.json").write_text(json.dumps(sizes))
    wait(group)
"""


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.127), ("int8", 8.02), ("fp8", 8.02)])
def test_each_process_holds_half_of_the_packed_weights(tmp_path: Path, kind: str, bits: float) -> None:
    """By the sizes of the tensors, and by the process's memory: anonymous pages, and pages of the weights' file."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ends = sum(weight.nbytes for weight in (model.lm_head.weight, model.model.embed_tokens.weight))
    dense = sum(weight.numel() for weight in model.parameters()) - ends // 4
    model.save_pretrained(tmp_path / "model")
    del model
    characters().save_pretrained(tmp_path / "model")
    script = tmp_path / "memory.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{MEMORY}")
    command = [*TORCHRUN, str(script), str(tmp_path / "model"), str(tmp_path), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = dense * bits / 8 + ends
    for rank in (0, 1):
        sizes = json.loads((tmp_path / f"{rank}.json").read_text())
        assert sizes["local"] == pytest.approx(whole / 2, rel=0.01)
        # The adapter, code imported in the meantime, and layers gathered for the trial, one of them dequantised: it
        # varies by tens of megabytes. The tensors above tell a half from the whole, these pages packed from dense.
        rest = 100e6
        assert sizes["after"]["RssAnon"] < whole / 2 + ends + rest
        assert sizes["after"]["RssFile"] < 0.2 * 4 * dense + rest  # the file's pages have been released


def test_dora_on_sharded_packed_weights_is_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(4))
    settings = {"quantization": "int8", "shard": True, "use_dora": True}
    done = sft(tmp_path / "out", base, data, **settings)
    assert done.status == 2 and not (tmp_path / "out").exists()
    assert "quantization int8: DoRA needs the unquantised weights" in done.err
    done = subprocess.run(
        [sys.executable, "-c", "import yeonma.model.quantization, sys; print('torch' in sys.modules)"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "False\n"
