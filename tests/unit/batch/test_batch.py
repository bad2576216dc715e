"""Batches from a store and from memory are equal, and parts of a batch keep the values of their examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from yeonma.batch.batch import Batch
from yeonma.data.text_checks import Notes
from yeonma.tokenization.example import AnswerRole, Example, Unit
from yeonma.tokenization.store import StoreWriter, TokenStore, open_store

PROMPT = (5, 6, 7)
CHOSEN, REJECTED = AnswerRole.CHOSEN, AnswerRole.REJECTED


def example(answer: tuple[int, ...], row: int, prompt: tuple[int, ...] = PROMPT) -> Example:
    ids = np.array([*prompt, *answer], dtype=np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt), len(prompt), row, 0, 0, False, 0)


UNITS = [
    [(CHOSEN, example((8, 9), 1)), (REJECTED, example((10,), 1))],
    [(CHOSEN, example((11,), 2)), (REJECTED, example((12, 13, 14), 2)), (REJECTED, example((15, 16), 2))],
    [(CHOSEN, example((17, 18), 4)), (REJECTED, example((19, 20), 4))],
]
FIRST_EXAMPLE = [0, 2, 5]
REFERENCE = np.arange(7.0)


def written_store(folder: Path, units: list[list[tuple[AnswerRole, Example]]]) -> TokenStore:
    writer = StoreWriter.open(folder / "store")
    writer.add([Notes(0, 0, 0, 0)] * 4, [Unit(tuple(members)) for members in units])
    writer.finish({"key": "k"})
    store = open_store(folder / "store", "k")
    assert store is not None
    return store


def in_memory(order: list[int]) -> Batch:
    members = [(unit, role, member) for unit in order for role, member in UNITS[unit]]
    return Batch.of(
        [member for _, _, member in members],
        units=[unit for unit, _, _ in members],
        roles=[role for _, role, _ in members],
        example_extras={
            "reference": [
                REFERENCE[FIRST_EXAMPLE[unit] + index] for unit in order for index in range(len(UNITS[unit]))
            ]
        },
    )


def content(batch: Batch) -> dict[str, object]:
    return {
        "token_ids": [ids.tolist() for ids in batch.token_ids],
        "trained": [mask.tolist() for mask in batch.trained],
        "reference": batch.example_extras["reference"].tolist(),
        **{
            name: getattr(batch, name).tolist()
            for name in ("lengths_E", "prompt_lengths_E", "trained_counts_E", "units_E", "roles_E", "rows_E")
        },
        "unit_lengths_U": batch.unit_lengths_U.tolist(),
        "unit_rows_U": batch.unit_rows_U.tolist(),
    }


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0], [1]])
def test_batch_from_a_store_equals_the_one_made_in_memory(tmp_path: Path, order: list[int]) -> None:
    store = written_store(tmp_path, UNITS)
    batch = Batch.from_store(store, np.array(order), {"reference": REFERENCE})
    assert content(batch) == content(in_memory(order))
    assert [store.example(int(i)).token_ids.tolist() for i in batch.index_E] == content(batch)["token_ids"]
    assert batch.unit_lengths_U.tolist() == [
        3 + sum(len(e.token_ids) - 3 for _, e in UNITS[unit]) for unit in order
    ]
    assert batch.flat_token_ids is store.token_ids  # not copied


def test_select_units_keeps_their_examples_and_extras(tmp_path: Path) -> None:
    batch = Batch.from_store(written_store(tmp_path, UNITS), np.array([0, 1, 2]), {"reference": REFERENCE})
    for order in ([2], [1, 2], [2, 0]):
        assert content(batch.select_units(order)) == content(in_memory(order))
    assert len(batch.select_units([])) == batch.select_units([]).unit_count == 0


def test_prompts_with_other_answers_are_units_of_their_own_with_the_extras_of_the_prompt(
    tmp_path: Path,
) -> None:
    batch = Batch.from_store(written_store(tmp_path, UNITS), np.array([2, 0]), {"reference": REFERENCE})
    mixed = batch.with_answers_of(np.array([3, 2, 0, 1]), most_tokens=4)
    for number, other in enumerate([3, 2, 0, 1]):
        prompt = batch.token_ids[number][: batch.prompt_lengths_E[number]].tolist()
        answer = batch.token_ids[other][batch.prompt_lengths_E[other] :].tolist()
        expected = [*prompt, *answer][:4]
        assert mixed.token_ids[number].tolist() == expected
        assert mixed.trained[number].tolist() == [False] * len(prompt) + [True] * (
            len(expected) - len(prompt)
        )
    assert mixed.units_E.tolist() == [0, 1, 2, 3]
    assert mixed.unit_lengths_U.tolist() == mixed.lengths_E.tolist()
    assert mixed.example_extras["reference"].tolist() == batch.example_extras["reference"].tolist()
    assert mixed.trained_tokens == sum(int(mask.sum()) for mask in mixed.trained)


def test_other_answers_keep_the_input_keys_of_their_tokens() -> None:
    examples = [example((8, 9), 1), example((10,), 2)]
    keys = [np.arange(len(one.token_ids)) + 100 * (number + 1) for number, one in enumerate(examples)]
    mixed = Batch.of(examples, input_keys=keys).with_answers_of(np.array([1, 0]), most_tokens=9)
    assert mixed.input_keys is not None
    split = examples[0].prompt_length
    assert [own.tolist() for own in mixed.input_keys] == [
        [*keys[0][:split].tolist(), *keys[1][split:].tolist()],
        [*keys[1][:split].tolist(), *keys[0][split:].tolist()],
    ]


def test_token_and_example_extras_follow_the_selected_units() -> None:
    examples = [example((8, 9), 1), example((10,), 2), example((11, 12, 13), 3)]
    batch = Batch.of(examples, token_extras={"sampled": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]})
    part = batch.select_units([2, 0])
    assert part.token_extras["sampled"].tolist() == [3.0, 4.0, 5.0, 0.0, 1.0]
    with_advantage = part.with_example_extras({"advantage": np.array([1.0, -1.0])})
    assert with_advantage.select_units([1]).example_extras["advantage"].tolist() == [-1.0]
    assert with_advantage.select_units([1]).token_extras["sampled"].tolist() == [0.0, 1.0]


def test_prefix_is_shared_only_where_input_keys_are_equal() -> None:
    frame = tuple(range(20, 50))
    examples = [example((8,), 1, frame), example((9,), 2, frame)]
    keys = np.arange(31)
    other_keys = keys.copy()
    other_keys[18] = 99
    shared = Batch.of(examples, input_keys=[keys, keys]).forest(share_prefix=True)
    split = Batch.of(examples, input_keys=[keys, other_keys]).forest(share_prefix=True)
    plain = Batch.of(examples).forest(share_prefix=True)
    assert [(s.length, s.parent) for s in shared.segments] == [(30, None), (1, 0), (1, 0)]
    assert shared.segments == plain.segments
    assert [(s.length, s.parent) for s in split.segments] == [(18, None), (13, 0), (13, 0)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"units": [0, 1, 0]}, "must be adjacent"),
        ({"example_extras": {"advantage": [1.0]}}, r"advantage has shape \(1,\); expected \(3,\)"),
        ({"token_extras": {"sampled": [1.0, 2.0]}}, r"sampled has shape \(2,\); expected \(4,\)"),
        ({"roles": [AnswerRole.ANSWER]}, "roles has shape"),
        ({"input_keys": [np.arange(5), np.arange(5), np.arange(1)]}, "expected one value per token"),
    ],
)
def test_wrong_shapes_and_scattered_units_are_refused(more: dict[str, object], message: str) -> None:
    examples = [example((8, 9), 1), example((10,), 2), example((11,), 3)]
    with pytest.raises(ValueError, match=message):
        Batch.of(examples, **more)  # type: ignore[arg-type]


def test_trained_first_token_is_refused() -> None:
    ids = np.array([5, 6], dtype=np.int32)
    with pytest.raises(ValueError, match="first token"):
        Batch.of([Example(ids, np.array([True, True]), 0, 1, 0, 0, False, 0)])
