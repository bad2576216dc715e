"""What log-probabilities say about a server's weights.

Three models are known at each token: the base, the trained model, and the trained model at other scales of its adapter.
Between them lies a path, the log-probabilities by the adapter's scale: 0 is the base, 1 the trained model. A server
that applies a part of the adapter, or all of it at another scale, is off the trained model in the direction of that
path; noise of fewer bits is off it in any direction, and hardly along the path; other weights are off the whole path.
Distances are root mean squares over the tokens, in nats. No requests here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from yeonma.verify.served_rows import ComparedTokens, ServedRow, joined

WeightCause = Literal[
    "adapter_not_applied",
    "adapter_in_part",
    "another_adapter",
    "another_base",
    "other_weights",
    "fewer_bits",
    "new_tokens",
    "stale_cache",
]

ROUNDING = 0.1
"""What numbers in 16 or 8 bits and another order of sums change. SmolLM2-135M with an adapter: computed in bfloat16
0.07, with weights in Q8_0 0.06, in bfloat16 0.03, in float16 0.003."""
NOISE = 1.9
"""The most that weights in 4 bits change; or NOISE_OF_CHANGE of what training changed, if that is less. The same model:
Q5_0 0.6, nf4 1.2, Q4_0 1.4, of a change of 4.7."""
NOISE_OF_CHANGE = 0.4
CHANGED = 0.03
"""Below this the trained model and its base cannot be told apart by these tokens."""
LOWEST = -12.0
"""Log-probabilities below count as this: those of very unlikely tokens are mostly noise."""
EXPLAINED = 0.9
"""Of a difference, what the nearest point of the path may leave for the path to be its direction. The same model: with
layers or kinds of layers left out, and at a quarter to four times its scale, 0.1 to 0.75; with fewer bits, 0.94 to
1."""
BESIDE = 0.6
"""Of what training changed: farther from the whole path there are other weights."""
ON_PATH = 0.5
"""Of the way to the nearer end. Below the trained scale, a point farther than this from the path must lie in the ball
that has the path's ends as its poles (Thales): what the adapter's layers do adds up from pole to pole, and where they
do not oppose each other, the sum of some of them is in the ball. Another adapter is not, even for a task much alike.
Squares of the ways to both ends, over that of the whole: parts of the same model's adapter 0.72 to 0.97, the tests'
other adapter 1.06."""
LITTLE = 0.2
"""Of what is off at added tokens, what others may be off."""
MOVED = 0.06
"""Points of the path nearer than this to the trained model, or to the base, count as that."""


@dataclass(frozen=True)
class Weights:
    """What log-probabilities say about a server's weights."""

    cause: WeightCause | None
    """None: they are the trained ones, up to rounding."""
    distance: float
    """From the trained model, in nats of root mean square."""
    tokens: int
    scale: float | None = None
    """Where an adapter is applied in part: at which scale the trained one is nearest."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of the same tokens, shape (tokens,) each."""

    served: np.ndarray
    trained: np.ndarray
    base: np.ndarray | None
    path: ScalePath | None


@dataclass(frozen=True)
class ScalePath:
    """Log-probabilities by the adapter's scale: `points` of shape (scales, tokens) at rising `scales`."""

    scales: np.ndarray
    points: np.ndarray

    def nearest(self, served: np.ndarray) -> tuple[float, float]:
        """The scale whose point is nearest, and how far it is. The last piece goes on to twice the trained scale."""
        last = max(2.0, float(self.scales[-1]))
        fine = np.linspace(0, last, int(last * 50) + 1)
        off = served - self._shares(fine) @ self.points
        distances = np.sqrt(np.mean(off**2, axis=1))
        best = int(np.argmin(distances))
        return float(fine[best]), float(distances[best])

    def _shares(self, fine: np.ndarray) -> np.ndarray:
        """Of each known point in the path at `fine` scales, shape (fine, scales). Between two known points: the
        parabolas through these and each neighbour, mixed by their nearness."""
        last = len(self.scales) - 1
        left = np.clip(np.searchsorted(self.scales, fine, side="right") - 1, 0, last - 1)
        way = (fine - self.scales[left]) / (self.scales[left + 1] - self.scales[left])
        if last < 2:
            return np.stack([1 - way, way], axis=1)
        lower, upper = np.maximum(left - 1, 0), np.minimum(left, last - 2)
        shares = (1 - way)[:, None] * self._parabola(lower, fine)
        return np.asarray(shares + way[:, None] * self._parabola(upper, fine))

    def _parabola(self, first: np.ndarray, fine: np.ndarray) -> np.ndarray:
        """Of each known point in the parabola through three of them from `first` on (Lagrange)."""
        shares = np.zeros((len(fine), len(self.scales)))
        for one in range(3):
            factor = np.ones(len(fine))
            for other in (first + step for step in range(3) if step != one):
                factor *= (fine - self.scales[other]) / (self.scales[first + one] - self.scales[other])
            shares[np.arange(len(fine)), first + one] = factor
        return shares


def weights_of(rows: Sequence[ServedRow]) -> Weights | None:
    """None if the server tells no log-probabilities of given tokens."""
    scores = joined([row.scores for row in rows])
    if scores is None:
        return None
    numbers = _numbers(scores)
    distance, tokens = _rms(numbers.served - numbers.trained), len(numbers.served)
    cause, scale = _cause_of(numbers)
    if cause is None:
        return Weights(None, distance, tokens)
    fresh = joined([row.fresh_scores for row in rows])
    if fresh is not None and _is_right(_numbers(fresh)):
        return Weights("stale_cache", distance, tokens)
    if _only_by_new_tokens(numbers, scores.by_new):
        return Weights("new_tokens", distance, tokens)
    known_scale = cause == "adapter_in_part"
    alone = joined([row.base_scores for row in rows])
    if alone is not None:
        cause = _beside_base(cause, _numbers(alone), numbers)
    return Weights(cause, distance, tokens, scale if known_scale and cause == "adapter_in_part" else None)


def _cause_of(numbers: TokenLogprobs) -> tuple[WeightCause | None, float | None]:
    """The cause, and the scale at which the path is nearest."""
    served, trained, base = numbers.served, numbers.trained, numbers.base
    distance = _rms(served - trained)
    change = 0.0 if base is None else _rms(trained - base)
    if base is None or numbers.path is None or change < CHANGED:
        if distance <= ROUNDING:
            return None, None
        return ("fewer_bits" if distance <= NOISE else "other_weights"), None
    from_base = _rms(served - base)
    scale, rest = numbers.path.nearest(served)
    is_along = (
        rest <= EXPLAINED * min(distance, from_base)
        and rest <= BESIDE * change
        and (
            scale >= 1
            or rest <= ON_PATH * min(distance, from_base)
            or distance**2 + from_base**2 <= change**2
        )
    )
    if scale < MOVED and from_base <= ROUNDING and from_base < distance:
        return "adapter_not_applied", scale
    is_elsewhere = abs(scale - 1) > MOVED or distance > ROUNDING
    if is_along and scale >= MOVED and is_elsewhere:
        return "adapter_in_part", scale
    if distance <= ROUNDING:
        return None, scale
    noise = _noise(change)
    if distance <= from_base:
        return ("fewer_bits" if distance <= noise else "other_weights"), scale
    return ("adapter_not_applied" if from_base <= noise else "other_weights"), scale


def _beside_base(cause: WeightCause, alone: TokenLogprobs, numbers: TokenLogprobs) -> WeightCause:
    """The cause, where the server has the base beside the adapter, whose numbers are `alone`."""
    if alone.base is None or numbers.base is None:
        return cause
    off = _rms(alone.served - alone.base)
    if cause == "adapter_not_applied":
        # the base's bits are known to be right, so it is not they that are off
        is_base = off > ROUNDING / 2 or _rms(numbers.served - numbers.base) <= ROUNDING
        return cause if is_base else "another_adapter"
    if off > _noise(_rms(alone.trained - alone.base)):
        return "another_base"
    if cause == "other_weights":
        return "another_adapter"
    if cause == "fewer_bits" and off <= ROUNDING / 2:
        return "adapter_in_part"  # near the trained model, and it is not the base's bits
    return cause


def _is_right(numbers: TokenLogprobs) -> bool:
    return _cause_of(numbers)[0] is None


def _only_by_new_tokens(numbers: TokenLogprobs, by_new: Sequence[bool]) -> bool:
    """Whether the numbers are off only at tokens that training added and behind these. The others may move a little, by
    the share of probability that the added ones have there."""
    new = np.array(by_new, dtype=bool)
    off = numbers.served - numbers.trained
    if not new.any() or new.all():
        return False
    return _rms(off[new]) > ROUNDING and _rms(off[~new]) <= max(ROUNDING, LITTLE * _rms(off[new]))


def _noise(change: float) -> float:
    """The most that fewer bits explain. `change`: what training changed."""
    return min(max(ROUNDING, NOISE_OF_CHANGE * change), NOISE)


def _numbers(scores: ComparedTokens) -> TokenLogprobs:
    """Where the server tells only an upper bound, lower numbers of the others count as this bound."""
    served = np.array([score.logprob for score in scores.served], dtype=np.float64)
    bounds = [score.logprob if score.is_upper_bound else LOWEST for score in scores.served]
    lowest = np.maximum(np.array(bounds, dtype=np.float64), LOWEST)

    def bounded(numbers: Sequence[float]) -> np.ndarray:
        return np.maximum(np.array(numbers, dtype=np.float64), lowest)

    trained = bounded(scores.trained)
    if scores.base is None:
        return TokenLogprobs(np.maximum(served, lowest), trained, None, None)
    base = bounded(scores.base)
    points = {0.0: base, 1.0: trained}
    points |= {float(scale): bounded(numbers) for scale, numbers in (scores.scaled or {}).items()}
    scales = sorted(points)
    path = ScalePath(np.array(scales), np.stack([points[scale] for scale in scales]))
    return TokenLogprobs(np.maximum(served, lowest), trained, base, path)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
