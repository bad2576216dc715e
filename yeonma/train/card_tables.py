"""The tables of the model card: validation before and after training, the labels, and the data sets of a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yeonma.data.classification import Confusion, confusion_table, f1_of, label_name, labels_of
from yeonma.messages import counted, tr
from yeonma.shown import code

PERPLEXITY = {"perplexity": tr("perplexity")}
LABEL_SCORES = {"accuracy": tr("accuracy"), "macro_f1": tr("macro F1")}
REWARDS = {
    "reward_accuracy": tr("reward accuracy"),
    "reward_margin": tr("margin"),
    "reward_chosen": tr("reward of chosen"),
    "reward_rejected": tr("reward of rejected"),
    "reward_desirable": tr("reward of desirable"),
    "reward_undesirable": tr("reward of undesirable"),
}
"""Metrics of an evaluation -> their names on the card."""


def validation_table(before: Mapping[str, Any], after: Mapping[str, Any], units: str, noun: str) -> list[str]:
    """A table of the validation metrics before training and of the adapter or model in the folder."""
    about = tr("Both are per trained token; `after` is the {noun} in this folder.", noun=tr(noun))
    names = {**PERPLEXITY, **LABEL_SCORES} if "accuracy" in before and "accuracy" in after else PERPLEXITY
    if names is not PERPLEXITY:
        about = tr(
            "Loss and perplexity are per trained token; `after` is the {noun} in this folder. Accuracy and macro F1 "
            "are by likelihood of the labels: the prediction for a row is the label that the model finds most likely "
            "as its answer. Scored validation rows: {scored:,} of {rows:,}.",
            noun=tr(noun),
            scored=_scored_rows(after),
            rows=after["examples"],
        )
    if "reward_accuracy" in before:
        names = {key: name for key, name in REWARDS.items() if key in before}
        if units == "pairs":
            about = tr(
                "Means over {examples:,} held-out pairs; `after` is the {noun} in this folder. Reward accuracy is the "
                "fraction of pairs whose chosen answer has the higher reward.",
                examples=before["examples"],
                noun=tr(noun),
            )
        else:
            about = tr(
                "Means over {examples:,} held-out labelled answers; `after` is the {noun} in this folder. Reward "
                "accuracy is the fraction of labelled answers whose reward is on the right side of the reference "
                "point.",
                examples=before["examples"],
                noun=tr(noun),
            )
        about = f"{about} {_remark(before, names)}".rstrip()
    columns = {"loss": tr("loss"), **names}
    return [
        tr("| validation | {columns} | step |", columns=" | ".join(columns.values())),
        "| --- |" + " --- |" * (len(columns) + 1),
        *(
            f"| {name} | {' | '.join(_number(record.get(key)) for key in columns)} | {record['step']} |"
            for name, record in ((tr("before"), before), (tr("after"), after))
        ),
        "",
        about,
        "",
    ]


def _scored_rows(record: Mapping[str, Any]) -> int:
    return sum(sum(row.values()) for confusion in record["confusion"].values() for row in confusion.values())


def confusion_tables(confusions: Mapping[str, Confusion]) -> list[str]:
    """A table of each data set whose answers are labels: the rows' own labels against the predicted ones."""
    lines = []
    for name, confusion in confusions.items():
        labels = labels_of(confusion)
        columns, rows = confusion_table(confusion, labels)
        about = tr("Predicted labels after training. A row of the table has one label's validation rows:")
        if len(confusions) > 1:
            about = tr(
                "Predicted labels of {name} after training. A row of the table has one label's validation rows:",
                name=code(last_part(name)),
            )
        lines += [
            about,
            "",
            f"| {tr('label')} | {' | '.join(code(label_name(column), in_table=True) for column in columns)} | F1 |",
            "| --- |" + " --- |" * (len(columns) + 1),
            *(
                f"| {code(label_name(own), in_table=True)} | {' | '.join(f'{count:,}' for count in counts)} | "
                f"{_f1(confusion, own)} |"
                for own, counts in rows
            ),
            "",
        ]
    return lines


def _f1(confusion: Confusion, label: str) -> str:
    score = f1_of(confusion, label)
    return "" if score is None else f"{score:.4f}"


def data_set_table(sets: Sequence[Mapping[str, Any]], units: str) -> list[str]:
    """A table of a mixture's data sets."""
    if not sets:
        return []
    total = sum(one.get("weight", 0) for one in sets)
    shared = sum(one.get("share", 0) for one in sets)
    own = sum(_own_weight(one) for one in sets)
    lines = [
        tr("| data set | {units} | trained tokens | part of the mixture |", units=tr(units)),
        "| --- | --- | --- | --- |",
    ]
    for one in sets:
        times = one.get("repeats", 1)
        part = tr("{times} an epoch", times=counted(times, "time"))
        if shared:
            weight = one.get("share") or (1 - shared) * _own_weight(one) / own
            part = tr("{weight:.1%} of each step", weight=weight)
        elif total:
            part = tr("{weight:.1%} of each step", weight=one["weight"] / total)
        lines.append(
            f"| {code(one['name'], in_table=True)} | {one['examples']:,} | {one['trained_tokens']:,} | {part} |"
        )
    return [*lines, ""]


def _own_weight(one: Mapping[str, Any]) -> float:
    """What a data set weighs among those without a share, as in training."""
    return 0 if "share" in one else one.get("weight") or one["examples"] * one.get("repeats", 1)


def loss_table(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> list[str]:
    """A table of the validation losses of a mixture's data sets."""
    if not after:
        return []
    return [
        tr("| validation loss of | before | after |"),
        "| --- | --- | --- |",
        *(
            f"| {code(name, in_table=True)} | {_number(before.get(name))} | {_number(after[name])} |"
            for name in after
        ),
        "",
    ]


def _remark(before: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A remark on an evaluation before training in which the model is its own reference."""
    if any(before[key] for key in names):
        return ""
    return tr(
        "A reward measures how much more likely an answer has become compared with the "
        "reference, the model before training. So before training every reward is 0, every "
        "comparison a tie and the accuracy 0; by chance it would be 0.5."
    )


def _number(value: float | None) -> str:
    return tr("not finite") if value is None else f"{value:.4f}"


def last_part(name: str) -> str:
    """The last part of a path of this machine; other names as they are."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
