"""Metrics of the answers that a model gives while it is trained, by the names in the settings.

A metric is a name of `TEXT_METRICS` or `LABEL_METRICS`, or a function of the user's own: `FILE.py:function`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from yeonma.errors import Problem, UserError, did_you_mean
from yeonma.files import user_path
from yeonma.messages import later, tr

TEXT_METRICS: Mapping[str, tuple[str, ...]] = {
    "exact": ("exact",),
    "chrf": ("chrf",),
    "rougeL": ("rougeL",),
    "json": ("json", "json_fields"),
}
"""Metrics of generated answers, and the names of the numbers that each gives."""
LABEL_METRICS: Mapping[str, str] = {"accuracy": "accuracy", "f1": "macro_f1"}
"""Metrics of labels, which every evaluation measures by likelihood, and their keys in metrics.jsonl."""
PREFIX = "answers/"
"""Of the keys in metrics.jsonl of what was measured on generated answers."""
BEST_EXAMPLE = later("the name of a metric, such as exact")
"""What `keep_best` takes besides true and false."""
SETTING, KEEP_BEST = "answer_metrics", "keep_best"
LOSS = "loss"
"""What `keep_best` follows without a name of a metric."""


@dataclass(frozen=True)
class FunctionName:
    """A function in a Python file of the user's."""

    path: str
    """As the user wrote it."""
    function: str

    @property
    def file(self) -> Path:
        return user_path(self.path)

    def __str__(self) -> str:
        """The last part of the path alone, so that it is the same wherever the file lies."""
        return f"{Path(self.path).name}:{self.function}"


@dataclass(frozen=True)
class MetricNames:
    """The metrics of a run, each once, in the order given."""

    of_text: tuple[str, ...] = ()
    of_labels: tuple[str, ...] = ()
    functions: tuple[FunctionName, ...] = ()

    @property
    def need_answers(self) -> bool:
        """Whether answers are generated."""
        return bool(self.of_text or self.functions)

    def __bool__(self) -> bool:
        return self.need_answers or bool(self.of_labels)

    def as_list(self) -> list[str]:
        """For run.json."""
        return [*self.of_text, *self.of_labels, *map(str, self.functions)]

    def built_in(self) -> list[str]:
        """The names of the numbers that the metrics give, without those of the user's functions."""
        return [*(name for metric in self.of_text for name in TEXT_METRICS[metric]), *self.of_labels]


def metric_names(setting: Sequence[str] | str | None) -> MetricNames:
    """The metrics that `answer_metrics` names: a list, or names with commas between them. `none` and None are none.

    Raises UserError with a problem for each name that is unknown.
    """
    parts = setting.split(",") if isinstance(setting, str) else setting or ()
    names = list(dict.fromkeys(part.strip() for part in parts if part.strip() not in ("", "none")))
    known = (*TEXT_METRICS, *LABEL_METRICS)
    problems, functions = list[Problem](), list[FunctionName]()
    for name in names:
        path, colon, function = name.rpartition(":")
        if colon and path.endswith(".py"):
            functions.append(FunctionName(path, function))
        elif name not in known:
            cure = did_you_mean(name, known) or tr(
                "known are {known}, or FILE.py:function for a function of your own", known=", ".join(known)
            )
            problems.append(Problem(tr('no metric "{name}"', name=name), SETTING, cure))
    if problems:
        raise UserError(problems)
    return MetricNames(
        tuple(name for name in names if name in TEXT_METRICS),
        tuple(name for name in names if name in LABEL_METRICS),
        tuple(functions),
    )


def best_metric(keep_best: bool | str) -> str | None:
    """The metric that `keep_best` names; None for the loss, and where the last step is kept."""
    return None if isinstance(keep_best, bool) or keep_best == LOSS else keep_best


def is_built_in(number: object) -> bool:
    """Whether a number, as `keep_best` names it, does not come from a function of the user's."""
    return (
        not isinstance(number, str)
        or number in LABEL_METRICS
        or any(number in given for given in TEXT_METRICS.values())
    )


def keeps_best(keep_best: bool | str) -> bool:
    """Whether the best step is kept rather than the last one."""
    return bool(keep_best)


def check_best(keep_best: bool | str, names: MetricNames, given: Sequence[str] = ()) -> None:
    """Raises UserError if `keep_best` names a metric that the run does not measure. `given`: the names of the numbers
    that the user's functions give; until they are known, any name may be one of these."""
    name = best_metric(keep_best)
    known = [*names.built_in(), *given]
    if name is None or name in known or (names.functions and not given):
        return
    if name in (*TEXT_METRICS, *LABEL_METRICS):
        cure = tr("give --answer_metrics {name} as well", name=name)
    else:
        cure = did_you_mean(name, [LOSS, *known]) or tr(
            "give true, false or one of {known}", known=", ".join([LOSS, *known])
        )
    raise UserError(tr("the run does not measure {name}", name=name), place=KEEP_BEST, cure=cure)


def key_of(name: str) -> str:
    """The key in metrics.jsonl of a number that `keep_best` may name."""
    return LABEL_METRICS.get(name) or PREFIX + name
