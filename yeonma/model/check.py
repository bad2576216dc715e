"""Can this model be trained on forests? Asked of the model itself, once, when it has been loaded.

A tiny forest and the same sequences one by one go through it. Where they differ (state-space, linear-attention and
convolution layers mix neighbours that a forest puts side by side; ALiBi makes its own mask) the answer is why, and
training runs one sequence at a time instead: slower, still exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from yeonma.model.attention import FOREST
from yeonma.model.forward import Forward, Head, plain_head, sequence_logprobs, trained_logprobs
from yeonma.tokens.forest import LEAST_SHARED, lay_out

LAST = 4  # tokens at the end of each sequence whose context the tolerance is measured by


def check_forward(model: Any, seed: int = 0) -> Forward:
    """Try a forest on the model; leaves the model with the attention that the answer needs.

    Compared in the model's own precision. Below float32 the tolerance is a tenth of what leaving the context out
    does to the same log-probabilities.
    """
    plain = model.config._attn_implementation or "eager"
    sequences = _sequences(model.config.get_text_config().vocab_size, seed)
    with torch.no_grad():
        expected = _one_by_one(model, sequences)
        blind = _one_by_one(model, [sequence[-LAST:] for sequence in sequences])
        effect = _distance([logprobs[1 - LAST :] for logprobs in expected], blind)
        tolerance = 1e-4 if model.dtype == torch.float32 else max(1e-4, effect / 10)
        why_not, head = _try_forest(model, sequences, expected, tolerance)
    if why_not:
        model.set_attn_implementation(plain)
        return Forward(False, None, plain, why_not)
    return Forward(True, head, plain, "")


def _sequences(vocabulary: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    draw = lambda count: random.integers(0, vocabulary, count).astype(np.int32)  # noqa: E731
    frame = draw(LEAST_SHARED)
    return [np.concatenate([frame, draw(9)]), np.concatenate([frame, draw(6)]), draw(7)]


def _one_by_one(model: Any, sequences: list[np.ndarray]) -> list[torch.Tensor]:
    results = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence).long().to(model.device)
        results.append(sequence_logprobs(model, ids, torch.ones(len(ids), dtype=torch.bool, device=ids.device)))
    return results


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def _try_forest(
    model: Any, sequences: list[np.ndarray], expected: list[torch.Tensor], tolerance: float
) -> tuple[str, Head | None]:
    forest = lay_out(sequences, [np.ones(len(sequence), dtype=bool) for sequence in sequences])
    windows: dict[int, int | None] = {}

    def watch(layer: Any, window: int | None) -> None:
        windows[getattr(layer, "layer_idx", len(windows))] = window

    try:
        model.set_attn_implementation(FOREST)
        own = trained_logprobs(model, forest, None, watch=watch)
    except Exception as error:  # whatever a model's code may raise, it means: not by forests
        return f"its code does not take a forest ({type(error).__name__}: {_first_line(error)})", None
    kinds = _other_layers(model.config, windows)
    if kinds:
        return f"it has {', '.join(kinds)} layers", None
    answers = [own[torch.from_numpy(forest.answer_N == i)] for i in range(len(sequences))]
    difference = _distance(answers, expected)
    if not difference <= tolerance:  # also true of NaN
        return f"a forest and the same sequences one by one differ by {difference:.1e} in log-probability", None
    head = plain_head(model)
    if head is not None:
        fused = trained_logprobs(model, forest, head)
        if not float((fused - own).abs().max()) <= tolerance:
            head = None
    return "", head


def _other_layers(config: Any, windows: dict[int, int | None]) -> list[str]:
    """Kinds of layers that a forest cannot serve, and layers whose window did not reach our attention."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    other = sorted({kind for kind in kinds if kind not in ("full_attention", "sliding_attention")})
    if any(kind == "sliding_attention" and windows.get(i) is None for i, kind in enumerate(kinds)):
        other.append("sliding-window (with a mask of their own)")
    return other


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """The model with another attention backend for a while: the plain one for generation with a cache."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
