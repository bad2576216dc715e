"""Preference losses and their gradients against the papers' formulas, written for one pair in plain floats; limit
cases; metrics as sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import get_args

import pytest
import torch

from yeonma.config.settings import LossName, PreferenceSettings
from yeonma.data.task import PAIRS as PAIRS_TASK
from yeonma.data.task import task_for_loss
from yeonma.errors import UserError
from yeonma.train.losses import (
    KTO_METRICS,
    LOSSES,
    PAIR_METRICS,
    LabelledLogprobs,
    PairLogprobs,
    PreferenceOptions,
    ReferenceLogprobs,
    kto_losses,
    kto_metric_sums,
    kto_reference_point,
    log_odds,
    pair_losses,
    pair_metric_sums,
    preference_loss,
    rewards,
    sft_term,
)

PAIR_LOSSES = {name: loss for name, loss in LOSSES.items() if loss.task is PAIRS_TASK}
REFERENCE_FREE = {name for name, loss in LOSSES.items() if not loss.needs_reference}
OPTIONS = PreferenceOptions(beta=0.3, label_smoothing=0.1, simpo_gamma=0.7, sft_weight=0.0)


@dataclass(frozen=True)
class Pair:
    """One pair in plain numbers: the policy's sums, the reference's, and the answers' lengths."""

    chosen: float
    rejected: float
    reference_chosen: float
    reference_rejected: float
    chosen_tokens: int
    rejected_tokens: int


PAIRS = (
    Pair(-14.0, -21.5, -15.5, -19.0, 5, 9),
    Pair(-30.25, -8.0, -27.0, -9.5, 11, 3),
    Pair(-2.5, -3.0, -2.5, -3.0, 4, 4),
    Pair(-120.0, -260.0, -150.0, -180.0, 40, 80),  # far apart: saturated sigmoids
    Pair(-260.0, -120.0, -180.0, -150.0, 80, 40),
)


def tensor_of(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def policy_of(pairs: tuple[Pair, ...], dtype: torch.dtype = torch.float32) -> PairLogprobs:
    return PairLogprobs(
        tensor_of([pair.chosen for pair in pairs], dtype).requires_grad_(),
        tensor_of([pair.rejected for pair in pairs], dtype).requires_grad_(),
        torch.tensor([pair.chosen_tokens for pair in pairs]),
        torch.tensor([pair.rejected_tokens for pair in pairs]),
    )


def reference_of(pairs: tuple[Pair, ...], dtype: torch.dtype = torch.float32) -> ReferenceLogprobs:
    return ReferenceLogprobs(
        tensor_of([pair.reference_chosen for pair in pairs], dtype),
        tensor_of([pair.reference_rejected for pair in pairs], dtype),
    )


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    """-log sigma(-x), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def ratios(pair: Pair) -> tuple[float, float]:
    return pair.chosen - pair.reference_chosen, pair.rejected - pair.reference_rejected


def margin(pair: Pair, beta: float) -> float:
    chosen, rejected = ratios(pair)
    return beta * (chosen - rejected)


def paper_sigmoid(pair: Pair, o: PreferenceOptions) -> float:
    h = margin(pair, o.beta)
    return (1 - o.label_smoothing) * softplus(-h) + o.label_smoothing * softplus(h)


def paper_hinge(pair: Pair, o: PreferenceOptions) -> float:
    return max(0.0, 1 - margin(pair, o.beta))


def paper_ipo(pair: Pair, o: PreferenceOptions) -> float:
    chosen, rejected = ratios(pair)
    h = chosen / pair.chosen_tokens - rejected / pair.rejected_tokens
    return (h - 1 / (2 * o.beta)) ** 2


def paper_robust(pair: Pair, o: PreferenceOptions) -> float:
    h, e = margin(pair, o.beta), o.label_smoothing
    return ((1 - e) * softplus(-h) - e * softplus(h)) / (1 - 2 * e)


def paper_apo_zero(pair: Pair, o: PreferenceOptions) -> float:
    chosen, rejected = ratios(pair)
    return -sigma(o.beta * chosen) + sigma(o.beta * rejected) + 1


def paper_apo_down(pair: Pair, o: PreferenceOptions) -> float:
    chosen, rejected = ratios(pair)
    return sigma(o.beta * chosen) - sigma(o.beta * chosen - o.beta * rejected) + 1


def paper_simpo(pair: Pair, o: PreferenceOptions) -> float:
    chosen, rejected = pair.chosen / pair.chosen_tokens, pair.rejected / pair.rejected_tokens
    h = o.beta * chosen - o.beta * rejected - o.simpo_gamma
    return (1 - o.label_smoothing) * softplus(-h) + o.label_smoothing * softplus(h)


def paper_cpo(pair: Pair, o: PreferenceOptions) -> float:
    h = o.beta * pair.chosen - o.beta * pair.rejected
    return (1 - o.label_smoothing) * softplus(-h) + o.label_smoothing * softplus(h)


def paper_orpo(pair: Pair, o: PreferenceOptions) -> float:
    p_chosen = math.exp(pair.chosen / pair.chosen_tokens)
    p_rejected = math.exp(pair.rejected / pair.rejected_tokens)
    odds_ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
    return -o.beta * math.log(sigma(math.log(odds_ratio)))


PAPER: dict[str, Callable[[Pair, PreferenceOptions], float]] = {
    "sigmoid": paper_sigmoid,
    "hinge": paper_hinge,
    "ipo": paper_ipo,
    "robust": paper_robust,
    "apo_zero": paper_apo_zero,
    "apo_down": paper_apo_down,
    "simpo": paper_simpo,
    "cpo": paper_cpo,
    "orpo": paper_orpo,
}


def test_every_loss_is_registered_and_every_pair_loss_has_a_formula() -> None:
    assert PAPER.keys() == PAIR_LOSSES.keys()
    assert PAIR_LOSSES.keys() > REFERENCE_FREE >= {"simpo", "cpo", "orpo"}
    assert set(get_args(LossName)) == LOSSES.keys()
    for name, loss in LOSSES.items():
        assert loss.name == name
        assert loss.task is task_for_loss(name)
    settings = {field.name for field in fields(PreferenceSettings)}
    assert {field.name for field in fields(PreferenceOptions)} == settings - {"loss"}


def test_unregistered_loss_name_is_an_error() -> None:
    assert all(preference_loss(name) is loss for name, loss in LOSSES.items())
    with pytest.raises(
        UserError, match="loss squared_hinge: this loss has no record; add a PreferenceLoss to"
    ):
        preference_loss("squared_hinge")


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_loss_equals_the_paper_formula(name: str) -> None:
    actual = pair_losses(LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), OPTIONS)
    assert actual.dtype == torch.float32
    assert actual.tolist() == pytest.approx(
        [PAPER[name](pair, OPTIONS) for pair in PAIRS], rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradient_equals_finite_differences_of_the_formula(name: str) -> None:
    policy = policy_of(PAIRS, torch.float64)
    pair_losses(LOSSES[name], policy, reference_of(PAIRS, torch.float64), OPTIONS).sum().backward()
    step = 1e-5
    for side, tensor in (("chosen", policy.chosen_P), ("rejected", policy.rejected_P)):
        assert tensor.grad is not None
        for pair, slope in zip(PAIRS, tensor.grad.tolist(), strict=True):
            ahead = replace(pair, **{side: getattr(pair, side) + step})
            behind = replace(pair, **{side: getattr(pair, side) - step})
            expected = (PAPER[name](ahead, OPTIONS) - PAPER[name](behind, OPTIONS)) / (2 * step)
            assert slope == pytest.approx(expected, rel=1e-5, abs=1e-8), (side, pair)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_sft_weight_adds_the_mean_loss_per_chosen_token(name: str) -> None:
    without_sft = pair_losses(LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), OPTIONS)
    added = (
        pair_losses(LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), replace(OPTIONS, sft_weight=0.5))
        - without_sft
    )
    expected = [-0.5 * pair.chosen / pair.chosen_tokens for pair in PAIRS]
    assert added.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_without_a_weight_the_supervised_term_has_the_papers(name: str) -> None:
    actual = pair_losses(
        LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), replace(OPTIONS, sft_weight=None)
    )
    weight = {"cpo": 1.0, "orpo": 1.0}.get(name, 0.0)
    expected = pair_losses(
        LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), replace(OPTIONS, sft_weight=weight)
    )
    assert torch.equal(actual, expected)


WITHOUT_MARGIN = {
    "sigmoid": math.log(2),
    "robust": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (2 * OPTIONS.beta) ** 2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
}


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES.keys() - REFERENCE_FREE))
def test_policy_equal_to_its_reference_has_zero_margin(name: str) -> None:
    policy = policy_of(PAIRS)
    reference = ReferenceLogprobs(policy.chosen_P.detach(), policy.rejected_P.detach())
    equal = [replace(pair, reference_chosen=pair.chosen, reference_rejected=pair.rejected) for pair in PAIRS]
    by_formula = [PAPER[name](pair, OPTIONS) for pair in equal]
    actual = pair_losses(LOSSES[name], policy, reference, OPTIONS)
    assert actual.tolist() == pytest.approx(by_formula, rel=1e-6)
    if name in WITHOUT_MARGIN:
        assert by_formula == pytest.approx([WITHOUT_MARGIN[name]] * len(PAIRS))
    for reward_P in rewards(LOSSES[name], policy, reference, OPTIONS):
        assert not reward_P.any()


def test_reference_free_losses_of_equal_answers_have_zero_margin() -> None:
    equal_answers = policy_of((Pair(-8.0, -8.0, 0.0, 0.0, 4, 4),))
    plain = replace(OPTIONS, simpo_gamma=0.0)
    assert pair_losses(LOSSES["cpo"], equal_answers, None, plain).item() == pytest.approx(math.log(2))
    assert pair_losses(LOSSES["simpo"], equal_answers, None, plain).item() == pytest.approx(math.log(2))
    assert pair_losses(LOSSES["orpo"], equal_answers, None, plain).item() == pytest.approx(
        plain.beta * math.log(2)
    )


@pytest.mark.parametrize("name", sorted(REFERENCE_FREE))
def test_reference_free_loss_ignores_the_reference(name: str) -> None:
    policy = policy_of(PAIRS)
    with_reference = pair_losses(LOSSES[name], policy, reference_of(PAIRS), OPTIONS)
    assert torch.equal(pair_losses(LOSSES[name], policy, None, OPTIONS), with_reference)
    assert torch.equal(
        pair_metric_sums(LOSSES[name], policy, None, OPTIONS),
        pair_metric_sums(LOSSES[name], policy, reference_of(PAIRS), OPTIONS),
    )


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES.keys() - REFERENCE_FREE))
def test_missing_reference_raises_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match="reference"):
        pair_losses(LOSSES[name], policy_of(PAIRS), None, OPTIONS)


def test_robust_loss_without_label_smoothing_equals_dpo() -> None:
    plain = replace(OPTIONS, label_smoothing=0.0)
    policy, reference = policy_of(PAIRS), reference_of(PAIRS)
    dpo = pair_losses(LOSSES["sigmoid"], policy, reference, plain)
    assert torch.allclose(dpo, pair_losses(LOSSES["robust"], policy, reference, plain))
    assert dpo.tolist() == pytest.approx([softplus(-margin(pair, plain.beta)) for pair in PAIRS], rel=1e-5)


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    """If labels are flipped with probability e, the expected loss is the loss of the true labels."""
    policy, reference, e = policy_of(PAIRS), reference_of(PAIRS), OPTIONS.label_smoothing
    flipped = PairLogprobs(
        policy.rejected_P, policy.chosen_P, policy.rejected_tokens_P, policy.chosen_tokens_P
    )
    flipped_reference = ReferenceLogprobs(reference.rejected_P, reference.chosen_P)
    mean = (1 - e) * pair_losses(LOSSES["robust"], policy, reference, OPTIONS) + e * pair_losses(
        LOSSES["robust"], flipped, flipped_reference, OPTIONS
    )
    true = pair_losses(LOSSES["sigmoid"], policy, reference, replace(OPTIONS, label_smoothing=0.0))
    assert torch.allclose(mean, true, rtol=1e-5, atol=1e-5)


def test_answer_lengths_change_only_per_token_losses() -> None:
    longer_pairs = tuple(replace(pair, chosen_tokens=pair.chosen_tokens + 3) for pair in PAIRS)
    changed = {
        name
        for name in PAIR_LOSSES
        if not torch.equal(
            pair_losses(LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), OPTIONS),
            pair_losses(LOSSES[name], policy_of(longer_pairs), reference_of(longer_pairs), OPTIONS),
        )
    }
    by_formula = {
        name
        for name in PAIR_LOSSES
        if any(
            PAPER[name](pair, OPTIONS) != PAPER[name](long_pair, OPTIONS)
            for pair, long_pair in zip(PAIRS, longer_pairs, strict=True)
        )
    }
    assert changed == by_formula >= {"ipo", "simpo", "orpo"}
    assert {name for name in REFERENCE_FREE if LOSSES[name].per_token_reward} == changed & REFERENCE_FREE


@pytest.mark.parametrize("name", LOSSES)
def test_loss_reads_exactly_its_declared_options(name: str) -> None:
    rows = labelled()
    policy, reference = policy_of(PAIRS), reference_of(PAIRS)

    def losses(options: PreferenceOptions) -> torch.Tensor:
        if name not in PAIR_LOSSES:
            return LOSSES[name].function(rows, torch.tensor(0.4), options)
        return pair_losses(LOSSES[name], policy, reference, options)

    baseline = losses(OPTIONS)
    read = {
        field.name
        for field in fields(PreferenceOptions)
        if not torch.equal(losses(replace(OPTIONS, **{field.name: 0.25})), baseline)
    }
    assert read == LOSSES[name].options


def test_log_odds_and_gradients_of_certain_answers_are_finite() -> None:
    sums = torch.tensor([0.0, -1e-9, -1e-4, -0.5, -30.0, -300.0], requires_grad=True)
    actual = log_odds(sums)
    for logprob, odds in zip(sums.tolist()[2:], actual.tolist()[2:], strict=True):
        p = math.exp(logprob)
        assert odds == pytest.approx(logprob - math.log1p(-p), rel=1e-4)
    actual.sum().backward()
    assert sums.grad is not None
    assert torch.isfinite(actual).all()
    assert torch.isfinite(sums.grad).all()


def test_losses_of_pairs_do_not_depend_on_their_batch() -> None:
    for name in PAIR_LOSSES:
        options = replace(OPTIONS, sft_weight=0.5)
        whole = pair_losses(LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), options)
        parts = [
            pair_losses(LOSSES[name], policy_of((pair,)), reference_of((pair,)), options).item()
            for pair in PAIRS
        ]
        assert whole.tolist() == pytest.approx(parts, rel=1e-6)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_metrics_are_sums_over_the_pairs(name: str) -> None:
    policy, reference = policy_of(PAIRS), reference_of(PAIRS)
    sums = pair_metric_sums(LOSSES[name], policy, reference, OPTIONS)
    assert not sums.requires_grad
    actual = dict(zip(PAIR_METRICS, sums.tolist(), strict=True))
    if name not in REFERENCE_FREE:
        both = [ratios(pair) for pair in PAIRS]
    elif not LOSSES[name].per_token_reward:
        both = [(pair.chosen, pair.rejected) for pair in PAIRS]
    else:
        both = [(pair.chosen / pair.chosen_tokens, pair.rejected / pair.rejected_tokens) for pair in PAIRS]
    chosen, rejected = ([OPTIONS.beta * ratio for ratio in side] for side in zip(*both, strict=True))
    expected = {
        "reward_chosen": sum(chosen),
        "reward_rejected": sum(rejected),
        "reward_margin": sum(chosen) - sum(rejected),
        "reward_accuracy": sum(a > b for a, b in zip(chosen, rejected, strict=True)),
        "logprob_chosen": sum(pair.chosen for pair in PAIRS),
        "logprob_rejected": sum(pair.rejected for pair in PAIRS),
        "tokens_chosen": sum(pair.chosen_tokens for pair in PAIRS),
        "tokens_rejected": sum(pair.rejected_tokens for pair in PAIRS),
    }
    assert 0 < expected["reward_accuracy"] < len(PAIRS)
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_supervised_term_is_the_negative_log_likelihood_per_token() -> None:
    actual = sft_term(policy_of(PAIRS)).tolist()
    assert actual == pytest.approx([-pair.chosen / pair.chosen_tokens for pair in PAIRS])


POLICY = [-14.0, -21.5, -30.25, -8.0, -2.5, -260.0]
REFERENCE = [-15.5, -19.0, -27.0, -9.5, -2.5, -120.0]
TOKENS = [5, 9, 11, 3, 4, 80]
DESIRABLE = [True, True, False, False, True, False]
WEIGHTED = replace(OPTIONS, kto_desirable_weight=1.5, kto_undesirable_weight=0.75)


def labelled(dtype: torch.dtype = torch.float32) -> LabelledLogprobs:
    return LabelledLogprobs(
        tensor_of(POLICY, dtype).requires_grad_(),
        tensor_of(REFERENCE, dtype),
        torch.tensor(TOKENS),
        torch.tensor(DESIRABLE),
    )


def paper_kto(logprob: float, reference: float, desirable: bool, z: float, o: PreferenceOptions) -> float:
    r = logprob - reference
    if desirable:
        return o.kto_desirable_weight - o.kto_desirable_weight * sigma(o.beta * (r - z))
    return o.kto_undesirable_weight - o.kto_undesirable_weight * sigma(o.beta * (z - r))


@pytest.mark.parametrize("z", [0.0, 0.8])
def test_kto_loss_and_gradient_equal_the_paper_formula(z: float) -> None:
    rows, step = labelled(torch.float64), 1e-5
    actual = kto_losses(rows, torch.tensor(z, dtype=torch.float64), WEIGHTED)
    actual.sum().backward()
    assert rows.logprob_R.grad is not None
    for i, (logprob, reference, desirable) in enumerate(zip(POLICY, REFERENCE, DESIRABLE, strict=True)):
        assert actual[i].item() == pytest.approx(paper_kto(logprob, reference, desirable, z, WEIGHTED))
        ahead, behind = (
            paper_kto(shifted, reference, desirable, z, WEIGHTED)
            for shifted in (logprob + step, logprob - step)
        )
        assert rows.logprob_R.grad[i].item() == pytest.approx(
            (ahead - behind) / (2 * step), rel=1e-5, abs=1e-9
        )


def test_kto_reference_point_is_the_positive_mean_without_gradient() -> None:
    ratio = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    point = kto_reference_point(ratio.sum(), 3)
    assert point.item() == pytest.approx(0.5)
    assert not point.requires_grad
    assert kto_reference_point(-ratio.sum(), 3).item() == 0.0


def test_kto_loss_at_the_reference_point_is_half_the_weight() -> None:
    rows = labelled()
    point = torch.tensor(0.0)
    rows_at_point = replace(rows, reference_R=rows.logprob_R.detach())
    actual = kto_losses(rows_at_point, point, WEIGHTED).tolist()
    assert actual == pytest.approx([0.75 if desirable else 0.375 for desirable in DESIRABLE])


def test_kto_metrics_are_sums_by_label() -> None:
    z = 0.8
    sums = kto_metric_sums(labelled(), torch.tensor(z), OPTIONS)
    assert not sums.requires_grad
    actual = dict(zip(KTO_METRICS, sums.tolist(), strict=True))
    ratio = [a - b for a, b in zip(POLICY, REFERENCE, strict=True)]
    for name, label in (("desirable", True), ("undesirable", False)):
        indices = [i for i, desirable in enumerate(DESIRABLE) if desirable is label]
        assert actual[name] == len(indices)
        assert actual[f"reward_{name}"] == pytest.approx(sum(OPTIONS.beta * ratio[i] for i in indices))
        assert actual[f"logprob_{name}"] == pytest.approx(sum(POLICY[i] for i in indices))
        assert actual[f"tokens_{name}"] == sum(TOKENS[i] for i in indices)
    correct = sum((r > z) if desirable else (r < z) for r, desirable in zip(ratio, DESIRABLE, strict=True))
    assert actual["reward_accuracy"] == correct
    assert 0 < correct < len(DESIRABLE)
