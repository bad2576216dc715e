"""Can this model be trained on forests? A trial on the loaded model decides.

A tiny forest and the same sequences one by one go through the model. Where the results differ (state-space,
linear-attention and convolution layers mix tokens that are only neighbours in the forest; ALiBi makes its own mask),
training runs one sequence at a time: slower, still exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from yeonma.batch.forest import MIN_SHARED_TOKENS, Forest, lay_out
from yeonma.errors import first_line
from yeonma.model.attention.backend import Capability
from yeonma.model.attention.dispatch import FOREST, capability_of
from yeonma.model.logprobs import ForestSupport, Head, plain_head, sequence_logprobs, trained_logprobs
from yeonma.model.quantized import is_rounded
from yeonma.model.sharding import recover

Distance = Callable[[torch.Tensor, torch.Tensor], float]
LAST = 4
"""Tokens at the end of each sequence that are computed without their context, to measure what context does."""


def check_forest_support(model: Any, seed: int = 0) -> ForestSupport:
    """Try a forest on the model. Sets the attention implementation that the result needs; draws no random numbers.

    The comparison runs without dropout in the model's own precision. In float32 no log-probability may differ by more
    than 1e-4. In half precision, and where activations are rounded to 8 bits, the mean difference may be a tenth of the
    mean effect of leaving the context out: rounding may send single tokens to other experts.
    """
    plain = model.config._attn_implementation or "eager"
    sequences = tiny_sequences(model.config.get_text_config().vocab_size, seed)
    with torch.no_grad(), in_eval_mode(model):
        one_by_one = _one_by_one(model, sequences)
        expected = torch.cat(one_by_one)
        distance, tolerance = _largest, 1e-4
        if model.dtype != torch.float32 or is_rounded(model):
            without_context = _one_by_one(model, [sequence[-LAST:] for sequence in sequences])
            with_context = [logprobs[1 - LAST :] for logprobs in one_by_one]
            effect = _mean(torch.cat(with_context), torch.cat(without_context))
            distance, tolerance = _mean, max(1e-4, effect / 10)
        forest = lay_out(sequences, [np.ones(len(sequence), dtype=bool) for sequence in sequences])
        one_call = capability_of(model.device, model.dtype)
        for capability in (
            (one_call, None) if one_call else (None,)
        ):  # segment by segment where the kernels fail
            backends: dict[int, str] = {}
            why_not, logprobs = _try_forest(model, forest, capability, backends)
            if logprobs is not None:
                difference = distance(logprobs, expected)
                if difference <= tolerance:  # false for NaN
                    head = _try_head(model, forest, logprobs, distance, tolerance, capability)
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
    """The model in eval mode within. PEFT leaves a new adapter's dropout on in a model that is in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def tiny_sequences(vocabulary: int, seed: int) -> list[np.ndarray]:
    """Three sequences, of which two share a prefix that is long enough to become one segment."""
    random = np.random.default_rng(seed)
    frame, *ends = (
        random.integers(0, vocabulary, count, dtype=np.int32) for count in (MIN_SHARED_TOKENS, 9, 6, 7)
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
    """Why the forest does not work, or the log-probabilities by the model's own head; fills `backends`, by layer."""
    windows: dict[int, int | None] = {}

    def watch(layer: Any, window: int | None, backend: str) -> None:
        index = getattr(layer, "layer_idx", None)
        index = len(windows) if index is None else index
        windows[index], backends[index] = window, backend

    try:
        model.set_attn_implementation(FOREST)
        logprobs = trained_logprobs(model, forest, None, capability, watch=watch)
    except Exception as error:  # whatever a model's code may raise, it means no
        recover(model)
        return f"its code does not accept a forest ({type(error).__name__}: {first_line(error)})", None
    other = _other_layers(model.config.get_text_config(), windows)
    return (other, None) if other else ("", logprobs)


def _try_head(
    model: Any,
    forest: Forest,
    expected: torch.Tensor,
    distance: Distance,
    tolerance: float,
    capability: Capability | None,
) -> Head | None:
    """The head as data, if it gives the log-probabilities of the model's own head."""
    head = plain_head(model)
    if head is None:
        return None
    try:
        logprobs = trained_logprobs(model, forest, head, capability)
    except Exception:  # a decoder that cannot be called by itself
        recover(model)
        return None
    return head if distance(logprobs, expected) <= tolerance else None


def _other_layers(config: Any, windows: dict[int, int | None]) -> str:
    """Which layers cannot compute a forest: other kinds, and those that bypass our attention or keep a window to
    their mask. Empty where there are none.

    `windows` holds the window that each layer passed to our attention. The sequences of the trial are shorter than most
    windows, so that a window in the model's own mask would not show in the numbers.
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
        return f"{layers - len(windows)} of its {layers} layers bypass the registered attention"
    if any(kind == "sliding_attention" and windows.get(i) is None for i, kind in enumerate(kinds)):
        return "its sliding-window layers use their own mask"
    return ""


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """The model with another of transformers' attention implementations within."""
    before = model.config._attn_implementation
    if before == implementation:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
