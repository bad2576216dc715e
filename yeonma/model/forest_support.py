"""Can this model be trained on forests? A trial on the loaded model decides.

A tiny forest and the same sequences one by one go through the model. If the results differ (recurrent layers of a kind
that `yeonma.model.recurrence` does not have mix neighbouring tokens of different branches; ALiBi makes its own mask),
training runs one sequence at a time: slower, but still exact. A second trial has sequences on both sides of the borders
that the config names, sliding windows and lengths at which rotary frequencies change, moved to a few tokens. A model
with recurrent layers has a third one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from yeonma.batch.forest import MIN_SHARED_TOKENS, Forest, lay_out
from yeonma.errors import first_line
from yeonma.messages import counted, tr
from yeonma.model.attention.backend import Capability
from yeonma.model.attention.dispatch import FOREST, capability_of
from yeonma.model.logprobs import (
    ForestSupport,
    Head,
    plain_head,
    rotary_lengths,
    sequence_logprobs,
    trained_logprobs,
)
from yeonma.model.position_limits import model_positions
from yeonma.model.quantized import is_rounded
from yeonma.model.recurrence.pieces import MAX_PIECE
from yeonma.model.recurrence.replace import let_recurrences_take_forests
from yeonma.model.rotary_lengths import near_borders, split_by_length
from yeonma.model.sharding import recover

ATTENDING = {"full_attention", "sliding_attention", "hybrid"}
RECURRENT = {"linear_attention", "conv", "hybrid"}
WITHOUT_CONTEXT = {"mlp", "moe"}
"""Kinds of layers in a config: with attention, with a recurrence or convolution, and of single tokens."""
Distance = Callable[[torch.Tensor, torch.Tensor], float]
CONTEXT_TRIAL_TOKENS = 4
"""Tokens at the end of a sequence that are also computed without context, to measure the effect of context."""
TRIAL_WINDOW = 12
"""The sliding window of the trial at the borders."""


def check_forest_support(model: Any, seed: int = 0) -> ForestSupport:
    """Try a forest on the model. Sets the attention implementation that the result needs, and makes rotary modules give
    every sequence the frequencies of its own length. Draws no random numbers.

    The comparison runs without dropout, in the model's own precision. In float32, no log-probability may differ by more
    than 1e-4; behind recurrent layers, whose rounding adds up, by a thousandth of the mean effect of context if that is
    more. In half precision, and if activations are rounded to 8 bits, the mean difference may be up to a tenth of
    the mean effect of context, because rounding may route single tokens to other experts.
    """
    plain = choose_plain_attention(model)
    let_recurrences_take_forests(model)
    why_not = split_by_length(model)
    if why_not:
        return ForestSupport(False, None, plain, why_not)
    vocabulary = model.config.get_text_config().vocab_size
    sequences = tiny_sequences(vocabulary, seed)
    with torch.no_grad(), in_eval_mode(model):
        one_by_one = _one_by_one(model, sequences)
        expected = torch.cat(one_by_one)
        distance, tolerance = _max_difference, 1e-4
        if model.dtype != torch.float32 or is_rounded(model):
            effect = _effect_of_context(model, sequences, one_by_one)
            distance, tolerance = _mean_difference, max(1e-4, effect / 10)
        tree = recurrent_sequences(model, vocabulary, seed)
        expected_of_tree = _one_by_one(model, tree)
        tree_tolerance = max(tolerance, _effect_of_context(model, tree, expected_of_tree) / 1000)
        border_sequences = [*sequences, longer_sequence(sequences[0], vocabulary, seed)]
        expected_near_borders = None
        with near_borders(model, TRIAL_WINDOW) as has_borders:
            if has_borders:
                expected_near_borders = torch.cat(_one_by_one(model, border_sequences))
        forest = _forest_of(model, sequences)
        one_call = capability_of(model.device, model.dtype)
        # if the kernels for one call fail, segment by segment
        for capability in (one_call, None) if one_call else (None,):
            backends: dict[int, str] = {}
            why_not, logprobs = _try_forest(model, forest, capability, backends)
            if logprobs is None:
                continue
            difference = distance(logprobs, expected)
            why_not = tr(
                "a forest and the same sequences one by one differ by {difference:.1e} in log-probability",
                difference=difference,
            )
            if not difference <= tolerance:  # true for NaN
                continue
            if expected_near_borders is not None:
                with near_borders(model, TRIAL_WINDOW):
                    border_forest = _forest_of(model, border_sequences)
                    logprobs_near_borders = trained_logprobs(model, border_forest, None, capability)
                difference = distance(logprobs_near_borders, expected_near_borders)
                why_not = tr(
                    "sequences on both sides of a border of the model differ by {difference:.1e} in "
                    "log-probability from the same sequences one by one",
                    difference=difference,
                )
                if not difference <= tolerance:
                    continue
            if tree:
                forest_of_tree = _forest_of(model, tree, units=[0] * len(tree))
                logprobs_of_tree = trained_logprobs(model, forest_of_tree, None, capability)
                difference = distance(logprobs_of_tree, torch.cat(expected_of_tree))
                why_not = tr(
                    "its recurrent layers differ by {difference:.1e} in log-probability between a forest and "
                    "the same sequences one by one",
                    difference=difference,
                )
                if not difference <= tree_tolerance:
                    continue
            head = _try_head(model, forest, logprobs, distance, tolerance, capability)
            return ForestSupport(True, head, plain, "", capability, tuple(backends.values()))
    model.set_attn_implementation(plain)
    return ForestSupport(False, None, plain, why_not)


def choose_plain_attention(model: Any) -> str:
    """The attention of transformers that the model has, changed before if that leaves something out: transformers
    before 5.21 chooses SDPA for models that cap their scores, such as Gemma 2, and its SDPA ignores the cap. Later
    versions choose `eager` themselves."""
    has_cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if has_cap and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return model.config._attn_implementation or "eager"


def _forest_of(model: Any, sequences: list[np.ndarray], units: list[int] | None = None) -> Forest:
    trained = [np.ones(len(sequence), dtype=bool) for sequence in sequences]
    return lay_out(sequences, trained, units=units, rotary_lengths=rotary_lengths(model, sequences))


def _effect_of_context(
    model: Any, sequences: list[np.ndarray], logprobs_with_context: list[torch.Tensor]
) -> float:
    """The mean change of the last tokens' log-probabilities if nothing stands before them; 0 without sequences."""
    if not sequences:
        return 0.0
    without_context = _one_by_one(model, [sequence[-CONTEXT_TRIAL_TOKENS:] for sequence in sequences])
    with_context = [logprobs[1 - CONTEXT_TRIAL_TOKENS :] for logprobs in logprobs_with_context]
    return _mean_difference(torch.cat(with_context), torch.cat(without_context))


def _max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Eval mode within the block, for all modules: in a model in eval mode, PEFT leaves a new adapter's dropout on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def tiny_sequences(vocabulary: int, seed: int) -> list[np.ndarray]:
    """Three sequences. Two of them share a prefix that is long enough to become a segment."""
    random = np.random.default_rng(seed)
    frame, *ends = (
        random.integers(0, vocabulary, count, dtype=np.int32) for count in (MIN_SHARED_TOKENS, 9, 6, 7)
    )
    return [np.concatenate([frame, ends[0]]), np.concatenate([frame, ends[1]]), ends[2]]


def longer_sequence(sequence: np.ndarray, vocabulary: int, seed: int) -> np.ndarray:
    """A sequence that begins like a tiny one and is longer, so that two of them are above TRIAL_BORDER."""
    random = np.random.default_rng([seed, 1])
    end = random.integers(0, vocabulary, 12, dtype=np.int32)
    return np.concatenate([sequence[:MIN_SHARED_TOKENS], end])


_Tree = list[tuple[int, "_Tree"]]
RECURRENT_TRIAL: _Tree = [
    (1, [(2, []), (1, [(4, []), (MAX_PIECE, [(3, []), (MAX_PIECE - 1, [(1, []), (5, [])])])])]),
    (MAX_PIECE + 1, [(2, []), (1, [])]),
    (3, []),
]
"""Segments as (tokens, those that go on from it): beginnings shorter than a convolution, ends at, before and behind
the border of a piece, five levels, siblings."""


def recurrent_sequences(model: Any, vocabulary: int, seed: int) -> list[np.ndarray]:
    """The sequences of RECURRENT_TRIAL, cut to the model's positions; none for a model without recurrent layers."""
    if not RECURRENT & set(getattr(model.config.get_text_config(), "layer_types", None) or ()):
        return []
    random = np.random.default_rng([seed, 2])
    sequences: list[np.ndarray] = []

    def grow(before: np.ndarray, tree: _Tree) -> None:
        for length, children in tree:
            path = np.concatenate([before, random.integers(0, vocabulary, length, dtype=np.int32)])
            if children:
                grow(path, children)
            else:
                sequences.append(path[: model_positions(model.config)])

    grow(np.zeros(0, dtype=np.int32), RECURRENT_TRIAL)
    return sequences


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
    """(Why the forest does not work, log-probabilities by the model's own head or None). Fills `backends` by layer."""
    windows: dict[int, int | None] = {}
    recurrences = 0

    def on_recurrence() -> None:
        nonlocal recurrences
        recurrences += 1

    def on_layer(layer: Any, window: int | None, backend: str) -> None:
        index = getattr(layer, "layer_idx", None)
        index = len(windows) if index is None else index
        windows[index], backends[index] = window, backend

    try:
        model.set_attn_implementation(FOREST)
        logprobs = trained_logprobs(
            model, forest, None, capability, on_layer=on_layer, on_recurrence=on_recurrence
        )
    except Exception as error:  # a model's code may raise anything
        recover(model)
        return tr(
            "its code does not accept a forest ({name}: {error})",
            name=type(error).__name__,
            error=first_line(error),
        ), None
    reason = _unsupported_layers(model.config.get_text_config(), windows, recurrences)
    return (reason, None) if reason else ("", logprobs)


def _try_head(
    model: Any,
    forest: Forest,
    expected: torch.Tensor,
    distance: Distance,
    tolerance: float,
    capability: Capability | None,
) -> Head | None:
    """The head as data if it gives the log-probabilities of the model's own head, else None."""
    head = plain_head(model)
    if head is None:
        return None
    try:
        logprobs = trained_logprobs(model, forest, head, capability)
    except Exception:  # the decoder cannot be called on its own
        recover(model)
        return None
    return head if distance(logprobs, expected) <= tolerance else None


def _unsupported_layers(config: Any, windows: dict[int, int | None], recurrences: int) -> str:
    """A message about layers that do not support forests: other kinds, and those that bypass our attention or
    recurrences or apply a window only in their mask. Empty if there are none.

    `windows`: layer -> the window that it passed to our attention. The sequences of the trial are shorter than most
    windows, so the comparison would not show a window in the model's own mask. `recurrences`: how often a convolution
    or rule of ours was called.
    """
    layers = getattr(config, "num_hidden_layers", 1)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if has_window else "full_attention"] * layers
    unsupported = sorted(set(kinds) - ATTENDING - RECURRENT - WITHOUT_CONTEXT)
    if unsupported:
        return tr("it has {unsupported} layers", unsupported=", ".join(unsupported))
    attending, recurrent = (sum(kind in own for kind in kinds) for own in (ATTENDING, RECURRENT))
    if recurrences < recurrent:
        return tr(
            "its {recurrent} layers have recurrences that take no forests",
            recurrent=tr(" and ").join(sorted(RECURRENT & set(kinds))),
        )
    if len(windows) < attending:
        all_layers = counted(layers, "layer")
        return counted(
            attending - len(windows),
            "of its {layers} bypasses the registered attention",
            "of its {layers} bypass the registered attention",
            layers=all_layers,
        )
    if any(kind == "sliding_attention" and windows.get(i) is None for i, kind in enumerate(kinds)):
        return tr("its sliding-window layers use their own mask")
    return ""


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """Uses another of transformers' attention implementations within the block."""
    original = model.config._attn_implementation
    if original == implementation:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(original)
