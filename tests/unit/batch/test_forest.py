from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yeonma.batch import forest as module
from yeonma.batch.forest import MIN_SHARED_TOKENS, Forest, Segment, lay_out


def ids(*parts: object) -> np.ndarray:
    """Token ids from numbers and ranges."""
    flat: list[int] = []
    for part in parts:
        flat.extend([part] if isinstance(part, int) else part)  # type: ignore[arg-type, call-overload]
    return np.array(flat, dtype=np.int32)


def all_trained(examples: list[np.ndarray]) -> list[np.ndarray]:
    return [np.ones(len(example), dtype=bool) for example in examples]


def paths(forest: Forest) -> list[list[int]]:
    """For each segment, the flat positions of its ancestors and of itself."""
    paths: list[list[int]] = []
    for segment in forest.segments:
        ancestors = paths[segment.parent] if segment.parent is not None else []
        paths.append(ancestors + list(range(segment.start, segment.start + segment.length)))
    return paths


def path_to(forest: Forest, position: int) -> list[int]:
    """The flat positions that `position` sees, up to itself."""
    path = next(
        p for p, s in zip(paths(forest), forest.segments, strict=True) if 0 <= position - s.start < s.length
    )
    return path[: path.index(position) + 1]


def trie_size(examples: list[np.ndarray]) -> int:
    return len({tuple(example[: i + 1].tolist()) for example in examples for i in range(len(example))})


PREFIX = range(100, 100 + MIN_SHARED_TOKENS)


def test_one_example_is_one_segment() -> None:
    forest = lay_out([ids(5, 6, 7, 8)], [np.array([False, False, True, True])])
    assert forest.segments == (Segment(0, 4, None),)
    assert forest.token_ids_T.tolist() == [5, 6, 7, 8]
    assert forest.position_T.tolist() == [0, 1, 2, 3]
    assert forest.source_U.tolist() == [1, 2]
    assert forest.target_U.tolist() == [7, 8]
    assert forest.pair_N.tolist() == [0, 1]
    assert forest.answer_N.tolist() == [0, 0]


def test_last_token_of_a_shared_prompt_predicts_both_answers() -> None:
    examples = [ids(PREFIX, 9, 8), ids(PREFIX, 7)]
    trained = [np.arange(len(example)) >= MIN_SHARED_TOKENS for example in examples]
    forest = lay_out(examples, trained)
    assert forest.segments == (Segment(0, 16, None), Segment(16, 1, 0), Segment(17, 2, 0))
    assert forest.token_ids_T.tolist() == [*PREFIX, 7, 9, 8]
    assert forest.position_T.tolist() == [*range(16), 16, 16, 17]
    pairs = list(zip(forest.source_U[forest.pair_N], forest.target_U[forest.pair_N], strict=True))
    assert pairs == [(15, 9), (17, 8), (15, 7)]
    assert forest.answer_N.tolist() == [0, 0, 1]


def test_fifteen_common_tokens_are_not_shared_and_sixteen_are() -> None:
    for common, segments in ((MIN_SHARED_TOKENS - 1, 2), (MIN_SHARED_TOKENS, 3)):
        shared = range(100, 100 + common)
        examples = [ids(shared, 1), ids(shared, 2)]
        assert len(lay_out(examples, all_trained(examples)).segments) == segments


def test_nested_prefixes_are_shared_if_each_adds_sixteen_tokens() -> None:
    second_prefix = range(200, 200 + MIN_SHARED_TOKENS)
    examples = [ids(PREFIX, second_prefix, 1), ids(PREFIX, 3), ids(PREFIX, second_prefix, 2)]
    forest = lay_out(examples, all_trained(examples))
    tree = [(s.length, s.parent) for s in forest.segments]
    assert tree == [(16, None), (1, 0), (16, 0), (1, 2), (1, 2)]
    short = [ids(PREFIX, range(200, 215), 1), ids(PREFIX, 3), ids(PREFIX, range(200, 215), 2)]
    assert [s.parent for s in lay_out(short, all_trained(short)).segments] == [None, 0, 0, 0]


def test_identical_examples_share_one_segment_and_count_separately() -> None:
    examples = [ids(PREFIX, 4, 5)] * 3
    forest = lay_out(examples, all_trained(examples))
    assert forest.segments == (Segment(0, 18, None),)
    assert len(forest.source_U) == 17
    assert forest.trained_tokens == 3 * 17
    assert forest.answer_N.tolist() == [0] * 17 + [1] * 17 + [2] * 17


def test_example_that_is_a_prefix_of_another_shares_its_path() -> None:
    examples = [ids(PREFIX, 4, 5, 6), ids(PREFIX, 4)]
    trained = [np.zeros(19, dtype=bool), np.zeros(17, dtype=bool)]
    trained[0][17], trained[1][16] = True, True
    forest = lay_out(examples, trained)
    assert forest.segments == (Segment(0, 17, None), Segment(17, 2, 0))
    assert forest.source_U[forest.pair_N].tolist() == [16, 15]
    assert forest.target_U[forest.pair_N].tolist() == [5, 4]


def test_without_share_prefix_each_example_is_its_own_root_segment() -> None:
    examples = [ids(PREFIX, 4)] * 2
    forest = lay_out(examples, all_trained(examples), share_prefix=False)
    assert sorted(forest.segments, key=lambda s: s.start) == [Segment(0, 17, None), Segment(17, 17, None)]


def test_example_without_trained_tokens_keeps_its_index_and_has_no_pairs() -> None:
    examples = [ids(1, 2), ids(3, 4)]
    forest = lay_out(examples, [np.zeros(2, dtype=bool), np.ones(2, dtype=bool)])
    assert forest.answer_N.tolist() == [1]


def test_large_token_ids_keep_their_values() -> None:
    examples = [ids(PREFIX, 70_000), ids(PREFIX, 255), ids(PREFIX, 2**30)]
    forest = lay_out(examples, all_trained(examples))
    assert sorted(forest.token_ids_T[16:].tolist()) == [255, 70_000, 2**30]


SMALL_EXAMPLES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=7)


@st.composite
def micro_batches(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Examples made of blocks, so that they share prefixes of 0 to 40 tokens."""
    blocks = [range(100, 116), range(200, 209), [7] * 18, [1], [2, 3]]
    parts = st.lists(st.sampled_from(blocks), min_size=1, max_size=4)
    examples = [ids(*draw(parts)) for _ in range(draw(st.integers(1, 6)))]
    random = np.random.default_rng(draw(st.integers(0, 9)))
    return examples, [random.random(len(example)) < draw(st.sampled_from([0.1, 0.9])) for example in examples]


@settings(max_examples=60, deadline=None)
@given(batch=micro_batches(), share=st.booleans())
def test_each_trained_token_is_predicted_once_from_exactly_its_own_prefix(
    batch: tuple[list[np.ndarray], list[np.ndarray]], share: bool
) -> None:
    examples, trained = batch
    forest = lay_out(examples, trained, share_prefix=share)
    for number, (example, mask) in enumerate(zip(examples, trained, strict=True)):
        of_example = forest.pair_N[forest.answer_N == number]
        expected = [t for t in range(1, len(example)) if mask[t]]
        assert forest.target_U[of_example].tolist() == example[expected].tolist()
        for pair, t in zip(of_example, expected, strict=True):
            path = path_to(forest, int(forest.source_U[pair]))
            assert forest.token_ids_T[path].tolist() == example[:t].tolist()
            assert forest.position_T[path].tolist() == list(range(t))
    assert forest.trained_tokens == sum(int(mask[1:].sum()) for mask in trained)


@settings(max_examples=60, deadline=None)
@given(batch=micro_batches(), share=st.booleans())
def test_leaf_paths_are_the_examples_and_parents_precede_children(
    batch: tuple[list[np.ndarray], list[np.ndarray]], share: bool
) -> None:
    examples, trained = batch
    forest = lay_out(examples, trained, share_prefix=share)
    assert [s.start for s in forest.segments] == np.cumsum(
        [0, *(s.length for s in forest.segments[:-1])]
    ).tolist()
    assert sum(s.length for s in forest.segments) == len(forest.token_ids_T)
    assert all(s.parent is None or s.parent < i for i, s in enumerate(forest.segments))
    token_paths = {tuple(forest.token_ids_T[path].tolist()) for path in paths(forest)}
    assert {tuple(example.tolist()) for example in examples} <= token_paths
    parents = {s.parent for s in forest.segments}
    for index, path in enumerate(paths(forest)):  # only examples are laid out: every path is a prefix of one
        tokens = forest.token_ids_T[path].tolist()
        assert any(example[: len(tokens)].tolist() == tokens for example in examples)
        assert index in parents or any(example.tolist() == tokens for example in examples)


@settings(max_examples=60, deadline=None)
@given(batch=micro_batches())
def test_segments_are_shared_if_and_only_if_sixteen_tokens_match(
    batch: tuple[list[np.ndarray], list[np.ndarray]],
) -> None:
    forest = lay_out(*batch)
    parents = {s.parent for s in forest.segments}
    assert all(s.length >= MIN_SHARED_TOKENS for i, s in enumerate(forest.segments) if i in parents)
    for a, b in combinations(forest.segments, 2):
        if a.parent == b.parent:
            first, second = (
                forest.token_ids_T[s.start : s.start + min(s.length, MIN_SHARED_TOKENS)] for s in (a, b)
            )
            assert len(first) < MIN_SHARED_TOKENS or first.tolist() != second.tolist()


@settings(max_examples=80, deadline=None)
@given(examples=SMALL_EXAMPLES)
def test_forest_without_a_minimum_length_is_as_large_as_the_trie(
    examples: list[list[int]],
) -> None:
    arrays = [ids(*example) for example in examples]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_SHARED_TOKENS", 1)
        forest = lay_out(arrays, all_trained(arrays))
    assert len(forest.token_ids_T) == trie_size(arrays)


def test_long_shared_prefix_is_laid_out_once() -> None:
    examples = [ids(range(400), [500 + i] * (i + 1)) for i in range(8)]
    forest = lay_out(examples, all_trained(examples))
    assert len(forest.token_ids_T) == trie_size(examples) == 400 + 36


def test_examples_with_other_rotary_frequencies_share_nothing() -> None:
    examples = [ids(PREFIX, 1), ids(PREFIX, 2, 3), ids(PREFIX, 2), ids(PREFIX, 4, 5, 6)]
    lengths = [1, 30, 1, 30]
    for units in (None, [0, 0, 0, 0]):
        forest = lay_out(examples, all_trained(examples), units=units, rotary_lengths=lengths)
        assert [segment.parent for segment in forest.segments] == [None, None, 1, 1, 0, 0]
        assert forest.rotary_length_T is not None
        for segment in forest.segments:
            inside = forest.rotary_length_T[segment.start : segment.start + segment.length]
            root = segment if segment.parent is None else forest.segments[segment.parent]
            assert set(inside.tolist()) == {int(forest.rotary_length_T[root.start])}
    assert lay_out(examples, all_trained(examples)).rotary_length_T is None
