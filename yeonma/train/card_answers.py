"""The model card's table of answers: what evaluations measured on them before training, of the weights that were kept,
and at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yeonma.config.metric_names import PREFIX
from yeonma.messages import tr
from yeonma.shown import markdown


def answer_table(evaluations: Sequence[Mapping[str, Any]], kept_step: int, noun: str) -> list[str]:
    """A table of the scores; nothing if the run measured none. `evaluations`: records of metrics.jsonl in their order.
    `kept_step`: the step whose weights are in the folder."""
    of_step = {
        record["step"]: record for record in evaluations if any(key.startswith(PREFIX) for key in record)
    }
    if not of_step:
        return []
    last = max(of_step)
    steps = {
        0: tr("before"),
        kept_step: tr("after"),
        last: tr("after") if last == kept_step else tr("last step"),
    }
    rows = [(name, of_step[step], step) for step, name in steps.items() if step in of_step]
    names = [key for key in of_step[last] if key.startswith(PREFIX)]
    shown = [markdown(key.removeprefix(PREFIX)) for key in names]
    return [
        tr("| answers | {columns} | step |", columns=" | ".join(shown)),
        "| --- |" + " --- |" * (len(names) + 1),
        *(
            f"| {name} | {' | '.join(f'{record[key]:.4g}' if key in record else '' for key in names)} | {step} |"
            for name, record, step in rows
        ),
        "",
        tr(
            "Measured on greedy answers to validation rows, which answers.jsonl has; `after` is the {noun} in this "
            "folder. Higher is better. exact, chrf, rougeL, json and json_fields lie between 0 and 100.",
            noun=tr(noun),
        ),
        "",
    ]
