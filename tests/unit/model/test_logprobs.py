from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import FOREST_FAMILIES, VOCABULARY, tiny_model, with_lora
from yeonma.batch.forest import MIN_SHARED_TOKENS, Forest, lay_out
from yeonma.model import logprobs as forward
from yeonma.model.attention.dispatch import FOREST, layout
from yeonma.model.kernels.lora import patch_linear
from yeonma.model.load import checkpoint_activations
from yeonma.model.logprobs import Head, head_logprobs, plain_head, sequence_logprobs, trained_logprobs

EXACT = {"rtol": 1e-5, "atol": 1e-5}
ROUNDING = {"qwen3_next": 1e-4}
"""Larger for a norm that amplifies float32 rounding, by how much depends on the processor; tests of recurrent forests
compare in float64."""


def sequences() -> list[np.ndarray]:
    """Two rows with the same article and frame, one with only the frame, one that is a prefix of another, one alone."""
    rng = np.random.default_rng(5)
    frame, article, *ends = (
        rng.integers(3, VOCABULARY, n) for n in (MIN_SHARED_TOKENS + 3, MIN_SHARED_TOKENS, 9, 4, 6, 12)
    )
    rows = [
        [frame, article, ends[0]],
        [frame, article, ends[1]],
        [frame, ends[2]],
        [frame, article],
        [ends[3]],
    ]
    return [np.concatenate(row).astype(np.int32) for row in rows]


@lru_cache
def small_forest() -> tuple[Forest, tuple[torch.Tensor, ...]]:
    """The forest of `sequences()`, three tokens in four trained, and each sequence's trained mask."""
    rng = np.random.default_rng(6)
    masks = [rng.random(len(sequence)) < 0.75 for sequence in sequences()]
    forest = lay_out(sequences(), masks)
    assert len(forest.segments) == 6
    return forest, tuple(torch.from_numpy(mask) for mask in masks)


def tensors() -> list[torch.Tensor]:
    return [torch.from_numpy(sequence).long() for sequence in sequences()]


def lora_gradients(model: Any, logprob: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of a loss with a different weight for every trained token."""
    weight = torch.linspace(-1, 1, len(logprob))
    return list(
        torch.autograd.grad((weight * logprob).sum(), [p for p in model.parameters() if p.requires_grad])
    )


def plain_logprobs(model: Any) -> torch.Tensor:
    """Runs the sequences one by one through the unpatched model."""
    parts = []
    for ids, mask in zip(tensors(), small_forest()[1], strict=True):
        logprobs = torch.log_softmax(model(input_ids=ids.unsqueeze(0)).logits[0, :-1].float(), -1)
        parts.append(logprobs.gather(1, ids[1:, None])[mask[1:], 0])
    return torch.cat(parts)


@lru_cache
def expected(family: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities and LoRA gradients of the trained tokens, computed sequence by sequence."""
    model = with_lora(tiny_model(family))
    logprob = plain_logprobs(model)
    gradients = lora_gradients(model, logprob)
    assert all(float(gradient.abs().max()) > 0.1 for gradient in gradients)
    return logprob.detach(), gradients


def assert_as_expected(family: str, model: Any, logprob: torch.Tensor) -> None:
    values, gradients = expected(family)
    rounding = ROUNDING.get(family, 1e-5)
    torch.testing.assert_close(logprob.detach(), values, rtol=rounding, atol=rounding)
    for ours, theirs in zip(lora_gradients(model, logprob), gradients, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding * scale)


def head_of(model: Any, kind: str) -> Head | None:
    if kind == "own":
        return None
    head = plain_head(model)
    assert head is not None
    return head


@pytest.mark.parametrize("family", FOREST_FAMILIES)
def test_the_logits_of_a_forest_are_those_of_each_sequence_alone(family: str) -> None:
    model, (forest, _) = tiny_model(family), small_forest()
    with torch.no_grad():
        alone = [model(input_ids=ids.unsqueeze(0)).logits[0] for ids in tensors()]
        model.set_attn_implementation(FOREST)
        ours = model(
            input_ids=torch.from_numpy(forest.token_ids_T).unsqueeze(0),
            position_ids=torch.from_numpy(forest.position_T).unsqueeze(0),
            forest=layout(forest),
            use_cache=False,
        ).logits[0]
    for example, logits in enumerate(alone):
        in_example = forest.answer_N == example
        trained = np.flatnonzero(small_forest()[1][example].numpy()[1:])
        sources = torch.from_numpy(forest.source_U[forest.pair_N[in_example]])
        # granite's logits reach 10; even those of one sequence are 1.7e-5 off the float64 ones
        atol = 2e-5 if family == "granite" else ROUNDING.get(family, 1e-5)
        torch.testing.assert_close(ours[sources], logits[torch.from_numpy(trained)], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("head", ["plain", "own"])
@pytest.mark.parametrize("family", FOREST_FAMILIES)
def test_a_forest_has_the_logprobs_and_lora_gradients_of_its_sequences(family: str, head: str) -> None:
    model = with_lora(tiny_model(family))
    model.set_attn_implementation(FOREST)
    assert_as_expected(family, model, trained_logprobs(model, small_forest()[0], head_of(model, head)))


@pytest.mark.parametrize("family", FOREST_FAMILIES)
def test_gradient_checkpointing_and_the_short_lora_forward_change_nothing(family: str) -> None:
    model = with_lora(tiny_model(family))
    model.set_attn_implementation(FOREST)
    checkpoint_activations(model)
    model.train()
    if family != "gpt2":  # its layers are not nn.Linear
        assert patch_linear(model)["LoRA"] > 0
    attending: list[int] = []
    recurring: list[None] = []
    logprob = trained_logprobs(
        model,
        small_forest()[0],
        head_of(model, "plain"),
        on_layer=lambda layer, window, backend: attending.append(layer.layer_idx),
        on_recurrence=lambda: recurring.append(None),
    )
    first = len(recurring)
    assert_as_expected(family, model, logprob)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 2
    assert sorted(attending) == sorted(
        2
        * [index for index, kind in enumerate(kinds) if kind.endswith("_attention") and "linear" not in kind]
    )  # each layer ran again for the backward pass
    assert len(recurring) == 2 * first
    assert (first > 0) == any(kind in ("conv", "linear_attention") for kind in kinds)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_selective_checkpointing_recomputes_every_other_layer_and_changes_nothing(family: str) -> None:
    model = with_lora(tiny_model(family))
    model.set_attn_implementation(FOREST)
    checkpoint_activations(model.get_base_model(), "selective")
    model.train()
    layers: list[int] = []
    logprob = trained_logprobs(
        model,
        small_forest()[0],
        head_of(model, "plain"),
        on_layer=lambda layer, window, backend: layers.append(layer.layer_idx),
    )
    assert_as_expected(family, model, logprob)
    assert sorted(layers) == [0, 0, 1]


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_lora_on_the_head_trains_through_the_models_own_head(family: str) -> None:
    targets = ["q_proj", "lm_head"]
    model = with_lora(tiny_model(family), target_modules=targets)
    logprob = plain_logprobs(model)
    gradients = lora_gradients(model, logprob)
    assert plain_head(model) is None
    model.set_attn_implementation(FOREST)
    ours = trained_logprobs(model, small_forest()[0], None)
    torch.testing.assert_close(ours, logprob, **EXACT)
    for gradient, theirs in zip(lora_gradients(model, ours), gradients, strict=True):
        torch.testing.assert_close(
            gradient, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max()))
        )


@pytest.mark.parametrize("family", FOREST_FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_the_models_own_forward_is(family: str) -> None:
    model, forest = tiny_model(family).bfloat16(), small_forest()[0]
    with torch.no_grad():
        exact = plain_logprobs(tiny_model(family))
        own = plain_logprobs(model)
        model.set_attn_implementation(FOREST)
        ours = trained_logprobs(model, forest, plain_head(model))
    assert ours.dtype == torch.float32
    assert float((ours - exact).abs().mean()) <= 1.5 * float((own - exact).abs().mean())


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "lfm2", "bloom"])
def test_one_sequence_alone_gives_the_models_own_logprobs(family: str) -> None:
    model = with_lora(tiny_model(family))
    pairs = zip(tensors(), small_forest()[1], strict=True)
    assert_as_expected(family, model, torch.cat([sequence_logprobs(model, ids, mask) for ids, mask in pairs]))


def test_sequence_logprobs_are_right_if_the_model_ignores_logits_to_keep() -> None:
    model = tiny_model("llama")
    ids, mask = tensors()[0], small_forest()[1][0]
    expected_logprobs = sequence_logprobs(model, ids, mask)
    own_forward = model.forward
    model.forward = lambda logits_to_keep=None, **batch: own_forward(**batch)
    torch.testing.assert_close(sequence_logprobs(model, ids, mask), expected_logprobs)


def test_token_shared_by_two_examples_counts_for_both() -> None:
    rows = [np.arange(3, 25, dtype=np.int32)] * 2
    forest = lay_out(rows, [np.ones(22, dtype=bool), np.ones(22, dtype=bool)])
    assert len(forest.token_ids_T) == 22
    model = with_lora(tiny_model("llama"))
    alone = sequence_logprobs(model, torch.arange(3, 25), torch.ones(22, dtype=torch.bool))
    gradients = torch.autograd.grad(2 * alone.sum(), [p for p in model.parameters() if p.requires_grad])
    model.set_attn_implementation(FOREST)
    both = trained_logprobs(model, forest, plain_head(model))
    torch.testing.assert_close(both, torch.cat([alone, alone]), **EXACT)
    for ours, theirs in zip(
        torch.autograd.grad(both.sum(), [p for p in model.parameters() if p.requires_grad]),
        gradients,
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


HEADS: dict[str, Callable[[torch.Tensor, torch.Tensor], Head]] = {
    "plain": lambda weight, bias: Head(weight, None, 1.0, None),
    "bias": lambda weight, bias: Head(weight, bias, 1.0, None),
    "scale": lambda weight, bias: Head(weight, bias, 0.125, None),
    "cap": lambda weight, bias: Head(weight, None, 1.0, 2.0),
    "scale and cap": lambda weight, bias: Head(weight, bias, 3.0, 2.0),
}


def head_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    hidden, weight, bias = (
        torch.randn(shape, generator=rng).to(dtype) for shape in ((23, 16), (50, 16), (50,))
    )
    return hidden.requires_grad_(), weight, bias, torch.randint(0, 50, (23,), generator=rng)


def by_log_softmax(hidden: torch.Tensor, target: torch.Tensor, head: Head) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, head.weight_VH, head.bias_V).float() * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return torch.log_softmax(logits, -1).gather(1, target.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("rows_a_chunk", [1, 7, 1000])
@pytest.mark.parametrize("kind", HEADS)
def test_chunked_head_equals_log_softmax_in_values_and_gradients(
    kind: str, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, target = head_case(torch.float32)
    head = HEADS[kind](weight, bias)
    monkeypatch.setattr(forward, "HEAD_CHUNK_BYTES", 4 * 50 * rows_a_chunk)
    upstream = torch.linspace(-2, 1, 23)
    ours, theirs = head_logprobs(hidden, target, head), by_log_softmax(hidden, target, head)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad((upstream * ours).sum(), hidden)
    (expected_gradient,) = torch.autograd.grad((upstream * theirs).sum(), hidden)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_a_chunk", [1, 7, 1000])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("squares", [False, True])
def test_a_trained_head_has_a_gradient_of_its_own_and_the_values_of_a_frozen_one(
    kind: str, rows_a_chunk: int, squares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, target = head_case(torch.float32)
    monkeypatch.setattr(forward, "HEAD_CHUNK_BYTES", 4 * 50 * rows_a_chunk)
    upstream, frozen = torch.linspace(-2, 1, 23), HEADS[kind](weight.clone(), bias.clone())
    head = HEADS[kind](weight.requires_grad_(), bias.requires_grad_())
    trained = [hidden, weight, *([] if head.bias_V is None else [bias])]
    ours, theirs = head_logprobs(hidden, target, head, squares=squares), by_log_softmax(hidden, target, head)
    assert torch.equal(ours, head_logprobs(hidden, target, frozen, squares=squares))
    found = torch.autograd.grad((upstream * (ours[0] if squares else ours)).sum(), trained)
    expected = torch.autograd.grad((upstream * theirs).sum(), trained)
    for own, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows_a_chunk", [1, 7, 1000])
@pytest.mark.parametrize("kind", HEADS)
def test_head_gives_the_log_of_the_summed_squared_probabilities_without_gradient(
    kind: str, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, target = head_case(torch.float32)
    head = HEADS[kind](weight, bias)
    monkeypatch.setattr(forward, "HEAD_CHUNK_BYTES", 4 * 50 * rows_a_chunk)
    alone = head_logprobs(hidden, target, head)
    logprob, log_square = head_logprobs(hidden, target, head, squares=True)
    assert torch.equal(logprob, alone)
    every = torch.stack([by_log_softmax(hidden, torch.full_like(target, token), head) for token in range(50)])
    torch.testing.assert_close(log_square, every.detach().exp().square().sum(0).log(), rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(-2, 1, 23)
    (gradient,) = torch.autograd.grad((upstream * logprob).sum() + log_square.sum(), hidden)
    (expected,) = torch.autograd.grad((upstream * alone).sum(), hidden)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("head", ["plain", "own"])
def test_squares_of_a_forest_are_those_of_its_sequences(head: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        alone = [
            sequence_logprobs(model, ids, mask, squares=True)
            for ids, mask in zip(tensors(), small_forest()[1], strict=True)
        ]
        model.set_attn_implementation(FOREST)
        found = trained_logprobs(model, small_forest()[0], head_of(model, head), squares=True)
        plain = trained_logprobs(model, small_forest()[0], head_of(model, head))
    torch.testing.assert_close(found, torch.cat(alone, dim=-1), **EXACT)
    assert torch.equal(found[0], plain)


def test_the_head_in_bfloat16_gives_float32_logprobs_and_a_bfloat16_gradient() -> None:
    hidden, weight, _, target = head_case(torch.bfloat16)
    head = Head(weight, None, 1.0, None)
    ours = head_logprobs(hidden, target, head)
    exact = hidden.detach().float().requires_grad_()
    theirs = by_log_softmax(exact, target, Head(weight.float(), None, 1.0, None))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)
    (gradient,) = torch.autograd.grad(ours.sum(), hidden)
    (expected_gradient,) = torch.autograd.grad(theirs.sum(), exact)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=0, atol=0.05)


def test_head_under_no_grad_builds_no_graph() -> None:
    hidden, weight, _, target = head_case(torch.float32)
    with torch.no_grad():
        logprob = head_logprobs(hidden, target, Head(weight, None, 1.0, None))
    assert logprob.grad_fn is None
    torch.testing.assert_close(
        logprob, by_log_softmax(hidden, target, Head(weight, None, 1.0, None)).detach()
    )


def test_chunk_bytes_of_the_head_set_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, target = head_case(torch.bfloat16)
    rows: list[int] = []
    compute = forward._head_chunk
    monkeypatch.setattr(
        forward, "_head_chunk", lambda hidden, *others: [rows.append(len(hidden)), compute(hidden, *others)]
    )
    one_chunk = head_logprobs(hidden, target, Head(weight, None, 1.0, None))
    parts = head_logprobs(hidden, target, Head(weight, None, 1.0, None, chunk_bytes=4 * 50 * 10))
    assert rows == [23, 10, 10, 3]
    torch.testing.assert_close(parts, one_chunk, rtol=0, atol=1e-6)
    assert plain_head(tiny_model("llama")).chunk_bytes is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", HEADS)
def test_head_on_a_gpu_sums_in_float32(kind: str) -> None:
    hidden, weight, bias, target = (tensor.detach().to("cuda") for tensor in head_case(torch.bfloat16))
    hidden = hidden.requires_grad_()
    ours = head_logprobs(hidden, target, HEADS[kind](weight, bias))
    exact = hidden.detach().float().requires_grad_()
    theirs = by_log_softmax(exact, target, HEADS[kind](weight.float(), bias.float()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # the CPU's bfloat16 is only within 0.05
    (gradient,) = torch.autograd.grad(ours.sum(), hidden)
    (expected_gradient,) = torch.autograd.grad(theirs.sum(), exact)
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=0, atol=0.05)
