"""Korean model families by name: a tiny config of every class that transformers has for them.

Families that are a class of another name have their tests there: Kanana 1.5, Mi:dm 2.0, Bllossom, SOLAR 10.7B and the
HyperCLOVA X SEED texts of 0.5B and 1.5B are `llama`, A.X 4.0 is `qwen2`, Kanana 2 is `qwen3` and `deepseek_v3`, EXAONE
4.0 is `exaone4` (tests/models.py); EXAONE 4.5 and HyperCLOVA X SEED Vision are in tests/multimodal.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import COMMON
from tests.runs import articles, characters, command, trained, write_jsonl
from yeonma.batch.forest import lay_out
from yeonma.errors import UserError
from yeonma.model.forest_support import check_forest_support, tiny_sequences
from yeonma.model.logprobs import trained_logprobs
from yeonma.model.source import find_base

_TEXT = {**COMMON, "max_position_embeddings": 512}
_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "exaone_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "hyperclovax": {"embedding_multiplier": 2.0, "logits_scaling": 0.5, "residual_multiplier": 0.8},
    "axk1": {**_EXPERTS, **_LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "axk2": {
        **_EXPERTS,
        **_LATENT,
        "mlp_layer_types": ["dense", "sparse"],
        "index_topk": 16,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "gated_norm_rank": 4,
    },
    "solar_open": _EXPERTS,
}
ONE_BY_ONE = {"axk2"}
"""Its layers pick the tokens that they see with a mask of their own."""


def korean_model(family: str) -> Any:
    config = AutoConfig.for_model(family, **{**_TEXT, **FAMILIES[family]})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25, generator=draw)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model.requires_grad_(False).eval()


def plain(model: Any, sequence: np.ndarray) -> torch.Tensor:
    """Log-probabilities of a sequence from its second token on, by transformers alone."""
    ids = torch.from_numpy(sequence.astype(np.int64))
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None], use_cache=False).logits[0, :-1].float(), -1)
    return logprobs.gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_forest_gives_the_log_probabilities_of_transformers(family: str) -> None:
    model = korean_model(family)
    sequences = tiny_sequences(97, 1)
    expected = torch.cat([plain(model, sequence) for sequence in sequences])
    support = check_forest_support(model)
    assert support.forest is (family not in ONE_BY_ONE), support.why_not
    if support.forest:
        forest = lay_out(sequences, [np.arange(len(sequence)) > 0 for sequence in sequences])
        logprobs = trained_logprobs(model, forest, support.head, support.capability)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_run_trains_answers_and_merges(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    korean_model(family).save_pretrained(base)
    characters().save_pretrained(base)
    data = write_jsonl(tmp_path / "rows.jsonl", articles(8))
    run = trained(tmp_path / "OUT", base, data, max_steps=2, card_rows=1)
    assert len(run.losses) == 2 and all(np.isfinite(run.losses))
    merged = command(run.folder, "merge", str(run.folder), "--output_dir", str(tmp_path / "M"))
    assert merged.status == 0, merged.out + merged.err


def test_exaone_3_5_asks_for_its_own_code_to_be_read(tmp_path: Path) -> None:
    config = {
        "model_type": "exaone",
        "architectures": ["ExaoneForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_exaone.ExaoneConfig"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as raised:
        find_base(str(tmp_path))
    assert "the model comes with its own Python code (auto_map)" in str(raised.value)
    assert "read that code, then give --trust_remote_code true" in str(raised.value)
