"""Numbers of a config.json that no model can have, found before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from yeonma.errors import Problem, brief
from yeonma.messages import tr

CURE = tr("use the config.json that belongs to the weights")
_MOST_LEVELS = 8
_MOST_ITEMS = 10_000
"""Of a list of numbers, such as one for each layer."""

_NULL = frozenset(
    {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_embd", "n_layer", "n_head"}
)
"""Keys that are never null where they are given, in the config of a language model."""

_COUNTS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("vocab_size",), (1, 10**8)),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), (1, 10**6)),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), (1, 5_000)),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), (1, 100_000)),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "head_dim"), (1, 100_000)),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner"), (1, 10**8)),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), (0, 100_000)
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), (-1, 10**10)),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), (0, 10**6)
    ),
    **dict.fromkeys(("num_labels", "num_nextn_predict_layers", "num_codebooks"), (0, 10**6)),
    **dict.fromkeys(("original_max_position_embeddings",), (1, 10**10)),
}
"""The least and the largest whole number under a key. Published models stay far below the largest."""

_POSITIVE = frozenset(
    {
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_eps",
        "rope_theta",
        "rotary_emb_base",
        "factor",
    }
)
_POSITIVE_LISTS = frozenset({"long_factor", "short_factor"})
_FLAGS = frozenset({"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"})
_TEXTS = frozenset({"model_type"})
_PARTS = frozenset({"text_config", "vision_config", "audio_config", "quantization_config"})


def problems_in(config: Mapping[str, Any], place: str, weight_bytes: int | None = None) -> list[Problem]:
    """What no model can have, with key and cure. `weight_bytes`: the size of its weights, if known."""
    found: list[Problem] = []
    for where, level in _levels(config):
        for key, value in level.items():
            what = _fault(key, value)
            if what:
                found.append(Problem(f"{where}{key}: {what}", place, CURE))
        found += [Problem(f"{where}{what}", place, CURE) for what in _relations(level)]
        if weight_bytes is not None and not found:
            found += [Problem(f"{where}{what}", place, CURE) for what in _too_large(level, weight_bytes)]
    return found


def _levels(
    config: Mapping[str, Any], where: str = "", depth: int = 0
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and the configs within it, each with the path to it."""
    yield where, config
    for key, value in config.items():
        is_part = key.endswith(("_config", "_parameters", "_scaling")) and key != "quantization_config"
        if isinstance(value, Mapping) and is_part and depth < _MOST_LEVELS:
            yield from _levels(value, f"{where}{brief(key, 40)}.", depth + 1)


def _fault(key: str, value: Any) -> str:
    """What is wrong with a value, or an empty text."""
    if key in _COUNTS:
        least, most = _COUNTS[key]
        values = value if isinstance(value, list) else [value]
        if len(values) > _MOST_ITEMS:
            return tr("a list of {values:,} numbers", values=len(values))
        for one in values:
            if one is None:
                if key in _NULL and not isinstance(value, list):
                    return tr("null, where a whole number belongs")
            elif isinstance(one, bool) or not isinstance(one, int):
                return tr("{one}, where a whole number belongs", one=_shown(one))
            elif not least <= one <= most:
                return tr(
                    "{one}; it is a whole number from {least:,} to {most:,}",
                    one=_shown(one),
                    least=least,
                    most=most,
                )
    elif key in _POSITIVE:
        if value is not None and not _is_positive(value):
            return tr("{value}, where a positive number belongs", value=_shown(value))
    elif key in _POSITIVE_LISTS:
        if not isinstance(value, list) or len(value) > _MOST_ITEMS or not all(map(_is_positive, value)):
            return tr("{value}, where a list of positive numbers belongs", value=_shown(value))
    elif key in _FLAGS:
        if value is not None and not isinstance(value, bool):
            return tr("{value}, where true or false belongs", value=_shown(value))
    elif key in _TEXTS:
        if not isinstance(value, str):
            return tr("{value}, where a text belongs", value=_shown(value))
    elif key in _PARTS:
        if value is not None and not isinstance(value, Mapping):
            return tr("{value}, where an object belongs", value=_shown(value))
    elif isinstance(value, float) and math.isnan(value):
        return tr("NaN, which is no number")
    return ""


def _is_positive(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < 1e30


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return tr("a number of more than 30 digits")
    text = repr(value) if not isinstance(value, list | dict) else type(value).__name__
    return brief(text, 60)


def _number(level: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these keys that is given as a whole number."""
    for key in keys:
        value = level.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _relations(level: Mapping[str, Any]) -> list[str]:
    heads, shared = _number(level, "num_attention_heads"), _number(level, "num_key_value_heads")
    if heads and shared and shared > 0 and heads > 0 and heads % shared:
        return [
            tr(
                "num_key_value_heads: {shared}, which does not divide num_attention_heads {heads}",
                shared=shared,
                heads=heads,
            )
        ]
    return []


def _too_large(level: Mapping[str, Any], weight_bytes: int) -> Iterator[str]:
    """Products of sizes that a model's weights have at least, beside the bytes of the weights that are there.

    A number of a weight takes at least half a byte.
    """
    hidden = _number(level, "hidden_size", "n_embd", "d_model")
    layers = _number(level, "num_hidden_layers", "n_layer", "num_layers")
    if hidden is None:
        return
    inner = _number(level, "intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner")
    heads, width = _number(level, "num_attention_heads", "n_head"), _number(level, "head_dim")
    parts = {
        "vocab_size": _product(_number(level, "vocab_size"), min(hidden, 512)),
        "num_hidden_layers x hidden_size x hidden_size": _product(layers, hidden, hidden, over=4),
        "num_hidden_layers x hidden_size x intermediate_size": _product(layers, hidden, inner),
        "num_hidden_layers x hidden_size x heads": _product(layers, hidden, heads, width),
    }
    for name, count in parts.items():
        if count is not None and count > 4 * weight_bytes + 10**6:
            yield tr(
                "{name}: at least {count:,} numbers, but the weights have {weight_bytes:,} bytes",
                name=name,
                count=count,
                weight_bytes=weight_bytes,
            )


def _product(*factors: int | None, over: int = 1) -> int | None:
    if any(factor is None for factor in factors):
        return None
    return math.prod(factor for factor in factors if factor is not None) // over


def generation_problems(config: Mapping[str, Any], place: str) -> list[Problem]:
    """What is wrong with the token ids of a generation_config.json; the rest of it is not used."""
    cure = tr("use the generation_config.json that belongs to the model, or remove it")
    found = []
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) else [value]
        if len(ids) > _MOST_ITEMS:
            found.append(Problem(tr("{key}: a list of {ids:,} numbers", key=key, ids=len(ids)), place, cure))
        elif value is not None and not all(
            isinstance(one, int) and not isinstance(one, bool) and -1 <= one < 10**8 for one in ids
        ):
            found.append(
                Problem(
                    tr("{key}: {value}, where the number of a token belongs", key=key, value=_shown(value)),
                    place,
                    cure,
                )
            )
    return found
