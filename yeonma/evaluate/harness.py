"""Benchmarks of lm-evaluation-harness (`lm_eval`): their tasks, and what the harness measures with a model on them.

The harness reads tasks and data, writes the requests, and scores the responses. Few-shot examples are drawn with its
own seeds, again for each model, so that all models get the same requests; this is checked.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yeonma.config.settings import EvalSettings
from yeonma.errors import Log, Problem, UserError, did_you_mean, first_line
from yeonma.evaluate.harness_model import unknown_generation_keys
from yeonma.evaluate.harness_scores import SUMS_FORMS, GroupScores, ItemScores
from yeonma.evaluate.harness_settings import include_folder, task_names
from yeonma.hub import why_unreachable
from yeonma.messages import counted, tr

PYTHON_SEED, OTHER_SEED = 0, 1234
"""The harness's own: of Python's random numbers; of NumPy, torch and the choice of few-shot examples."""
MAX_PROBLEMS = 20
NOT_A_METRIC = ("name", "alias", "sample_len")

HarnessResults = Mapping[str, Any]
"""What `lm_eval.evaluator.evaluate` returns."""


@dataclass(frozen=True, eq=False)
class Benchmarks:
    """Tasks whose data are here. `asked_for`: the names of tasks and groups that the settings name."""

    asked_for: tuple[str, ...]
    loaded: Mapping[str, Any]
    """What `TaskManager.load` returns: tasks and groups by name."""

    @property
    def tasks(self) -> Mapping[str, Any]:
        """Each task alone; those of a group among them."""
        return self.loaded["tasks"]

    @property
    def groups(self) -> Mapping[str, Any]:
        return self.loaded.get("groups") or {}


def open_benchmarks(settings: EvalSettings, *, has_chat_template: bool, log: Log) -> Benchmarks:
    """Finds the tasks and reads their data, from the hub where they lie there.

    Raises UserError for names that no task has, data that are neither here nor to be had, tasks that run a model's code
    without `confirm_run_unsafe_code`, and tasks that this model cannot answer.
    """
    names, folder = task_names(settings), include_folder(settings)
    if settings.apply_chat_template and not has_chat_template:
        raise UserError(
            tr("the base model has no chat template"), place="--apply_chat_template", cure=tr("leave it out")
        )
    with harness_noise(log), harness_seeds():
        manager, found = _find(names, folder)
        benchmarks = _load(manager, found)
        _check_tasks(benchmarks, settings, log)
        _apply_settings(benchmarks, settings, log)
    return benchmarks


def _find(names: Sequence[str], folder: Path | None) -> tuple[Any, dict[str, list[str]]]:
    """A task manager, and for each name what it finds. The harness's own tasks, whose thousands of files take long to
    read, are read only where `folder` does not have all that is asked for."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        found = _matches(own, names)
        if all(found.values()) and not _refers_elsewhere(own, found):
            return own, found
    manager = TaskManager(include_path=None if folder is None else str(folder))
    found = _matches(manager, names)
    problems = []
    for name in names:
        if not found[name]:
            cure = did_you_mean(name, manager.all_tasks) or tr(
                "the command `lm-eval ls tasks` lists all of them; your own need --include_path"
            )
            problems.append(Problem(tr("there is no task of this name"), f"--tasks {name}", cure))
    if problems:
        raise UserError(problems[:MAX_PROBLEMS])
    return manager, found


def _matches(manager: Any, names: Sequence[str]) -> dict[str, list[str]]:
    """Name -> the tasks, groups and tags that it stands for: itself, those that fit a pattern, or a file."""
    found = {}
    for name in names:
        is_file = name.endswith((".yaml", ".yml")) and Path(name).is_file()
        found[name] = [name] if is_file else sorted(manager.match_tasks([name]))
    return found


def _refers_elsewhere(manager: Any, found: Mapping[str, Sequence[str]]) -> bool:
    """Whether a group among these has a member that this manager does not know."""
    known = set(manager.all_tasks)
    for name in (name for matched in found.values() for name in matched):
        entry = manager.task_index.get(name)
        members = (entry.cfg or {}).get("task") if entry is not None else None
        if isinstance(members, list) and any(isinstance(each, str) and each not in known for each in members):
            return True
    return False


def _load(manager: Any, found: Mapping[str, Sequence[str]]) -> Benchmarks:
    reason = why_unreachable()
    objects: list[Any] = []
    asked_for: list[str] = []
    problems: list[Problem] = []
    for name in dict.fromkeys(name for matched in found.values() for name in matched):
        try:
            loaded = manager.load([name])
        except Exception as error:  # tasks and the library `datasets` may raise anything
            problems.append(_not_loaded(name, error, reason))
            continue
        is_group = name in (loaded.get("groups") or {})
        new = [loaded["groups"][name]] if is_group else list(loaded["tasks"].values())
        objects += new
        asked_for += [name] if is_group else list(loaded["tasks"])
    if problems:
        raise UserError(problems[:MAX_PROBLEMS])
    try:
        return Benchmarks(tuple(asked_for), manager.load(objects))
    except ValueError as error:  # one task in two groups
        raise UserError(
            first_line(error), place="--tasks", cure=tr("name each task once, or its group")
        ) from error


def _not_loaded(name: str, error: Exception, unreachable: str | None) -> Problem:
    text = first_line(error) or type(error).__name__
    if unreachable is None:
        what = tr("its data cannot be loaded ({error})", error=text)
        return Problem(what, name, tr("see the task's own page, or leave the task out"))
    what = tr(
        "its data are not on this machine, and the hub cannot be reached ({reason}): {error}",
        reason=unreachable,
        error=text,
    )
    cure = tr("run the command once where the hub can be reached, and bring $HF_HOME here")
    return Problem(what, name, cure)


def _check_tasks(benchmarks: Benchmarks, settings: EvalSettings, log: Log) -> None:
    problems = []
    for name, task in benchmarks.tasks.items():
        if getattr(task, "MULTIMODAL", False):
            problems.append(
                Problem(
                    tr("it asks about images or sound"), name, tr("leave this task out: models read text")
                )
            )
        if getattr(task, "UNSAFE_CODE", False) and not settings.confirm_run_unsafe_code:
            what = tr("it runs the code that the model writes on this machine")
            cure = tr("give --confirm_run_unsafe_code true in a container that you can lose")
            problems.append(Problem(what, name, cure))
        kwargs = {**(task.get_config("generation_kwargs") or {}), **(settings.gen_kwargs or {})}
        if task.OUTPUT_TYPE == "generate_until" and (unknown := unknown_generation_keys(kwargs)):
            what = tr(
                "its answers need settings that are not followed here: {names}", names=", ".join(unknown)
            )
            problems.append(Problem(what, name, tr("leave this task out")))
    if problems:
        raise UserError(problems[:MAX_PROBLEMS])
    fetched = [name for name, task in benchmarks.tasks.items() if _fetches_metrics(task)]
    if fetched:
        log(
            tr(
                "the library `evaluate` gets metrics of {tasks} as Python code from huggingface.co/evaluate-metric",
                tasks=", ".join(fetched[:3]) + (", ..." if len(fetched) > 3 else ""),
            )
        )


def _fetches_metrics(task: Any) -> bool:
    metrics = task.get_config("metric_list") or []
    return any(isinstance(metric, Mapping) and metric.get("hf_evaluate") for metric in metrics)


def _apply_settings(benchmarks: Benchmarks, settings: EvalSettings, log: Log) -> None:
    """Few-shot examples and generation settings, by the harness's rules: a task that has 0 examples keeps them."""
    kept = []
    for name, task in benchmarks.tasks.items():
        own = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and own == 0:
            kept += [name] if settings.num_fewshot else []
        elif settings.num_fewshot is not None or own is None:
            task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
        if settings.gen_kwargs and task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(settings.gen_kwargs), update=True)
    if kept:
        log(
            tr(
                "{tasks} ask without examples whatever --num_fewshot says: the tasks themselves say so",
                tasks=", ".join(kept[:3]) + (", ..." if len(kept) > 3 else ""),
            )
        )


def run_harness(model: Any, benchmarks: Benchmarks, settings: EvalSettings, log: Log) -> HarnessResults:
    """What the harness measures with a model, an `lm_eval.api.model.LM`. Raises UserError if a task fails."""
    from lm_eval.evaluator import evaluate

    with harness_noise(log), harness_seeds():
        for task in benchmarks.tasks.values():
            task.set_fewshot_seed(seed=OTHER_SEED)
        try:
            results: HarnessResults = evaluate(
                lm=model,
                task_dict=benchmarks.loaded,
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=settings.system_instruction,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.fewshot_as_multiturn,
                confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            )
        except (
            AssertionError,
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # of a task's own code
            what = tr(
                "lm-evaluation-harness stopped ({error})", error=first_line(error) or type(error).__name__
            )
            cure = tr("run the tasks one by one to find which; $YEONMA_DEBUG=1 shows where")
            raise UserError(what, place="--tasks", cure=cure) from error
    return results


def scores_of(benchmarks: Benchmarks, results: Sequence[HarnessResults]) -> list[ItemScores | GroupScores]:
    """The metrics of all groups, then those of all tasks. `results`: one per model."""
    by_task: dict[str, list[ItemScores]] = {
        name: _item_scores(name, task, results) for name, task in sorted(benchmarks.tasks.items())
    }
    groups: list[ItemScores | GroupScores] = []
    for name, group in sorted(benchmarks.groups.items()):
        members = [task.task_name for task in group.get_all_tasks()]
        sizes = {config.metric: bool(config.weight_by_size) for config in group.aggregate_metric_list or []}
        for key in sorted(results[0]["results"].get(name, {})):
            metric, _, filter_name = key.rpartition(",")
            if key in NOT_A_METRIC or metric.endswith("_stderr") or metric not in sizes:
                continue
            parts = [
                scores
                for member in members
                for scores in by_task[member]
                if (scores.metric, scores.filter) == (metric, filter_name)
            ]
            values = [_known(result["results"][name].get(key)) for result in results]
            better = parts[0].better if parts else ""
            if parts:
                groups.append(GroupScores(name, metric, filter_name, better, parts, sizes[metric], values))
    return [*groups, *(scores for name in by_task for scores in by_task[name])]


def _item_scores(name: str, task: Any, results: Sequence[HarnessResults]) -> list[ItemScores]:
    higher = results[0]["higher_is_better"].get(name) or {}
    all_samples = [result["samples"][name] for result in results]
    keys = dict.fromkeys(
        (metric, sample["filter"]) for sample in all_samples[0] for metric in sample["metrics"]
    )
    scores = []
    for metric, filter_name in keys:
        items = [
            [sample[metric] for sample in samples if sample["filter"] == filter_name and metric in sample]
            for samples in all_samples
        ]
        aggregate, known_name = _aggregation(task, metric)
        is_better = higher.get(metric)
        better = "" if is_better is None else "higher" if is_better else "lower"
        scores.append(ItemScores(name, metric, filter_name, better, items, known_name, aggregate))
    return scores


def _aggregation(task: Any, metric: str) -> tuple[Any, str]:
    """The function that makes one value of a metric's items, and its name if it is the harness's own."""
    from lm_eval.api import metrics

    function = task.aggregation().get(metric) or metrics.mean
    own = {getattr(metrics, name): name for name in SUMS_FORMS if hasattr(metrics, name)}
    return function, own.get(function, "")


def item_entries(
    benchmarks: Benchmarks, results: Sequence[HarnessResults], names: Sequence[str]
) -> dict[str, Any]:
    """Task -> its version, number of examples, and each item with all models' scores and responses, for eval.json.

    Raises UserError if the models did not get the same requests.
    """
    entries: dict[str, Any] = {}
    for name in sorted(benchmarks.tasks):
        items = []
        for samples in zip(*(result["samples"][name] for result in results), strict=True):
            requests = [_request_hash(sample) for sample in samples]
            if len(set(requests)) > 1:
                what = tr("this task does not ask the two models the same questions")
                raise UserError(
                    what, place=name, cure=tr("leave it out: it draws them at random without a seed")
                )
            items.append(
                {
                    "doc_id": samples[0]["doc_id"],
                    "filter": samples[0]["filter"],
                    "request": requests[0],
                    "scores": {
                        model: {metric: _plain(sample[metric]) for metric in sample["metrics"]}
                        for model, sample in zip(names, samples, strict=True)
                    },
                    "responses": {
                        model: _plain(sample["resps"]) for model, sample in zip(names, samples, strict=True)
                    },
                }
            )
        entries[name] = {
            "version": _plain(results[0]["versions"].get(name)),
            "num_fewshot": results[0]["n-shot"].get(name, 0),
            "items": items,
        }
    return entries


def _request_hash(sample: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of an item's requests."""
    return sha256(json.dumps(_plain(sample["arguments"])).encode()).hexdigest()[:16]


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """As JSON has it; what JSON does not have becomes text, and what is not finite null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def shortened_notes(shortened: Mapping[str, int], limit: int) -> list[str]:
    """A sentence for each task whose requests lost their beginning."""
    return [
        tr(
            "{task}: {requests} longer than the model's {limit} tokens lost their beginning.",
            task=task,
            requests=counted(count, "request"),
            limit=f"{limit:,}",
        )
        for task, count in sorted(Counter(shortened).items())
        if count
    ]


@contextmanager
def harness_seeds() -> Iterator[None]:
    """Random numbers as the harness's command seeds them, within the block; those of the process go on afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


class _ToLog(logging.Handler):
    """Gives each warning of the harness to a log, once."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self._told:
            self._told.add(text)
            self._log(f"lm_eval: {text}")


@contextmanager
def harness_noise(log: Log) -> Iterator[None]:
    """Within the block, warnings of the harness go to `log`, and the bars of its loops stay away."""
    from lm_eval.api import task

    logger, handler, bar = logging.getLogger("lm_eval"), _ToLog(log), task.tqdm
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
        task.tqdm = bar
