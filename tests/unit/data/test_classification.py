"""Labels among answers, and their scores: against matrices and F1 computed by hand, as scikit-learn has them."""

from __future__ import annotations

import numpy as np
import pytest

from yeonma.data.classification import (
    NO_LABEL,
    accuracy,
    as_confusion,
    confusion_matrix,
    confusion_table,
    f1_of,
    label_counts,
    labels_of,
    macro_f1,
)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["yes"] * 4 + ["no"] * 6, {"no": 6, "yes": 4}),
        ([" yes\n"] * 4 + ["yes"] + ["no"] * 5, {"no": 5, "yes": 5}),  # a tie: by name
        (["yes"] * 4 + ["no"] * 5, None),  # fewer than 5 rows for each
        (["yes"] * 100, None),
        ([str(number) for number in range(1000)], None),
        ([str(number % 31) for number in range(1000)], None),
        (["x" * 101] * 50 + ["y"] * 50, None),
        (["", "no"] * 50, None),
        ([], None),
    ],
)
def test_labels_are_few_short_texts_that_come_again_and_again(
    texts: list[str], expected: dict[str, int] | None
) -> None:
    found = label_counts(texts)
    assert found == expected
    assert found is None or list(found) == list(expected or {})


def test_thirty_labels_are_labels_and_reading_stops_at_too_many() -> None:
    found = label_counts(str(number % 30) for number in range(150))
    assert found is not None and len(found) == 30

    def endless() -> object:
        number = 0
        while True:
            yield str(number)
            number += 1

    assert label_counts(endless()) is None  # type: ignore[arg-type]


def test_confusion_matrix_is_that_of_scikit_learns_example() -> None:
    """`confusion_matrix([2, 0, 2, 2, 0, 1], [0, 0, 2, 2, 0, 2])`."""
    matrix = confusion_matrix([2, 0, 2, 2, 0, 1], [0, 0, 2, 2, 0, 2], 3)
    assert matrix[:3, :3].tolist() == [[2, 0, 0], [0, 0, 1], [1, 0, 2]]
    assert not matrix[3].any() and not matrix[:, 3].any()
    assert accuracy(matrix) == 4 / 6
    # precision 2/3, 0, 2/3; recall 1, 0, 2/3
    assert macro_f1(matrix) == pytest.approx((0.8 + 0 + 2 / 3) / 3)


def test_macro_f1_is_that_of_scikit_learns_example() -> None:
    """`f1_score([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], average="macro")`: 0.2667."""
    matrix = confusion_matrix([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], 3)
    assert macro_f1(matrix) == pytest.approx(0.8 / 3)
    assert accuracy(matrix) == pytest.approx(2 / 6)


def test_texts_that_are_no_label_are_wrong_and_have_no_f1_of_their_own() -> None:
    matrix = confusion_matrix([0, 0, 1, 2], [0, 2, 1, 1], 2)  # 2: no label
    assert accuracy(matrix) == 2 / 4
    assert macro_f1(matrix) == pytest.approx((2 / 3 + 2 / 3) / 2)
    confusion = as_confusion(matrix, ["a", "b"])
    assert confusion == {"a": {"a": 1, NO_LABEL: 1}, "b": {"b": 1}, NO_LABEL: {"b": 1}}
    assert labels_of(confusion) == ["a", "b"]
    assert [f1_of(confusion, name) for name in ("a", "b", NO_LABEL, "c")] == [2 / 3, 2 / 3, None, None]
    assert confusion_table(confusion, ["a", "b"]) == (
        ["a", "b", NO_LABEL],
        [("a", [1, 0, 1]), ("b", [0, 1, 0]), (NO_LABEL, [0, 1, 0])],
    )


def test_label_that_does_not_occur_has_no_part_in_macro_f1() -> None:
    matrix = confusion_matrix([0, 1], [0, 0], 3)
    assert macro_f1(matrix) == pytest.approx((2 / 3 + 0) / 2)
    assert np.isnan(macro_f1(np.zeros((3, 3), dtype=np.int64)))
