"""Warnings about the numbers of desirable and undesirable answers, and the weights that they recommend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.pairs import chat_folder, labelled, tuned
from tests.runs import command, write_jsonl
from yeonma.train.label_balance import balance_warning

COUNTS = [(19, 1), (1, 19), (5, 1), (1, 5), (41, 10), (1000, 3), (7, 100_000), (9, 2)]
WEIGHTS = [(1.0, 1.0), (0.5, 1.0), (1.0, 30.0), (2.5, 0.1)]


def weighed(desirable: int, undesirable: int, weights: tuple[float, float]) -> float:
    return desirable * weights[0] / (undesirable * weights[1])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("counts", COUNTS)
def test_the_recommended_weights_balance_the_labels(
    counts: tuple[int, int], weights: tuple[float, float]
) -> None:
    warning = balance_warning(*counts, *weights)
    ratio = weighed(*counts, weights)
    assert (warning is None) == (1 / 4 <= ratio <= 4)
    if warning is None:
        return
    cure = re.search(r"--kto_(un)?desirable_weight (\S+) to (\S+) brings", warning)
    assert cure is not None
    for weight in map(float, cure.groups()[1:]):
        cured = (weights[0], weight) if cure[1] else (weight, weights[1])
        assert 1 - 1e-9 <= weighed(*counts, cured) <= 4 / 3 + 1e-9
        assert balance_warning(*counts, *cured) is None
    assert cure[2] != cure[3]


def test_four_to_one_is_no_reason_for_a_warning() -> None:
    assert balance_warning(4, 1, 1, 1) is balance_warning(1, 4, 1, 1) is None
    assert balance_warning(1, 1, 1, 5) is not None
    assert balance_warning(40, 1, 1, 20) is None


def test_no_weight_is_recommended_for_a_label_that_is_missing() -> None:
    assert balance_warning(20, 0, 1, 1) == (
        "the loss needs undesirable answers as well; no weight makes up for having none"
    )
    assert balance_warning(0, 3, 5, 1) == (
        "the loss needs desirable answers as well; no weight makes up for having none"
    )


def test_training_and_inspect_say_the_balance_of_the_training_rows(tmp_path: Path) -> None:
    base = chat_folder(tmp_path / "base")
    rows = [{**row, "label": "good" if number else "bad"} for number, row in enumerate(labelled(12))]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = "labels: 11 desirable, 1 undesirable; weighed, they count 11 to 1; "
    line += "--kto_undesirable_weight 8.25 to 11 brings that to between 1 to 1 and 4 to 3"
    done = tuned(tmp_path / "out", base, data, loss="kto", max_steps=1)
    assert line in done.out.splitlines()
    weighed = tuned(tmp_path / "cured", base, data, loss="kto", max_steps=1, kto_undesirable_weight=8.25)
    assert "labels: 11 desirable, 1 undesirable" in weighed.out.splitlines()

    page = tmp_path / "page.html"
    words = ["inspect", "--objective", "dpo", "--loss", "kto", "--base_model", str(base)]
    seen = command(tmp_path, *words, "--data_path", str(data), "--html", str(page))
    assert seen.status == 0, seen.err
    assert f"  {line}" in seen.out.splitlines()
    assert line in " ".join(page.read_text("utf-8").split())
    machine = command(tmp_path, *words, "--data_path", str(data), "--json", "true", "--rows", "none")
    audit = json.loads(machine.out.splitlines()[-1])["audit"]
    assert audit["train"]["labels"]["desirable"] == 11
    assert audit["train"]["labels"]["warning"] == line.partition("; ")[2]


def test_pairs_have_no_balance_of_labels(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number}", "chosen": "a", "rejected": "b"} for number in range(4)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = tuned(tmp_path / "out", chat_folder(tmp_path / "base"), data, max_steps=1)
    assert "labels:" not in done.out
