from __future__ import annotations

import math
from fractions import Fraction
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yeonma.batch.plan import GROUPED_STEPS, Plan, Shares, epoch_order, make_plan, micro_batches, shares

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def plan_of(count: int, batch_size: int, **overrides: object) -> Plan:
    positions = np.arange(1000, 1000 + count)
    options: dict = {"seed": 7, "num_epochs": 1.0, "max_steps": None, **overrides}
    return make_plan(positions, np.arange(count) % 13 + 1, batch_size=batch_size, **options)


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 50), batch_size=st.integers(1, 60), grouped=st.booleans(), seed=st.integers(0, 2**31)
)
def test_an_epoch_has_every_example_once_and_only_its_last_step_is_smaller(
    count: int, batch_size: int, grouped: bool, seed: int
) -> None:
    plan = plan_of(count, batch_size, num_epochs=2, group_by_length=grouped, seed=seed)
    steps = list(plan.steps())
    assert len(steps) == plan.total_steps == 2 * plan.steps_per_epoch
    for epoch in (steps[: plan.steps_per_epoch], steps[plan.steps_per_epoch :]):
        assert sorted(chain(*epoch)) == list(range(1000, 1000 + count))
        assert all(len(step) == batch_size for step in epoch[:-1])
        assert len(epoch[-1]) == (count - 1) % batch_size + 1


def test_order_differs_by_epoch_and_seed_and_is_reproducible() -> None:
    first, second = (list(chain(*part)) for part in _epochs(plan_of(40, 8, num_epochs=2)))
    assert first != second
    assert first == list(chain(*plan_of(40, 8).steps()))
    assert first != list(chain(*plan_of(40, 8, seed=8).steps()))


def _epochs(plan: Plan) -> tuple[list[np.ndarray], list[np.ndarray]]:
    steps = list(plan.steps())
    return steps[: plan.steps_per_epoch], steps[plan.steps_per_epoch :]


def test_epoch_order_is_stable_across_versions() -> None:
    """Resuming from a checkpoint depends on this order, so it must not change between versions."""
    assert epoch_order(8, seed=42, epoch=0, batch_size=4).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]


@pytest.mark.parametrize("grouped", [False, True])
def test_steps_from_a_later_start_match_those_of_a_whole_run(grouped: bool) -> None:
    plan = plan_of(21, 4, num_epochs=3, group_by_length=grouped)
    all_steps = [step.tolist() for step in plan.steps()]
    for start in (0, 3, 5, 6, 11, plan.total_steps):
        assert [step.tolist() for step in plan.steps(start)] == all_steps[start:]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [(1, None, 5), (3, None, 15), (0.5, None, 3), (2.5, None, 13), (0.01, None, 1), (3, 4, 4), (1, 100, 100)],
)
def test_epochs_may_be_fractions_and_max_steps_wins(epochs: float, max_steps: int | None, steps: int) -> None:
    plan = plan_of(10, 2, num_epochs=epochs, max_steps=max_steps)
    assert plan.total_steps == len(list(plan.steps())) == steps


def test_epoch_at_counts_passes_over_the_data() -> None:
    plan = plan_of(10, 4, num_epochs=2)
    assert [plan.epoch_at(step) for step in (0, 3, 6)] == [0.0, 1.0, 2.0]


def test_group_by_length_steps_have_similar_lengths_and_are_shuffled() -> None:
    count, batch_size = 400, 8
    lengths = np.random.default_rng(0).integers(1, 1000, count)
    order = epoch_order(count, 3, 0, batch_size, lengths)
    steps = [lengths[order[i : i + batch_size]] for i in range(0, count, batch_size)]
    spread = np.mean([step.max() - step.min() for step in steps])
    ungrouped_order = epoch_order(count, 3, 0, batch_size)
    ungrouped_steps = [lengths[ungrouped_order[i : i + batch_size]] for i in range(0, count, batch_size)]
    assert spread < 0.1 * np.mean([step.max() - step.min() for step in ungrouped_steps])
    means = [step.mean() for step in steps]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_group_by_length_puts_the_smaller_step_last() -> None:
    lengths = np.array([50, 10, 90, 30, 70, 20, 80, 40, 60, 100])
    order = epoch_order(10, 3, 0, 4, lengths)
    steps = [set(lengths[order[i : i + 4]].tolist()) for i in (0, 4, 8)]
    assert {90, 100, 80, 70} in steps[:2] and {60, 50, 40, 30} in steps[:2]
    assert steps[2] == {20, 10}


def test_group_by_length_regroups_the_examples_each_epoch() -> None:
    count, batch_size = 2 * GROUPED_STEPS * 4, 4
    lengths = np.random.default_rng(0).integers(1, 1000, count)
    orders = [epoch_order(count, 3, epoch, batch_size, lengths) for epoch in (0, 1)]
    steps_of_epochs = [
        {frozenset(order[i : i + batch_size].tolist()) for i in range(0, count, batch_size)}
        for order in orders
    ]
    assert steps_of_epochs[0] != steps_of_epochs[1]


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, processes=st.integers(1, 9))
def test_shares_partition_the_step_and_balance_tokens_within_one_example(
    lengths: list[int], processes: int
) -> None:
    parts = shares(lengths, processes)
    assert len(parts) == processes
    assert sorted(chain(*parts)) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths)


def test_a_step_with_fewer_examples_than_processes_leaves_some_idle() -> None:
    assert sorted(shares([5, 9], 4)) == [[], [], [0], [1]]


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    processes=st.integers(1, 5),
    max_examples=st.integers(1, 4),
)
def test_step_examples_do_not_depend_on_processes_or_micro_batches(
    count: int, batch_size: int, processes: int, max_examples: int
) -> None:
    plan = plan_of(count, batch_size)
    for step in islice(plan.steps(), 3):
        lengths = [int(plan.lengths[position - 1000]) for position in step]
        members = []
        for part in shares(lengths, processes):
            for batch in micro_batches([lengths[i] for i in part], max_examples):
                members.extend(int(step[part[i]]) for i in batch)
        assert sorted(members) == sorted(step.tolist())


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, examples=st.integers(1, 10), tokens=st.none() | st.integers(1, 800))
def test_micro_batches_partition_their_share_within_both_limits(
    lengths: list[int], examples: int, tokens: int | None
) -> None:
    batches = micro_batches(lengths, examples, tokens)
    assert sorted(chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= examples
        assert tokens is None or len(batch) == 1 or sum(lengths[i] for i in batch) <= tokens


def test_micro_batches_without_token_limit_are_few_and_balanced() -> None:
    batches = micro_batches([10, 1, 1, 10, 1, 1, 1], 4)
    assert sorted(sum([10, 1, 1, 10, 1, 1, 1][i] for i in batch) for batch in batches) == [12, 13]
    assert micro_batches([], 4) == []


def test_example_over_the_token_limit_gets_its_own_micro_batch() -> None:
    assert sorted(micro_batches([50, 3, 4], 8, 10)) == [[0], [1, 2]]


@pytest.mark.parametrize(("steps", "count"), [(1, 4), (2, 8), (3, 10), (7, 10)])
def test_plan_used_returns_the_examples_of_its_steps(steps: int, count: int) -> None:
    plan = plan_of(10, 4, max_steps=steps)
    assert plan.used().tolist() == sorted(set(chain(*plan.steps())))
    assert len(plan.used()) == count


def mixture(
    sizes: list[int], weights: list[int], batch_size: int, **overrides: object
) -> tuple[Plan, list[range]]:
    """A plan of data sets of these sizes, and the units of each."""
    ends = np.cumsum(sizes).tolist()
    ranges = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    mixed = Shares(tuple(np.array(units) for units in ranges), tuple(weights))
    plan = plan_of(sum(sizes), batch_size, shares=mixed, **overrides)
    return plan, [range(1000 + units.start, 1000 + units.stop) for units in ranges]


SETS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 1000)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(sets=SETS, batch_size=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_each_step_has_every_data_sets_share_rounded_down_or_up(
    sets: list[tuple[int, int]], batch_size: int, seed: int
) -> None:
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    plan, units = mixture(sizes, weights, batch_size, seed=seed, num_epochs=None, max_steps=30)
    taken = np.zeros(len(sets))
    for number, step in enumerate(plan.steps(), 1):
        assert len(step) == batch_size
        counts = np.array([sum(unit in of_set for unit in step) for of_set in units])
        exact = Fraction(batch_size, sum(weights))
        for count, weight in zip(counts.tolist(), weights, strict=True):
            assert math.floor(exact * weight) <= count <= math.ceil(exact * weight)
        taken += counts
        due = np.array(weights) / sum(weights) * batch_size * number
        assert np.abs(taken - due).max() < len(sets)  # what was rounded off comes later


@settings(max_examples=30, deadline=None)
@given(sets=SETS, batch_size=st.integers(1, 20))
def test_a_data_set_is_passed_through_whole_before_a_row_comes_again(
    sets: list[tuple[int, int]], batch_size: int
) -> None:
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    plan, units = mixture(sizes, weights, batch_size, num_epochs=None, max_steps=25)
    order = list(chain(*plan.steps()))
    for of_set, passes in zip(units, plan.passes(), strict=True):
        of_this = [unit for unit in order if unit in of_set]
        for start in range(0, len(of_this), len(of_set)):
            one_pass = of_this[start : start + len(of_set)]
            assert len(set(one_pass)) == len(one_pass)
        assert passes == len(of_this) / len(of_set)


def test_mixture_steps_from_a_later_start_match_those_of_a_whole_run() -> None:
    plan, _ = mixture([5, 13, 2], [3, 1, 2], 4, num_epochs=6)
    all_steps = [step.tolist() for step in plan.steps()]
    assert len(all_steps) == plan.total_steps == 30
    for start in (0, 1, 7, 29, 30):
        assert [step.tolist() for step in plan.steps(start)] == all_steps[start:]


def test_the_order_of_a_mixture_is_stable_across_versions() -> None:
    """Resuming from a checkpoint depends on this order, so it must not change between versions."""
    plan, _ = mixture([4, 6], [1, 2], 3, num_epochs=None, max_steps=4)
    assert [step.tolist() for step in plan.steps()] == [
        [1000, 1006, 1007],
        [1002, 1008, 1005],
        [1001, 1004, 1009],
        [1003, 1008, 1005],
    ]


def test_units_used_are_those_of_the_steps() -> None:
    for steps in (1, 4, 20):
        plan, _ = mixture([4, 30], [1, 1], 5, num_epochs=None, max_steps=steps)
        assert plan.used().tolist() == sorted(set(chain(*(step.tolist() for step in plan.steps()))))


def test_repeated_units_are_used_once() -> None:
    positions = np.array([7, 8, 7, 8, 9])
    plan = make_plan(positions, np.ones(5), batch_size=2, seed=1, num_epochs=1, max_steps=None)
    assert sorted(chain(*(step.tolist() for step in plan.steps()))) == [7, 7, 8, 8, 9]
    assert plan.used().tolist() == [7, 8, 9]


def test_fault_93_the_plan_of_very_many_steps_takes_no_time_and_no_memory() -> None:
    sizes, weights, batch_size, steps = [5, 13, 2], [3, 1, 2], 4, 10**9
    plan, _ = mixture(sizes, weights, batch_size, num_epochs=None, max_steps=steps)
    exact = [
        steps * batch_size * weight / sum(weights) / size for size, weight in zip(sizes, weights, strict=True)
    ]
    passes = plan.passes()
    assert passes == pytest.approx(exact, rel=1e-6)
    assert all(counted <= whole for counted, whole in zip(passes, exact, strict=True))
    assert sorted(plan.used().tolist()) == sorted(plan.positions.tolist())
    assert [len(step) for step in islice(plan.steps(), 3)] == [4, 4, 4]


def test_units_used_are_collected_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yeonma.batch.plan.COLLECTED_STEPS", 3)
    for steps in (2, 3, 4, 7):
        plan, _ = mixture([4, 300], [1, 1], 5, num_epochs=None, max_steps=steps)
        assert plan.used().tolist() == sorted(set(chain(*(step.tolist() for step in plan.steps()))))
