"""Preference losses and their gradients against the papers' formulas, written for one pair in plain floats; limit
cases; metrics as sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast, get_args

import numpy as np
import pytest
import torch

from yeonma.batch.batch import Batch
from yeonma.config.loss_sum import LossName
from yeonma.config.settings import PreferenceSettings
from yeonma.data.task import PAIRS as PAIRS_TASK
from yeonma.data.task import task_for_loss
from yeonma.errors import UserError
from yeonma.tokenization.example import AnswerRole, Example
from yeonma.train.label_losses import (
    KTO_MEASURE,
    LABEL_METRICS,
    REFERENCE_POINT,
    REWARD_COUNT,
    REWARD_SUM,
    LabelledLogprobs,
    bco_carry,
    bco_point,
    label_metric_sums,
    other_answers,
)
from yeonma.train.losses import DFT, LOG_SQUARE, REFERENCE_LOGPROB, SFT, dft_loss, untrained
from yeonma.train.pair_losses import (
    DIVERGENCES,
    PAIR_METRICS,
    PairLogprobs,
    PreferenceOptions,
    ReferenceLogprobs,
    log_odds,
    pair_metric_sums,
    rewards,
    sft_term,
)
from yeonma.train.preference_losses import LOSSES, pair_losses, preference_loss, preference_objective

PAIR_LOSSES = {name: loss for name, loss in LOSSES.items() if loss.task is PAIRS_TASK}
BY_PAIR = {name: loss for name, loss in PAIR_LOSSES.items() if not loss.measures}
"""Losses of a pair by itself; the others sort the step."""
REFERENCE_FREE = {name for name, loss in LOSSES.items() if not loss.needs_reference}
OPTIONS = PreferenceOptions(discopop_tau=0.8, beta=0.3, label_smoothing=0.1, simpo_gamma=0.7, sft_weight=0.0)


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
        weight_P=tensor_of([0.5 + 0.1 * pair.chosen_tokens for pair in pairs], dtype),
        step=step_of(pairs, dtype),
    )


def step_of(pairs: tuple[Pair, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a step of these pairs measures, for the losses that sort it."""
    units = np.repeat(np.arange(len(pairs)), 2)
    batch = Batch.of(
        [Example(np.array([1, 2], np.int32), np.array([False, True]), 1, 1, 0, 0, False, 0)] * len(units),
        units=units.tolist(),
        roles=[AnswerRole.CHOSEN, AnswerRole.REJECTED] * len(pairs),
    )
    policy = np.array([value for pair in pairs for value in (pair.chosen, pair.rejected)])
    reference = np.array(
        [value for pair in pairs for value in (pair.reference_chosen, pair.reference_rejected)]
    )
    measures = [measure for loss in PAIR_LOSSES.values() for measure in loss.measures]
    return {
        name: tensor_of(values[::2].tolist(), dtype)
        for measure in measures
        for name, values in measure.extras(batch, policy, reference).items()
    }


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


def paper_sigmoid_norm(pair: Pair, o: PreferenceOptions) -> float:
    chosen, rejected = ratios(pair)
    h = o.beta * (chosen / pair.chosen_tokens - rejected / pair.rejected_tokens)
    return (1 - o.label_smoothing) * softplus(-h) + o.label_smoothing * softplus(h)


def paper_exo_pair(pair: Pair, o: PreferenceOptions) -> float:
    h, e = margin(pair, o.beta), o.label_smoothing
    return sigma(h) * (-softplus(-h) - math.log(1 - e)) + sigma(-h) * (-softplus(h) - math.log(e))


def paper_nca_pair(pair: Pair, o: PreferenceOptions) -> float:
    chosen, rejected = (o.beta * ratio for ratio in ratios(pair))
    return softplus(-chosen) + 0.5 * softplus(chosen) + 0.5 * softplus(rejected)


def paper_bco_pair(pair: Pair, o: PreferenceOptions) -> float:
    chosen, rejected = (o.beta * ratio for ratio in ratios(pair))
    return softplus(-chosen) + softplus(rejected)


def paper_sppo_hard(pair: Pair, o: PreferenceOptions) -> float:
    chosen, rejected = ratios(pair)
    return (chosen - 1 / (2 * o.beta)) ** 2 + (rejected + 1 / (2 * o.beta)) ** 2


def paper_discopop(pair: Pair, o: PreferenceOptions) -> float:
    h = margin(pair, o.beta)
    part = sigma(h / o.discopop_tau)
    return (1 - part) * softplus(-h) + part * math.exp(-h)


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
    "sigmoid_norm": paper_sigmoid_norm,
    "exo_pair": paper_exo_pair,
    "nca_pair": paper_nca_pair,
    "bco_pair": paper_bco_pair,
    "sppo_hard": paper_sppo_hard,
    "discopop": paper_discopop,
    "sft": lambda pair, o: -pair.chosen / pair.chosen_tokens,
}


def test_every_loss_is_registered_and_every_pair_loss_has_a_formula() -> None:
    assert PAPER.keys() == BY_PAIR.keys()
    assert PAIR_LOSSES.keys() - BY_PAIR.keys() == {"aot", "aot_unpaired"}
    assert PAIR_LOSSES.keys() > REFERENCE_FREE >= {"simpo", "cpo", "orpo", "sft"}
    assert set(get_args(LossName)) == LOSSES.keys()
    for name, loss in LOSSES.items():
        assert loss.name == name
        assert loss.task is task_for_loss(name)
    settings = {field.name for field in fields(PreferenceSettings)}
    assert {field.name for field in fields(PreferenceOptions)} == settings - {"loss"}


def test_a_name_without_a_record_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(preference_loss(name) is loss for name, loss in LOSSES.items())
    monkeypatch.delitem(cast(dict[str, object], LOSSES), "hinge")
    for text in ("hinge", "sft:1,hinge:2"):
        with pytest.raises(
            UserError, match="loss hinge: this loss has no record; add a PreferenceLoss to LOSSES in"
        ):
            preference_loss(text)


@pytest.mark.parametrize("name", BY_PAIR)
def test_loss_equals_the_paper_formula(name: str) -> None:
    actual = pair_losses(LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), OPTIONS)
    assert actual.dtype == torch.float32
    assert actual.tolist() == pytest.approx(
        [PAPER[name](pair, OPTIONS) for pair in PAIRS], rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("name", BY_PAIR)
def test_gradient_equals_finite_differences_of_the_formula(name: str) -> None:
    policy = policy_of(PAIRS, torch.float64)
    pair_losses(LOSSES[name], policy, reference_of(PAIRS, torch.float64), OPTIONS).sum().backward()
    step = 1e-5
    for side, tensor in (("chosen", policy.chosen_P), ("rejected", policy.rejected_P)):
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for pair, slope in zip(PAIRS, grad.tolist(), strict=True):
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
    "sigmoid_norm": math.log(2),
    "exo_pair": -math.log(2) - 0.5 * math.log(0.9 * 0.1),
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 / (2 * OPTIONS.beta) ** 2,
    "discopop": 0.5 * math.log(2) + 0.5,
    "sigmoid": math.log(2),
    "robust": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (2 * OPTIONS.beta) ** 2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
}


@pytest.mark.parametrize("name", sorted(BY_PAIR.keys() - REFERENCE_FREE))
def test_policy_equal_to_its_reference_has_zero_margin(name: str) -> None:
    policy = policy_of(PAIRS)
    reference = ReferenceLogprobs(policy.chosen_P.detach(), policy.rejected_P.detach())
    equal = [replace(pair, reference_chosen=pair.chosen, reference_rejected=pair.rejected) for pair in PAIRS]
    by_formula = [PAPER[name](pair, OPTIONS) for pair in equal]
    actual = pair_losses(LOSSES[name], policy, reference, OPTIONS)
    assert actual.tolist() == pytest.approx(by_formula, rel=1e-6)
    if name in WITHOUT_MARGIN:
        assert by_formula == pytest.approx([WITHOUT_MARGIN[name]] * len(PAIRS))
    for reward_P in rewards(policy, reference, OPTIONS, per_token=False):
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


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES.keys() - REFERENCE_FREE - {"aot"}))
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
        for name in BY_PAIR
        if not torch.equal(
            pair_losses(LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), OPTIONS),
            pair_losses(LOSSES[name], policy_of(longer_pairs), reference_of(longer_pairs), OPTIONS),
        )
    }
    by_formula = {
        name
        for name in BY_PAIR
        if any(
            PAPER[name](pair, OPTIONS) != PAPER[name](long_pair, OPTIONS)
            for pair, long_pair in zip(PAIRS, longer_pairs, strict=True)
        )
    }
    assert changed == by_formula >= {"ipo", "simpo", "orpo", "sigmoid_norm", "sft"}
    assert {name for name in REFERENCE_FREE if LOSSES[name].per_token_reward} == changed & REFERENCE_FREE


OTHER_VALUES: dict[str, object] = {"f_divergence": "js", "wpo_weights": True}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_reads_exactly_its_declared_options(name: str) -> None:
    rows = labelled()
    policy, reference = policy_of(PAIRS), reference_of(PAIRS)

    def losses(options: PreferenceOptions) -> torch.Tensor:
        if name not in PAIR_LOSSES:
            return LOSSES[name].function(rows, options)
        return pair_losses(LOSSES[name], policy, reference, options)

    baseline = replace(OPTIONS, f_divergence="alpha")  # otherwise nothing reads f_alpha
    read = {
        field.name
        for field in fields(PreferenceOptions)
        if not torch.equal(
            losses(replace(baseline, **{field.name: OTHER_VALUES.get(field.name, 0.25)})), losses(baseline)
        )
    }
    assert read - {"wpo_weights"} == LOSSES[name].options - {"wpo_weights"}
    if name in BY_PAIR:  # the others refuse weights before any loss is computed
        assert "wpo_weights" in read & LOSSES[name].options
    else:
        assert "wpo_weights" not in LOSSES[name].options


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
    for name in BY_PAIR:
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
    used = reference if LOSSES[name].needs_reference else None
    sums = pair_metric_sums(policy, used, OPTIONS, per_token=LOSSES[name].per_token_reward)
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


SHIFT = 0.4


def labelled(dtype: torch.dtype = torch.float32, z: float = 0.4) -> LabelledLogprobs:
    return LabelledLogprobs(
        tensor_of(POLICY, dtype).requires_grad_(),
        tensor_of(REFERENCE, dtype),
        torch.tensor(TOKENS),
        torch.tensor(DESIRABLE),
        {
            REFERENCE_POINT: torch.tensor(z, dtype=dtype),
            REWARD_SUM: torch.tensor(3 * SHIFT, dtype=dtype),
            REWARD_COUNT: torch.tensor(3.0, dtype=dtype),
        },
    )


def paper_kto(logprob: float, reference: float, desirable: bool, z: float, o: PreferenceOptions) -> float:
    r = logprob - reference
    if desirable:
        return o.kto_desirable_weight - o.kto_desirable_weight * sigma(o.beta * (r - z))
    return o.kto_undesirable_weight - o.kto_undesirable_weight * sigma(o.beta * (z - r))


def paper_apo_zero_unpaired(
    logprob: float, reference: float, desirable: bool, z: float, o: PreferenceOptions
) -> float:
    r = o.beta * (logprob - reference)
    return o.kto_desirable_weight * (1 - sigma(r)) if desirable else o.kto_undesirable_weight * sigma(r)


def paper_bco(logprob: float, reference: float, desirable: bool, z: float, o: PreferenceOptions) -> float:
    logit = o.beta * (logprob - reference) - SHIFT
    if desirable:
        return o.kto_desirable_weight * softplus(-logit)
    return o.kto_undesirable_weight * softplus(logit)


LABEL_PAPER = {"kto": paper_kto, "apo_zero_unpaired": paper_apo_zero_unpaired, "bco": paper_bco}


@pytest.mark.parametrize("z", [0.0, 0.8])
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - PAIR_LOSSES.keys()))
def test_labelled_loss_and_gradient_equal_the_paper_formula(name: str, z: float) -> None:
    rows, step, paper = labelled(torch.float64, z), 1e-5, LABEL_PAPER[name]
    actual = LOSSES[name].function(rows, WEIGHTED)
    actual.sum().backward()
    assert rows.logprob_R.grad is not None
    for i, (logprob, reference, desirable) in enumerate(zip(POLICY, REFERENCE, DESIRABLE, strict=True)):
        assert actual[i].item() == pytest.approx(paper(logprob, reference, desirable, z, WEIGHTED))
        ahead, behind = (
            paper(shifted, reference, desirable, z, WEIGHTED) for shifted in (logprob + step, logprob - step)
        )
        assert rows.logprob_R.grad[i].item() == pytest.approx(
            (ahead - behind) / (2 * step), rel=1e-5, abs=1e-9
        )


def answer(prompt: Sequence[int], *tokens: int) -> Example:
    ids = np.array([*prompt, *tokens], dtype=np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt), len(prompt), 1, 0, 0, False, 0)


def labelled_batch(examples: list[Example]) -> Batch:
    return Batch.of(examples, roles=[AnswerRole.DESIRABLE] * len(examples))


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.5), (-3.0, 0.0)])
def test_kto_reference_point_is_the_positive_mean_of_the_steps_log_ratios(
    shift: float, expected: float
) -> None:
    batch = labelled_batch([answer([1, number], 3) for number in range(3)])
    measured, reference = np.array([0.5, -1.0, 2.0]) + shift, np.zeros(3)
    extras = KTO_MEASURE.extras(batch, measured, reference)
    assert extras[REFERENCE_POINT].tolist() == pytest.approx([expected] * 3)


def test_kto_measures_the_answers_of_the_step_turned_by_one_and_cut_to_the_limit() -> None:
    batch = labelled_batch([answer([1, 2], 11, 12), answer([1, 3, 4], 13), answer([5], 14, 15, 16)])
    mixed = KTO_MEASURE.examples(batch, 5)
    tokens = [ids.tolist() for ids in mixed.token_ids]
    assert tokens == [[1, 2, 14, 15, 16], [1, 3, 4, 11, 12], [5, 13]]
    assert [mask.tolist() for mask in mixed.trained] == [
        [False, False, True, True, True],
        [False, False, False, True, True],
        [False, True],
    ]
    assert [ids.tolist() for ids in KTO_MEASURE.examples(batch, 4).token_ids] == [row[:4] for row in tokens]
    assert mixed.units_E.tolist() == [0, 1, 2]
    assert mixed.unit_lengths_U.tolist() == [5, 5, 2]


@pytest.mark.parametrize(
    "prompts", ["abcd", "abac", "aabb", "aabbcc", "abcabc", "aabcb", "abbbcc", "aaab", "baaaa"]
)
def test_no_prompt_meets_an_answer_to_itself_while_there_is_another(prompts: str) -> None:
    found = other_answers(prompts).tolist()
    assert all(prompts[row] != prompts[other] for row, other in enumerate(found))
    most = max(prompts.count(prompt) for prompt in prompts)
    if 2 * most <= len(prompts):
        assert sorted(found) == list(range(len(prompts)))  # every answer is taken once


def test_a_single_prompt_meets_its_other_answers_and_a_single_row_none() -> None:
    assert other_answers("aaa").tolist() == [2, 0, 1]
    assert other_answers("a").tolist() == []
    alone = labelled_batch([answer([1, 2], 3)])
    assert len(KTO_MEASURE.examples(alone, 8)) == 0
    assert KTO_MEASURE.extras(alone, np.zeros(0), np.zeros(0))[REFERENCE_POINT].tolist() == [0.0]


def test_labelled_losses_at_their_reference_point_are_those_of_no_information() -> None:
    rows = labelled(z=0.0)
    at_point = replace(
        rows, reference_R=rows.logprob_R.detach(), step={**rows.step, REWARD_SUM: torch.tensor(0.0)}
    )
    half = [0.75 if desirable else 0.375 for desirable in DESIRABLE]
    for name, factor in (("kto", 1.0), ("apo_zero_unpaired", 1.0), ("bco", 2 * math.log(2))):
        actual = LOSSES[name].function(at_point, WEIGHTED).tolist()
        assert actual == pytest.approx([factor * value for value in half])


def test_bco_shift_is_the_mean_of_all_rewards_so_far() -> None:
    carried: Mapping[str, float] = LOSSES["bco"].start
    for desirable, undesirable, units in ((0.5, -0.25, 4), (2.0, 0.0, 2)):
        means = {"reward_desirable": desirable, "reward_undesirable": undesirable}
        carried = bco_carry(carried, means, units)
    assert carried == {REWARD_SUM: 4 * 0.25 + 2 * 2.0, REWARD_COUNT: 6}
    rows = replace(labelled(), step={name: torch.tensor(value) for name, value in carried.items()})
    assert bco_point(rows, OPTIONS).item() == pytest.approx(5 / 6 / OPTIONS.beta)
    first = replace(rows, step={name: torch.tensor(value) for name, value in LOSSES["bco"].start.items()})
    assert bco_point(first, OPTIONS).item() == 0.0


def test_kto_metrics_are_sums_by_label() -> None:
    z = 0.8
    sums = label_metric_sums(labelled(), torch.tensor(z), OPTIONS)
    assert not sums.requires_grad
    actual = dict(zip(LABEL_METRICS, sums.tolist(), strict=True))
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


# Losses that sort the step

OTHER_ORDER = (
    Pair(-14.0, -21.5, -15.5, -12.0, 5, 9),
    Pair(-30.25, -28.0, -27.0, -29.5, 11, 3),
    Pair(-2.5, -3.0, -4.5, -3.0, 4, 4),
    Pair(-12.0, -20.0, -15.0, -18.0, 40, 80),
)
"""The reference ranks these pairs otherwise than the policy, and the rejected answers otherwise than the chosen."""


def sorted_aot(pairs: tuple[Pair, ...], o: PreferenceOptions, name: str) -> float:
    """The formula over the whole step, in plain floats."""
    if name == "aot":
        over = sorted(pair.chosen - pair.rejected for pair in pairs)
        under = sorted(pair.reference_chosen - pair.reference_rejected for pair in pairs)
    else:
        over, under = (sorted(side) for side in zip(*map(ratios, pairs), strict=True))
    margins = [o.beta * (a - b) for a, b in zip(over, under, strict=True)]
    e = o.label_smoothing
    return sum((1 - e) * softplus(-margin) + e * softplus(margin) for margin in margins)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES.keys() - BY_PAIR.keys()))
def test_sorting_loss_and_gradient_equal_the_formula_over_the_step(name: str) -> None:
    policy, step = policy_of(OTHER_ORDER, torch.float64), 1e-5
    loss = pair_losses(LOSSES[name], policy, reference_of(OTHER_ORDER, torch.float64), OPTIONS).sum()
    assert loss.item() == pytest.approx(sorted_aot(OTHER_ORDER, OPTIONS, name))
    loss.backward()
    others = [
        pair_losses(LOSSES["sigmoid"], policy_of(OTHER_ORDER), reference_of(OTHER_ORDER), OPTIONS)
        .sum()
        .item()
    ]
    assert loss.item() != pytest.approx(others[0], rel=1e-2)  # ranks differ from pairs here
    for side, tensor in (("chosen", policy.chosen_P), ("rejected", policy.rejected_P)):
        assert tensor.grad is not None
        for index, slope in enumerate(tensor.grad.tolist()):
            shifted = []
            for by in (step, -step):
                pair = replace(OTHER_ORDER[index], **{side: getattr(OTHER_ORDER[index], side) + by})
                shifted.append(
                    sorted_aot((*OTHER_ORDER[:index], pair, *OTHER_ORDER[index + 1 :]), OPTIONS, name)
                )
            assert slope == pytest.approx((shifted[0] - shifted[1]) / (2 * step), rel=1e-5, abs=1e-8)


# Divergences, weights, sums


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0])
def test_divergences_have_the_slopes_of_their_functions(alpha: float) -> None:
    """f'(u) by finite differences of f: Wang et al. 2023, table 1, up to a constant that cancels in a difference."""
    functions: dict[str, Callable[[float], float]] = {
        "reverse_kl": lambda u: u * math.log(u) - u,
        "forward_kl": lambda u: u - math.log(u),
        "js": lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
        "alpha": (lambda u: u * math.log(u) - u)
        if alpha == 1
        else (lambda u: (u**alpha / alpha - u) / (alpha - 1)),
    }
    assert functions.keys() == DIVERGENCES.keys()
    for name, function in functions.items():
        for u in (0.2, 1.0, 3.0):
            slope = (function(u + 1e-6) - function(u - 1e-6)) / 2e-6
            found = DIVERGENCES[name](torch.tensor(math.log(u), dtype=torch.float64), alpha).item()
            assert found == pytest.approx(slope, abs=1e-6), name
        extreme = DIVERGENCES[name](torch.tensor([-1e4, 1e4], requires_grad=True), alpha)
        assert torch.isfinite(extreme).all()


@pytest.mark.parametrize("name", sorted(BY_PAIR.keys() - REFERENCE_FREE))
def test_a_divergence_replaces_the_log_ratios(name: str) -> None:
    options = replace(OPTIONS, f_divergence="js")
    actual = pair_losses(LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), options).tolist()
    if "f_divergence" not in LOSSES[name].options:
        assert actual == pytest.approx([PAPER[name](pair, OPTIONS) for pair in PAIRS], rel=1e-5, abs=1e-6)
        return
    slopes = [[math.log(2) - softplus(-ratio) for ratio in ratios(pair)] for pair in PAIRS]
    as_ratios = [
        replace(pair, chosen=a, rejected=b, reference_chosen=0.0, reference_rejected=0.0)
        for pair, (a, b) in zip(PAIRS, slopes, strict=True)
    ]
    assert actual == pytest.approx([PAPER[name](pair, OPTIONS) for pair in as_ratios], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", BY_PAIR)
def test_wpo_weights_multiply_the_loss_but_not_the_supervised_term(name: str) -> None:
    options = replace(OPTIONS, wpo_weights=True, sft_weight=0.5)
    actual = pair_losses(LOSSES[name], policy_of(PAIRS), reference_of(PAIRS), options).tolist()
    expected = [
        (0.5 + 0.1 * pair.chosen_tokens) * PAPER[name](pair, OPTIONS) - 0.5 * pair.chosen / pair.chosen_tokens
        for pair in PAIRS
    ]
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-5)


def two_pairs() -> Batch:
    return Batch.of(
        [answer([1], *range(length)) for length in (2, 3, 1, 4)],
        units=[0, 0, 1, 1],
        roles=[AnswerRole.CHOSEN, AnswerRole.REJECTED] * 2,
        example_extras={REFERENCE_LOGPROB: [-3.0, -4.0, -1.0, -6.0]},
    )


LOGPROB_N = torch.tensor([-1.0, -2.5, -0.5, -1.0, -2.0, -0.25, -1.5, -1.0, -2.0, -1.25], dtype=torch.float64)


def test_wpo_weight_of_a_pair_is_the_product_of_both_answers_aligned_mean_probabilities() -> None:
    batch, square_N = two_pairs(), torch.linspace(-1.0, -0.1, 10, dtype=torch.float64)
    options = replace(OPTIONS, wpo_weights=True)
    plain, _ = preference_objective(LOSSES["sigmoid"], OPTIONS, 8).sums(LOGPROB_N, batch)
    objective = preference_objective(LOSSES["sigmoid"], options, 8)
    assert objective.reads_squares
    logprob_N = LOGPROB_N.clone().requires_grad_()
    loss, _ = objective.sums(logprob_N, batch.with_token_extras({LOG_SQUARE: square_N.numpy()}))
    aligned = (LOGPROB_N - square_N).split([2, 3, 1, 4])
    weights = [math.exp(sum(float(side.mean()) for side in aligned[i : i + 2])) for i in (0, 2)]
    margins = [0.3 * (-0.5 - 0.5), 0.3 * (0.75 - 0.25)]
    e = OPTIONS.label_smoothing
    by_pair = [(1 - e) * softplus(-h) + e * softplus(h) for h in margins]
    assert plain.item() == pytest.approx(sum(by_pair))
    assert loss.item() == pytest.approx(weights[0] * by_pair[0] + weights[1] * by_pair[1])
    loss.backward()  # no gradient through the weights: the tokens of an answer have one slope
    assert logprob_N.grad is not None
    assert logprob_N.grad[0].item() == logprob_N.grad[1].item()


def test_weighted_sum_of_losses_has_the_weighted_losses_and_needs_what_its_parts_need() -> None:
    both = preference_loss("sigmoid:2, sft:0.5")
    assert both.needs_reference
    assert both.options == LOSSES["sigmoid"].options
    assert both.task is task_for_loss(both.name) is PAIRS_TASK
    policy, reference = policy_of(PAIRS), reference_of(PAIRS)
    parts = [pair_losses(LOSSES[name], policy, reference, OPTIONS) for name in ("sigmoid", "sft")]
    assert torch.allclose(pair_losses(both, policy, reference, OPTIONS), 2 * parts[0] + 0.5 * parts[1])
    papers = preference_loss("sigmoid,cpo:0.5")
    assert papers.sft_weight == 0.5
    assert not preference_loss("simpo,cpo").needs_reference
    assert preference_loss("exo_pair,sft").above_zero == LOSSES["exo_pair"].above_zero
    sorting = preference_loss("aot,sigmoid")
    assert sorting.measures == LOSSES["aot"].measures
    assert "wpo_weights" not in sorting.options
    labels = preference_loss("kto:1,bco:3")
    assert labels.carry is bco_carry
    assert torch.allclose(
        labels.function(labelled(), WEIGHTED),
        LOSSES["kto"].function(labelled(), WEIGHTED) + 3 * LOSSES["bco"].function(labelled(), WEIGHTED),
    )
    assert preference_loss("sigmoid") is preference_loss("sigmoid:1") is LOSSES["sigmoid"]


# Before the first update, and supervised losses


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_an_untrained_model_is_its_own_reference_whatever_is_stored(name: str) -> None:
    objective = preference_objective(LOSSES[name], OPTIONS, 8)
    extras = {key: np.zeros(4) for measure in objective.measures for key in measure.names}
    batch = untrained(two_pairs()).with_example_extras(extras)
    _, metrics = objective.sums(LOGPROB_N, batch)
    values = dict(zip(PAIR_METRICS, metrics.tolist(), strict=True))
    if LOSSES[name].needs_reference:
        assert [values[key] for key in PAIR_METRICS[:4]] == [0.0] * 4
    else:
        assert values["reward_margin"] != 0.0


def test_batch_without_a_reference_stays_as_it_is() -> None:
    batch = labelled_batch([answer([1], 2)])
    assert untrained(batch) is batch


def test_dft_weighs_each_token_by_its_own_probability_without_gradient() -> None:
    logprob_N = torch.tensor([-0.1, -2.0, -5.0], requires_grad=True)
    weight_N = torch.tensor([1.0, 0.5, 2.0])
    loss = dft_loss(logprob_N, weight_N)
    expected = [0.1 * math.exp(-0.1), 0.5 * 2 * math.exp(-2), 2 * 5 * math.exp(-5)]
    assert loss.item() == pytest.approx(sum(expected))
    loss.backward()
    assert logprob_N.grad is not None
    assert logprob_N.grad.tolist() == pytest.approx([-math.exp(-0.1), -0.5 * math.exp(-2), -2 * math.exp(-5)])
    batch = Batch.of([answer([1], 2, 3, 4)])
    assert DFT.evaluation is not None
    assert DFT.evaluation(logprob_N, batch)[0].item() == SFT.sums(logprob_N, batch)[0].item()
    assert DFT.sums(logprob_N, batch)[0].item() != SFT.sums(logprob_N, batch)[0].item()
