"""Checks of the settings' files and folders that need no torch. They report all problems at once."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from yeonma.bounded.user_functions import check_function
from yeonma.config.data_sets import DataSetSettings, data_sets, problems_of_set
from yeonma.config.metric_names import SETTING, MetricNames, check_best, metric_names
from yeonma.config.settings import (
    DataSettings,
    ModelSettings,
    PreferenceSettings,
    RunConfig,
    RunSettings,
    TokenLoss,
    TokenSettings,
)
from yeonma.data.column_paths import with_paths
from yeonma.data.rows import Rows, glance, naming_skip, of_rows
from yeonma.data.splits import without_slices
from yeonma.data.task import DRAWN, Choice, Task, choose_template, task_for_loss
from yeonma.data.template import load_template
from yeonma.data.text_scores import INSTALL_SACREBLEU, has_sacrebleu
from yeonma.errors import Problem, UserError, gather
from yeonma.files import user_path
from yeonma.messages import tr
from yeonma.model.device_check import check_device
from yeonma.model.layer_names import check_layer_names
from yeonma.model.published import check_not_packed, published_in_folder
from yeonma.model.quantization import check_optimizer, check_quantization
from yeonma.model.source import BaseSource, files_here, find_base
from yeonma.rewards.rewards import check_names
from yeonma.run_folder.entries import check_entries
from yeonma.run_folder.trackers import check_trackers
from yeonma.tokenization.new_tokens import read_new_tokens
from yeonma.train.continued_lora import adapter_lora, check_lora, follow_adapter
from yeonma.train.full_settings import check_full
from yeonma.train.interrupt import seconds_of

METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the validation loss."""
CHECKED_ROWS = 1000
MAX_PROBLEMS = 20


def preflight(config: RunConfig) -> None:
    """Checks the base model's folder, the output folder, the template and the first rows of local files.

    Raises UserError with all problems. `prepare` checks the rest.
    """
    model, run = config.model, config.run
    lora = config.lora
    gather(
        partial(check_trackers, run.report_to),
        partial(check_quantization, model.quantization, shard=model.shard, use_dora=lora.use_dora),
        partial(check_optimizer, config.step.optimizer),
        partial(check_device, model.device),
        *([partial(seconds_of, run.time_limit)] if run.time_limit is not None else []),
        partial(check_folders, model, run),
        partial(_check_output_is_no_data, config),
        partial(_check_data_of, config),
        partial(_check_lora_of, config),
        partial(read_new_tokens, config.lora.new_tokens),
        partial(check_full, config, _adapter_folder(model)),
        partial(_check_layers_of, config),
        partial(_check_validation_of, config),
        partial(_check_preference_of, config),
        partial(check_metrics, config),
        partial(check_rewards, config),
    )


def check_rewards(config: RunConfig) -> None:
    """Raises UserError for rewards that are none, and for settings that have no effect on learning from them, or that
    it does not have."""
    if config.reward is None:
        return
    step, tokens, leave = config.step, config.tokens, tr("leave it out")
    without_effect = tr("learning from rewards does not read it")
    problems = [
        Problem(what, name, cure)
        for name, what, cure, given in (
            ("token_loss", without_effect, leave, step.token_loss != "nll"),
            (
                "train_on_inputs",
                tr("what is trained are the answers that the model draws"),
                leave,
                tokens.train_on_inputs,
            ),
            ("row_weights", without_effect, leave, tokens.row_weights is not None),
            (
                "train_on",
                tr("only the last answer of a row is drawn"),
                tr("leave it out"),
                tokens.train_on != "last",
            ),
            (
                "micro_batch_tokens",
                tr("auto looks at the rows' own answers, which are not those that are drawn"),
                tr("give a number, or micro_batch_size"),
                step.micro_batch_tokens == "auto",
            ),
            (
                "shard",
                tr("its processes draw answers of their own, and sharded weights need all processes at once"),
                tr("leave it out; --quantization nf4 makes the base smaller"),
                config.model.shard,
            ),
        )
        if given
    ]

    def check_settings() -> None:
        if problems:
            raise UserError(problems)

    gather(check_settings, partial(check_names, config.reward))


def check_metrics(config: RunConfig) -> MetricNames:
    """The metrics of generated answers. Raises UserError for names that are unknown, for files without the function
    that is named, for a missing package, and if `keep_best` names none of them."""
    evaluation = config.evaluation
    names = metric_names(evaluation.answer_metrics)

    def check_package() -> None:
        if "chrf" in names.of_text and not has_sacrebleu():
            raise UserError(tr("chrf needs sacrebleu"), place=SETTING, cure=INSTALL_SACREBLEU)

    gather(
        check_package,
        partial(check_best, evaluation.keep_best, names),
        *(partial(check_function, one.file, one.function, SETTING) for one in names.functions),
    )
    return names


def _check_lora_of(config: RunConfig) -> None:
    if config.model.train == "full":  # which has none, as `check_full` says
        return
    if (continued := _adapter_folder(config.model)) is not None:
        check_lora(config, adapter_lora(continued))


def _check_layers_of(config: RunConfig) -> None:
    model, lora = config.model, config.lora
    if model.train == "full" or _adapter_folder(model) is not None:
        return
    folder = files_here(model.base_model, model.model_revision)
    if folder is not None:
        check_layer_names(folder, lora.lora_target_modules, lora.exclude_modules, lora.lora_layers)


def _check_validation_of(config: RunConfig) -> None:
    sets = data_sets(config.data)
    if not any(one.val_set_size or one.val_path or one.val_split for one in sets):
        check_no_need_of_validation(config)


def check_no_need_of_validation(config: RunConfig) -> None:
    """Raises UserError if a setting follows the validation loss, for a run without validation rows."""
    needed = {
        "lr_scheduler": config.step.lr_scheduler in METRIC_SCHEDULES,
        "early_stopping_patience": config.evaluation.early_stopping_patience is not None,
    }
    cure = tr("give val_set_size, val_split or val_data_path")
    problems = [
        Problem(tr("it follows the validation loss"), name, cure)
        for name, is_needed in needed.items()
        if is_needed
    ]
    if metric_names(config.evaluation.answer_metrics):
        problems.append(Problem(tr("it measures answers to validation rows"), SETTING, cure))
    if problems:
        raise UserError(problems)


def _check_preference_of(config: RunConfig) -> None:
    if config.preference is None:
        return
    if problems := preference_problems(config.preference, config.tokens, config.step.token_loss):
        raise UserError(problems)


def preference_problems(
    preference: PreferenceSettings, tokens: TokenSettings, token_loss: TokenLoss
) -> list[Problem]:
    """Settings that have no effect in preference training, whatever the loss."""
    problems: list[Problem] = []
    if preference.f_alpha != PreferenceSettings.f_alpha and preference.f_divergence != "alpha":
        problems.append(
            Problem(
                tr("only the divergence alpha reads it"),
                "f_alpha",
                tr("leave it out, or give --f_divergence alpha"),
            )
        )
    if token_loss != "nll":
        problems.append(Problem(tr("preference losses do not read it"), "token_loss", tr("leave it out")))
    if tokens.train_on_inputs:
        what = tr("a prompt is the same for both answers: there is nothing to prefer in it")
        problems.append(Problem(what, "train_on_inputs", tr("leave it out")))
    if tokens.row_weights is not None:
        problems.append(
            Problem(tr("preference losses have no weights of rows"), "row_weights", tr("leave it out"))
        )
    return problems


def with_adapters_lora(config: RunConfig) -> RunConfig:
    """The config with the LoRA settings of the adapter to continue, if there is one, and with the new tokens of a file
    as a list."""
    config = follow_adapter(config, _adapter_folder(config.model))
    return replace(config, lora=replace(config.lora, new_tokens=read_new_tokens(config.lora.new_tokens)))


def _check_data_of(config: RunConfig) -> None:
    with naming_skip(config.data.bad_rows):
        check_data(config.data, task_of(config), _adapter_folder(config.model))


def task_of(config: RunConfig) -> Task:
    """The kind of data that the settings train on."""
    if config.reward is not None:
        return DRAWN
    return task_for_loss(config.preference.loss if config.preference is not None else None)


def check_folders(model: ModelSettings, run: RunSettings) -> tuple[BaseSource, str | None]:
    """Returns the base and the folder of the adapter to continue, if any. Creates nothing.

    Raises UserError if the model folder is unusable, if two adapters are named, or if the output folder is not writable
    or is the base's or the adapter's own folder. Without an `output_dir` there is none to check.
    """
    output = user_path(run.output_dir) if run.output_dir else None
    results = list[tuple[BaseSource, str | None]]()

    def find_model() -> None:
        source = find_base(model.base_model, model.model_revision, model.trust_remote_code)
        published = published_in_folder(Path(source.name))
        check_not_packed(published, model.quantization, source.name)
        results.append((source, continued_adapter(model, source)))

    full = model.train == "full"
    gather(find_model, *([partial(_check_writable, output, full=full)] if output is not None else []))
    ((source, continued),) = results
    if output is not None:
        _check_not_input(output, source.name, continued)
    return source, continued


def continued_adapter(model: ModelSettings, source: BaseSource) -> str | None:
    """The folder of the adapter to continue, if any. Raises UserError if the settings name two."""
    if model.adapter is not None and source.adapter is not None:
        what = tr("base_model {adapter} is an adapter too", adapter=source.adapter)
        raise UserError(
            what, place=f"adapter {model.adapter}", cure=tr("give --base_model {source}", source=source.name)
        )
    return model.adapter or source.adapter


def check_data(data: DataSettings, task: Task, continued: str | None = None) -> None:
    """Raises UserError if a template is invalid or does not fit the first rows of local files.

    `continued`: the folder of the adapter to continue. Rows are rendered, but not tokenised.
    """
    sets, skip_bad = data_sets(data), data.bad_rows == "skip"

    def check(one: DataSetSettings) -> None:
        with problems_of_set(one, is_named=len(sets) > 1):
            _check_set(one, task, continued, skip_bad)

    gather(*(partial(check, one) for one in sets))


def _check_set(one: DataSetSettings, task: Task, continued: str | None, skip_bad: bool) -> None:
    choices: list[Choice] = []
    training: list[Rows] = []
    validation: list[Rows] = []

    def read_template() -> None:
        if one.template is not None:
            choices.append(Choice(load_template(one.template), one.columns))

    def read_rows(found: list[Rows], path: str, split: str, limit: int | None) -> None:
        rows = glance(
            path,
            split=split,
            encoding=one.encoding,
            delimiter=one.delimiter,
            max_rows=limit,
            skip_bad=skip_bad,
        )
        if rows is not None:
            found.append(with_paths(rows, one.columns))

    val_path, val_split = one.val_path, without_slices(one.split)
    if one.val_split is not None:
        val_path, val_split = one.path, one.val_split
    gather(
        read_template,
        partial(read_rows, training, one.path, one.split, one.limit),
        *([] if val_path is None else [partial(read_rows, validation, val_path, val_split, None)]),
    )
    if training:
        choices = [choose_template(task, one.template, training[0], one.columns, continued)]
    if choices:
        gather(*(partial(_check_rows, rows, choices[0], task, skip_bad) for rows in training + validation))


def _check_not_input(output: Path, base: str, continued: str | None) -> None:
    folders = (
        (tr("it is the folder of the base model"), base),
        (tr("it is the folder of the adapter to continue"), continued),
    )
    for what, path in folders:
        folder = None if path is None else user_path(path)
        if folder is not None and folder.is_dir() and output.resolve() == folder.resolve():
            raise UserError(what, place=f"output_dir {output}", cure=tr("give another folder"))


def _check_output_is_no_data(config: RunConfig) -> None:
    """Raises UserError if the output folder is that of the data: the run's logs would be rows when it continues."""
    output = user_path(config.run.output_dir) if config.run.output_dir else None
    paths = [path for one in data_sets(config.data) for path in (one.path, one.val_path) if path]
    for path in paths if output is not None else ():
        folder = user_path(path)
        if output is not None and folder.is_dir() and output.is_dir() and output.samefile(folder):
            what = tr("it is the folder of the data, whose files the run's own would be")
            raise UserError(
                what,
                place=f"output_dir {output}",
                cure=tr("give another folder, such as one in it"),
            )


def _check_writable(output: Path, *, full: bool) -> None:
    for path in (output, *output.parents):
        if path.is_symlink() and not path.exists():
            what = tr("{path} is a link to a folder that is not there", path=path)
            raise UserError(
                what,
                place=f"output_dir {output}",
                cure=tr("make that folder, or remove the link"),
            )
    if output.exists() and not output.is_dir():
        raise UserError(tr("it is a file"), place=f"output_dir {output}", cure=tr("give a folder"))
    check_entries(output, full=full)
    existing = (
        output if output.exists() else next(parent for parent in output.absolute().parents if parent.exists())
    )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            tr("cannot be written"), place=str(existing), cure=tr("give an output_dir that you may write to")
        )


def _adapter_folder(model: ModelSettings) -> str | None:
    """The folder of the adapter to continue, if it looks like one; its contents are not checked yet."""
    named = model.adapter or model.base_model
    return named if (user_path(named) / "adapter_config.json").is_file() else None


def _check_rows(rows: Rows, choice: Choice, task: Task, skip_bad: bool) -> None:
    template, columns = choice.template, choice.columns
    rows = with_paths(rows, columns)
    if missing := task.missing_columns(template, rows.columns, columns):
        raise UserError(missing)
    problems: list[Problem] = []
    good, bad = 0, set[str]()
    try:
        for row in islice(rows, CHECKED_ROWS):
            try:
                if row.fault is None:
                    task.render(template, row, columns)
                good += 1
            except UserError as error:
                bad.add(row.place)
                problems += [
                    problem for problem in error.problems if not skip_bad or problem.place != row.place
                ]
            if len(problems) > MAX_PROBLEMS:
                break
        problems = of_rows(problems, bad if good else ())
    except UserError as error:  # from the reader, which cannot read on
        problems = [*of_rows(problems, bad if good else ()), *error.problems]
    if problems:
        more = (
            [Problem(tr("there are more such problems"), rows.name)] if len(problems) > MAX_PROBLEMS else []
        )
        raise UserError([*problems[:MAX_PROBLEMS], *more])
