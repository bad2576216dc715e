"""Accuracy and macro F1 of labels in two processes, with the base sharded or not, and of a model without forests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.zygote import Zygote, together
from tests.runs import SETTINGS, model_folder, sft, write_jsonl
from tests.unit.train.test_label_accuracy import SETTINGS as LABELS
from tests.unit.train.test_label_accuracy import reviews, scores

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "shard"), [("llama", False), ("llama", True), ("bloom", False), ("bloom", True)]
)
def test_two_processes_score_labels_as_one_does(
    zygotes: Zygote, tmp_path: Path, family: str, shard: bool
) -> None:
    base = model_folder(tmp_path / "model", family)
    data = write_jsonl(tmp_path / "rows.jsonl", reviews())
    more: dict[str, object] = {**LABELS, "val_set_size": 11, "batch_size": 5, "micro_batch_size": 1}
    one = sft(tmp_path / "one", base, data, **more)
    assert one.status == 0, one.err
    options = {"base_model": base, "data_path": data, "output_dir": tmp_path / "two", **SETTINGS, **more}
    two = together(zygotes, "sft", {**options, "shard": shard})
    assert two.status == 0, two.err
    assert scores(two.looks) == scores(one.looks)
    assert len(one.looks) > 2 and {"accuracy", "macro_f1"} <= {*one.looks[0]}
