"""What log-probabilities say about a server's weights: models whose logits are a base's and what layers add to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from yeonma.adapter.sample_answers import SCALES, GreedyAnswer, SampleAnswer, ScoredIds
from yeonma.verify.served_rows import AskedRow, ComparedTokens, ServedRow
from yeonma.verify.served_weights import Weights, weights_of
from yeonma.verify.server_client import ServedScore

TOKENS, VOCABULARY, LAYERS = 120, 40, 4
SHAPE = (TOKENS, VOCABULARY)


@dataclass(frozen=True)
class Model:
    """Of the same tokens behind the same prompts: the base's logits, and what each layer's adapter adds."""

    base: np.ndarray
    added: np.ndarray
    tokens: np.ndarray

    def logprobs(
        self, share: Sequence[float] = (1.0,) * LAYERS, noise: float = 0.0, seed: int = 0
    ) -> list[float]:
        """`share`: of each layer's adapter."""
        logits = self.base + np.tensordot(np.array(share), self.added, axes=1)
        logits = logits + np.random.default_rng(seed).normal(0, noise, SHAPE) if noise else logits
        shifted = logits - logits.max(axis=1, keepdims=True)
        whole = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return [float(number) for number in whole[np.arange(TOKENS), self.tokens]]


def model(seed: int) -> Model:
    draw = np.random.default_rng(seed)
    base, added = draw.normal(0, 2.5, SHAPE), draw.normal(0, 1.5, (LAYERS, *SHAPE))
    trained = base + added.sum(axis=0)
    # the trained model's likely tokens in one half of the places, the base's in the other
    half = np.arange(TOKENS) % 2 == 0
    return Model(base, added, np.where(half, trained.argmax(axis=1), base.argmax(axis=1)))


def judged(one: Model, served: list[float], *, is_older: bool = False, **more: ComparedTokens) -> Weights:
    scaled = {scale: one.logprobs([float(scale)] * LAYERS) for scale in SCALES}
    row = ServedRow(asked(), scores=compared(one, served, None if is_older else scaled), **more)
    weights = weights_of([row])
    assert weights is not None
    return weights


def compared(
    one: Model, served: list[float], scaled: dict[str, list[float]] | None = None, new: Sequence[bool] = ()
) -> ComparedTokens:
    scores = [ServedScore(number) for number in served]
    return ComparedTokens(
        scores, one.logprobs(), one.logprobs([0.0] * LAYERS), scaled, list(new) or [False] * TOKENS
    )


def asked() -> AskedRow:
    nothing, answer = ScoredIds([], [], []), GreedyAnswer([], "", "", True)
    return AskedRow(SampleAnswer(1, [1], answer, answer, nothing, nothing, nothing), None)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75, 0.9, 1.2, 1.5, 2.0, 3.0, 4.0])
def test_adapter_at_another_scale_is_named_with_its_scale(seed: int, scale: float) -> None:
    one = model(seed)
    weights = judged(one, one.logprobs([scale] * LAYERS))
    assert weights.cause == "adapter_in_part"
    assert weights.scale == pytest.approx(scale, rel=0.2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kept", [(1, 1, 0, 0), (0, 1, 0, 1), (1, 1, 1, 0)])
def test_layers_left_out_are_a_part_of_the_adapter(seed: int, kept: tuple[float, ...]) -> None:
    one = model(seed)
    assert judged(one, one.logprobs(kept)).cause == "adapter_in_part"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("noise", "cause"), [(0.02, None), (0.3, "fewer_bits"), (0.8, "fewer_bits")])
def test_noise_is_no_part_of_the_adapter(seed: int, noise: float, cause: str | None) -> None:
    one = model(seed)
    assert judged(one, one.logprobs(noise=noise, seed=seed + 50)).cause == cause
    assert judged(one, one.logprobs(noise=noise, seed=seed + 50), is_older=True).cause == cause


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_base_alone_is_named_through_noise(seed: int, noise: float) -> None:
    one = model(seed)
    assert judged(one, one.logprobs([0.0] * LAYERS, noise, seed + 50)).cause == "adapter_not_applied"


@pytest.mark.parametrize("seed", range(5))
def test_base_beside_tells_another_adapter_from_another_base(seed: int) -> None:
    one, other = model(seed), model(seed + 20)
    of_base = one.logprobs([0.0] * LAYERS)
    other_adapter = Model(one.base, other.added, one.tokens)
    there = {"base_scores": compared(one, of_base)}
    assert judged(one, other_adapter.logprobs(), **there).cause == "another_adapter"
    there = {"base_scores": compared(one, Model(other.base, one.added, one.tokens).logprobs([0.0] * LAYERS))}
    assert judged(one, Model(other.base, one.added, one.tokens).logprobs(), **there).cause == "another_base"


@pytest.mark.parametrize("parts", [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.0, 0.6)])
def test_sum_of_some_parts_lies_between_base_and_trained_model(parts: tuple[float, float]) -> None:
    """Straight paths, of two parts at a right angle."""
    assert on_straight_path(*parts, 0.0) == "adapter_in_part"


@pytest.mark.parametrize("common", [0.0, 0.1, 0.2, 0.3])
def test_another_adapter_for_a_task_alike_is_no_part(common: float) -> None:
    assert on_straight_path(common, common, 0.5) == "another_adapter"


def on_straight_path(first: float, second: float, own: float) -> str | None:
    """The cause where a server adds so much of the adapter's two parts and of something else to the base."""
    base = np.full(TOKENS, -6.0)
    directions, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(TOKENS, 3)))
    parts = directions.T * np.sqrt(TOKENS)
    change = parts[0] + parts[1]
    served = base + first * parts[0] + second * parts[1] + own * np.sqrt(2) * parts[2]

    def of(numbers: np.ndarray) -> ComparedTokens:
        scaled = {scale: (base + float(scale) * change).tolist() for scale in SCALES}
        scores = [ServedScore(number) for number in numbers.tolist()]
        return ComparedTokens(scores, (base + change).tolist(), base.tolist(), scaled, [False] * TOKENS)

    weights = weights_of([ServedRow(asked(), scores=of(served), base_scores=of(base))])
    assert weights is not None
    return weights.cause


@pytest.mark.parametrize("seed", range(5))
def test_base_that_is_right_tells_a_slight_adapter_from_none(seed: int) -> None:
    one, other = model(seed), model(seed + 20)
    there = {"base_scores": compared(one, one.logprobs([0.0] * LAYERS))}
    slight = Model(one.base, 0.1 * one.added + 0.3 * other.added, one.tokens)
    assert judged(one, slight.logprobs()).cause in ("adapter_not_applied", "adapter_in_part")
    assert judged(one, slight.logprobs(), **there).cause in ("another_adapter", "adapter_in_part")


def test_only_new_tokens_and_a_stale_cache_are_named() -> None:
    one = model(3)
    new = [number % 10 == 0 for number in range(TOKENS)]
    served = [-11.0 if is_new else number for number, is_new in zip(one.logprobs(), new, strict=True)]
    row = ServedRow(asked(), scores=compared(one, served, new=new))
    weights = weights_of([row])
    assert weights is not None
    assert weights.cause == "new_tokens"
    of_base = one.logprobs([0.0] * LAYERS)
    assert judged(one, of_base, fresh_scores=compared(one, one.logprobs())).cause == "stale_cache"
    assert judged(one, of_base, fresh_scores=compared(one, of_base)).cause == "adapter_not_applied"
