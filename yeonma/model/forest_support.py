"""Can this model be trained on forests? Asked of the model itself, once, when it has been loaded.

A tiny forest and the same sequences one by one go through it. Where they differ (state-space, linear-attention and
convolution layers mix neighbours that a forest puts side by side; ALiBi makes its own mask) the answer is why, and
training runs one sequence at a time instead: slower, still exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from yeonma.batch.forest import LEAST_SHARED, Forest, lay_out
from yeonma.errors import first_line
from yeonma.model.attention.backend import Capability
from yeonma.model.attention.dispatch import FOREST, capability_of
from yeonma.model.logprobs import ForestSupport, Head, plain_head, sequence_logprobs, trained_logprobs
from yeonma.model.quantized import is_rounded
from yeonma.model.sharding import recover

Distance = Callable[[torch.Tensor, torch.Tensor], float]
LAST = 4  # tokens at the end of each sequence whose context the tolerance is measured by


def check_forest_support(model: Any, seed: int = 0) -> ForestSupport:
    """Try a forest on the model; leaves the model with the attention that the answer needs, and no random state used.

    Compared without dropout, in the model's own precision: in float32 no log-probability may differ by more than 1e-4;
    below, and where activations are rounded to 8 bits, by more than a tenth of what leaving the context out does, both
    on the average, since rounding sends single tokens to other experts.
    """
    plain = model.config._attn_implementation or "eager"
    sequences = tiny_sequences(model.config.get_text_config().vocab_size, seed)
    with torch.no_grad(), in_eval_mode(model):
        one_by_one = _one_by_one(model, sequences)
        expected = torch.cat(one_by_one)
        distance, tolerance = _largest, 1e-4
        if model.dtype != torch.float32 or is_rounded(model):
            blind = _one_by_one(model, [sequence[-LAST:] for sequence in sequences])
            effect = _mean(torch.cat([logprobs[1 - LAST :] for logprobs in one_by_one]), torch.cat(blind))
            distance, tolerance = _mean, max(1e-4, effect / 10)
        forest = lay_out(sequences, [np.ones(len(sequence), dtype=bool) for sequence in sequences])
        found = capability_of(model.device, model.dtype)
        for capability in (found, None) if found else (None,):  # a kernel that fails here is done without
            backends: dict[int, str] = {}
            why_not, own = _try_forest(model, forest, capability, backends)
            if own is not None:
                difference = distance(own, expected)
                if difference <= tolerance:  # false of NaN
                    head = _try_head(model, forest, own, distance, tolerance, capability)
                    return ForestSupport(True, head, plain, "", capability, tuple(backends.values()))
                why_not = f"a forest and the same sequences one by one differ by {difference:.1e} in log-probability"
    model.set_attn_implementation(plain)
    return ForestSupport(False, None, plain, why_not)


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _mean(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """PEFT leaves the dropout of a new adapter on in a model that is otherwise in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def tiny_sequences(vocabulary: int, seed: int) -> list[np.ndarray]:
    """Three, of which two begin with the same tokens, as a forest shares them."""
    random = np.random.default_rng(seed)
    frame, *ends = (
        random.integers(0, vocabulary, count, dtype=np.int32) for count in (LEAST_SHARED, 9, 6, 7)
    )
    return [np.concatenate([frame, ends[0]]), np.concatenate([frame, ends[1]]), ends[2]]


def _one_by_one(model: Any, sequences: list[np.ndarray]) -> list[torch.Tensor]:
    results = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence).long().to(model.device)
        results.append(
            sequence_logprobs(model, ids, torch.ones(len(ids), dtype=torch.bool, device=ids.device))
        )
    return results


def _try_forest(
    model: Any, forest: Forest, capability: Capability | None, backends: dict[int, str]
) -> tuple[str, torch.Tensor | None]:
    """Why not, or the log-probabilities that the model's own head gives; fills `backends`, by layer."""
    windows: dict[int, int | None] = {}

    def watch(layer: Any, window: int | None, backend: str) -> None:
        index = getattr(layer, "layer_idx", None)
        index = len(windows) if index is None else index
        windows[index], backends[index] = window, backend

    try:
        model.set_attn_implementation(FOREST)
        own = trained_logprobs(model, forest, None, capability, watch=watch)
    except Exception as error:  # whatever a model's code may raise, it means: not by forests
        recover(model)
        return f"its code does not take a forest ({type(error).__name__}: {first_line(error)})", None
    other = _other_layers(model.config.get_text_config(), windows)
    return (other, None) if other else ("", own)


def _try_head(
    model: Any,
    forest: Forest,
    own: torch.Tensor,
    distance: Distance,
    tolerance: float,
    capability: Capability | None,
) -> Head | None:
    """The head as data, if it gives what the model's own head gives."""
    head = plain_head(model)
    if head is None:
        return None
    try:
        fused = trained_logprobs(model, forest, head, capability)
    except Exception:  # a decoder that cannot be called by itself
        recover(model)
        return None
    return head if distance(fused, own) <= tolerance else None


def _other_layers(config: Any, windows: dict[int, int | None]) -> str:
    """Words for layers that a forest cannot serve: other kinds, and those whose attention or window is their own.

    `windows` holds what reached our attention, by layer. The sequences tried are shorter than most windows, so that
    a window which a model keeps to its mask would not show in the numbers.
    """
    layers = getattr(config, "num_hidden_layers", 1)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if has_window else "full_attention"] * layers
    other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if other:
        return f"it has {', '.join(other)} layers"
    if len(windows) < layers:
        return f"{layers - len(windows)} of its {layers} layers have an attention of their own"
    if any(kind == "sliding_attention" and windows.get(i) is None for i, kind in enumerate(kinds)):
        return "it has sliding-window layers with a mask of their own"
    return ""


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """The model with another attention backend for a while: the plain one for generation with a cache."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
