"""Adapter folders of other tools, to the loaded policy: keys of adapter_config.json, and tensors of the weights file.

The base has weights, so that a case that is accepted has answered a prompt. A case whose tensors are not those that its
config means must be refused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

from tests.adapters import tiny_base
from tests.foreign import CONFIG, WEIGHTS, foreign_adapter
from tests.fuzz.end_to_end import CommandLine, run
from tests.fuzz.harness import Target
from tests.fuzz.mutate import VALUES, Draw, damaged_bytes, damaged_json
from tests.fuzz.sandbox import Sandbox
from tests.tokenizers import byte_level

GENERATE = CommandLine("generate", (), ())
WORDS = ("adapter", "--prompt", "ab", "--max_new_tokens", "1", "--device", "cpu")
KINDS = ("plain", "dora", "expression", "whole modules", "tokens", "new tokens", "embedding")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ForeignCase:
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    spoiled: str = ""
    """Why the tensors cannot be those of the config; empty if they may be."""

    def __repr__(self) -> str:
        config = self.files.get(f"adapter/{CONFIG}")
        return f"ForeignCase({self.spoiled!r}, {sorted(self.files)}, {config!r:.3000})"


@lru_cache
def _files() -> dict[str, dict[str, bytes]]:
    """The files of the base, and of an adapter of each kind."""
    import tempfile

    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home = Path(name)
        base = tiny_base(home / "base", byte_level(), layers=1)
        found = {"base": {path.name: path.read_bytes() for path in sorted(base.iterdir())}}
        for kind in KINDS:
            folder = foreign_adapter(base, home / kind, kind, tokenizer=kind.startswith("new"))
            config = json.loads((folder / CONFIG).read_text())
            config["base_model_name_or_path"] = "base"
            (folder / CONFIG).write_text(json.dumps(config))
            found[kind] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return found


def _pristine(folder: Path) -> dict[str, bytes]:
    files = _files()
    return {
        **{f"base/{name}": content for name, content in files["base"].items()},
        **{f"adapter/{name}": content for name, content in files["plain"].items()},
    }


def _spoil_tensors(draw: Draw, tensors: Tensors) -> str:
    """Spoils one tensor, and says how."""
    name = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(("missing", "renamed", "superfluous", "NaN", "infinity", "shape", "integers")))
    tensor = tensors[name]
    if how == "missing":
        del tensors[name]
        if "modules_to_save." in name or "original_module." in name or "base_layer." in name:
            return ""  # a copy, which need not be there
    elif how == "renamed":
        tensors[draw(st.sampled_from((f"x{name}", name.upper(), name.replace(".0.", ".1."), "")))] = (
            tensors.pop(name)
        )
        if name in tensors:  # the same name again
            return ""
    elif how == "superfluous":
        other = draw(st.sampled_from(("x", name + ".x", "base_model.model.model.norm.weight", name + "\n")))
        if other in tensors:
            return ""
        tensors[other] = tensor.clone()
    elif how in ("NaN", "infinity"):
        flat = tensor.clone().flatten()
        flat[draw(st.integers(0, len(flat) - 1))] = torch.nan if how == "NaN" else -torch.inf
        tensors[name] = flat.reshape(tensor.shape).to(draw(st.sampled_from((torch.float32, torch.bfloat16))))
    elif how == "shape":
        tensors[name] = draw(st.sampled_from((tensor[:-1], tensor[None], tensor.flatten()))).contiguous()
        if tensors[name].shape == tensor.shape:
            return ""
    else:
        tensors[name] = torch.zeros(tensor.shape, dtype=torch.int8)
    return f"{how} {name}"


# fmt: off
EXPRESSIONS = (
    "(a+)+$", "((.*)*)*!", ".*", "q_proj", ".*[qv]_proj", "(", "[", "x" * 3000, "(?i)MODEL.*", r"\d+", "$", "",
)
# fmt: on
KEYS: dict[str, tuple[Any, ...]] = {
    "target_modules": (
        *EXPRESSIONS,
        ["q_proj"],
        ["q_proj", "v_proj", "nothing"],
        ["(a+)+$"],
        "all-linear",
        [],
        None,
    ),
    "exclude_modules": (*EXPRESSIONS, ["q_proj"], [""]),
    "modules_to_save": (["lm_head"], ["(a+)+$"], ["norm"], [""], ["embed_tokens", "embed_tokens"], "lm_head"),
    "layers_pattern": ("layers", "(a+)+$", ["layers"], []),
    "layers_to_transform": (0, [0], [5], [], -1, 2**70),
    "rank_pattern": ({"q_proj": 4}, {"(a+)+$": 4}, {"((.*)*)*!": 4}, {"q_proj": 2**62}, {"": 4}, {".*": 8}),
    "alpha_pattern": ({"q_proj": 1}, {"(a+)+$": 4}, {".*": 1e300}, {".*": -1}),
    "trainable_token_indices": (
        [1],
        [10**9],
        {"embed_tokens": [1]},
        {"(a+)+$": [1]},
        [1, 1],
        {"norm": [0]},
        {"": []},
    ),
    "r": (1, 8, 2**20, 2**70, -4, 4.0, True),
    "lora_alpha": (0, -1, 0.5, 1e308, 2**62, None),
    "bias": ("all", "lora_only", "none"),
    "init_lora_weights": (
        "pissa",
        "pissa_niter_4",
        "olora",
        "loftq",
        "corda",
        "eva",
        "gaussian",
        False,
        "orthogonal",
    ),
    "peft_type": ("IA3", "LOHA", "PROMPT_TUNING", "ADALORA", "XLORA", "lora", ["LORA"], "X" * 5000),
    "task_type": ("SEQ_CLS", None, "", "X"),
    "target_parameters": (["nothing"], ["layers.0.self_attn.q_proj.weight"], ["(a+)+$"], [""]),
    "base_model_name_or_path": ("", "adapter", "../base", "/nowhere", "no/such", "\0", "~x", "base/", None),
    "revision": ("main", "x\0", 3),
    "use_dora": (True, False, 1),
    "lora_bias": (True,),
    "fan_in_fan_out": (True,),
    "layer_replication": ([[0, 1], [0, 1]],),
    "auto_mapping": ({"base_model_class": "os", "parent_library": "os"},),
    "megatron_config": ({"a": 1},),
    "runtime_config": ({"ephemeral_gpu_offload": True},),
    "ensure_weight_tying": (True,),
}
"""Keys of adapter_config.json -> values for them."""


@st.composite
def foreign_cases(draw: Draw) -> ForeignCase:
    kind = draw(st.sampled_from(KINDS))
    files: dict[str, bytes | None] = dict(_files()[kind])
    spoiled = ""
    part = draw(
        st.sampled_from(("tensors", "tensors", "keys", "keys", "values", "bytes", "other kind", "nothing"))
    )
    if part == "tensors":
        tensors = load(_files()[kind][WEIGHTS])
        spoiled = _spoil_tensors(draw, tensors)
        files[WEIGHTS] = save(tensors, metadata={"format": "pt"})
    elif part == "keys":
        config = json.loads(_files()[kind][CONFIG])
        for name in draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=2, unique=True)):
            config[name] = draw(st.sampled_from(KEYS[name]))
        if draw(st.integers(0, 4)) == 0:
            config[draw(st.sampled_from(("new_key", "use_newer", "r", *sorted(KEYS))))] = draw(
                st.sampled_from(VALUES)
            )
        files[CONFIG] = json.dumps(config).encode("utf-8", "surrogatepass")
    elif part == "values":
        config = json.loads(_files()[kind][CONFIG])
        files[CONFIG] = draw(damaged_json(config, sorted(config)))
    elif part == "bytes":
        files[WEIGHTS] = draw(damaged_bytes(_files()[kind][WEIGHTS], [_files()["plain"][WEIGHTS]]))
    elif part == "other kind":
        other = draw(st.sampled_from(KINDS))
        files[WEIGHTS] = _files()[other][WEIGHTS]
        spoiled = f"{other} for {kind}" if other != kind and "plain" not in (kind, other) else ""
    elif draw(st.booleans()):
        files[draw(st.sampled_from((WEIGHTS, CONFIG)))] = None
    return ForeignCase({f"adapter/{name}": content for name, content in files.items()}, spoiled)


def _read(case: ForeignCase, sandbox: Sandbox) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(GENERATE, *WORDS)
    assert not case.spoiled, f"accepted: {case.spoiled}"


FOREIGN = Target(
    name="foreign",
    cases=foreign_cases(),
    valid=ForeignCase(),
    files=lambda case: case.files,
    read=_read,
    pristine=_pristine,
)
