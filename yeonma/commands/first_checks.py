"""What is wrong with a command's settings, as far as it can be told before torch is imported, which takes seconds.

`yeonma.cli` calls these functions before it imports the command, and `yeonma serve` its own once the port is open. The
command checks the rest, and these things once more, because Python may call it directly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from yeonma.adapter.adapter_folder import MANIFEST, data_set_names, read_adapter_folder
from yeonma.adapter.foreign_adapter import is_foreign
from yeonma.adapter.found_adapter import FoundAdapter, check_columns_there, find_adapter, given_twice
from yeonma.config.settings import (
    AdapterSettings,
    ChatConfig,
    CompareConfig,
    CompareSettings,
    ExportSettings,
    GenerateConfig,
    GenerateSettings,
    MergeSettings,
    ServeSettings,
    VerifySettings,
)
from yeonma.data.column_paths import with_paths
from yeonma.data.rows import Row, Rows, glance
from yeonma.data.strict_json import SPACE, Fault, kind_of, parse
from yeonma.errors import UserError, gather
from yeonma.evaluate.judge_rubric import read_rubric
from yeonma.evaluate.judge_server import Judge, judge_of
from yeonma.files import existing_folder, new_output_folder, output_file, user_path
from yeonma.messages import tr
from yeonma.model.adapter_file import check_adapter_files, is_adapter
from yeonma.model.device_check import check_device
from yeonma.model.quantization import check_installed
from yeonma.model.source import find_base
from yeonma.verify.server_client import check_server_settings, server_of

CHECKED_ROWS = 1000
ANSWERS = "answers.jsonl"
"""The answers in a report's folder."""
RUN_CURE = tr("give the output folder of a run")


def check_generate(config: GenerateConfig) -> None:
    """Raises UserError for a folder that is no adapter, a device that is not there, and rows that do not fill the
    template: the one of `--row`, or the first ones of a local file."""
    adapter, source = config.adapter, config.generate
    check_prompt_source(source)
    found: list[FoundAdapter] = []
    given: list[Row] = []
    opened: list[Rows] = []

    def read_row() -> None:
        if source.row is not None:
            given.append(Row(1, row_of(source.row), "--row"))

    def open_data() -> None:
        if source.data_path is not None:
            rows = glance(
                source.data_path,
                split=source.data_split,
                encoding=source.encoding,
                delimiter=source.delimiter,
                max_rows=source.limit,
            )
            opened.extend([] if rows is None else [with_paths(rows, source.columns)])

    gather(partial(_find, adapter, found), read_row, open_data)
    if source.prompt is None:
        found[0].check_template()
        found[0].check_room(config.answer.max_new_tokens)
    for row in given:
        full = found[0].with_paths(row, source.columns)
        found[0].check_columns(source.columns, list(full.values))
        found[0].check_rows([row], source.columns)
    for rows in opened:
        found[0].check_columns(source.columns, rows.columns)
        found[0].check_rows(islice(rows, CHECKED_ROWS), source.columns, rows.name)


def check_chat(config: ChatConfig) -> None:
    """Raises UserError for a folder that is no adapter or has no template, and for a device that is not there."""
    found: list[FoundAdapter] = []
    _find(config.adapter, found)
    found[0].check_template()
    found[0].check_room(config.answer.max_new_tokens)


def check_serve(settings: ServeSettings) -> None:
    """Raises UserError for a folder that is no adapter or has no template, for a device that is not there, and for vLLM
    if it is not installed."""

    def check(folder: str) -> None:
        found = find_adapter(
            folder,
            base_model=settings.base_model,
            trust_remote_code=settings.trust_remote_code,
            template=settings.template if is_foreign(folder) else None,
        )
        found.check_template()
        found.check_room(settings.max_new_tokens, str(found.adapter.path), tr("lower --max_new_tokens"))

    def check_repeated() -> None:
        if problems := given_twice(settings.adapter_dirs):
            raise UserError(problems)

    def check_engine() -> None:
        if settings.engine == "vllm" and find_spec("vllm") is None:
            raise vllm_refusal(tr("it is not installed"))

    folders = dict.fromkeys(settings.adapter_dirs)
    gather(
        check_engine,
        partial(check_device, settings.device),
        check_repeated,
        *(partial(check, folder) for folder in folders),
    )


def vllm_refusal(reason: str) -> UserError:
    """The error of `--engine vllm` where vLLM cannot serve."""
    return UserError(
        tr("vLLM cannot serve this: {reason}", reason=reason), place="--engine vllm", cure=tr("leave it out")
    )


def check_compare(config: CompareConfig) -> None:
    """Raises UserError for a model that is not there, data that is not there, a folder that cannot be written, a device
    that is not there, and as `checked_judge`."""
    settings = config.compare

    def open_data() -> None:
        rows = glance(
            settings.data_path,
            split=settings.data_split,
            encoding=settings.encoding,
            delimiter=settings.delimiter,
        )
        if rows is not None:
            check_columns_there(settings.columns, with_paths(rows, settings.columns).columns)

    gather(
        partial(check_device, settings.device),
        partial(report_folder, settings),
        partial(checked_judge, config),
        open_data,
        *(partial(_check_model, spec.strip(), settings) for spec in settings.models if spec.strip()),
    )


def checked_judge(config: CompareConfig) -> Judge | None:
    """The judge of a comparison, who is not asked yet; None if there is none. Raises UserError for settings that name
    none, for a rubric that cannot be used, and if there are no two models."""
    judging, found = config.judging, judge_of(config.judging, config.answer.seed)
    if judging.rubric is not None:
        read_rubric(judging.rubric)
    if found is not None and len(config.compare.models) < 2:
        raise UserError(tr("a judge compares two models"), place="--judge", cure=tr("name two with --models"))
    return found


def check_verify(settings: VerifySettings) -> None:
    """Raises UserError if there is no such folder, no such base or no such data, if a server is named that does not
    answer, and for settings that go only with the other kind of check."""

    def find_server() -> None:
        check_server_settings(settings)
        if settings.served is not None:
            server_of(settings)

    def find_other_base() -> None:
        if settings.base_model is not None:
            find_base(settings.base_model, trust_remote_code=settings.trust_remote_code)

    def open_data() -> None:
        if settings.data_path is not None:
            glance(settings.data_path, split=settings.data_split, encoding=settings.encoding)

    find_folder = partial(existing_folder, settings.adapter_dir, RUN_CURE)
    gather(find_folder, find_server, find_other_base, open_data)


def check_merge(settings: MergeSettings) -> None:
    """Raises UserError for a folder that is no adapter, a device that is not there, and an output that exists."""
    _check_merged(settings.adapter_dir, settings)


def check_export(settings: ExportSettings) -> None:
    """Raises UserError as `check_merge`."""
    _check_merged(settings.model_dir, settings)


def _check_merged(folder: str, settings: MergeSettings | ExportSettings) -> None:
    gather(
        partial(new_output_folder, settings.output_dir),
        partial(check_device, settings.device),
        partial(
            find_adapter,
            folder,
            base_model=settings.base_model,
            trust_remote_code=settings.trust_remote_code,
            template=settings.template,
        ),
    )


def _find(settings: AdapterSettings, found: list[FoundAdapter]) -> None:
    """Adds the adapter that the settings name. Raises UserError as `find_adapter`, for a device that is not there, and
    for a quantisation whose package is missing."""

    def find() -> None:
        found.append(
            find_adapter(
                settings.adapter_dir,
                base_model=settings.base_model,
                trust_remote_code=settings.trust_remote_code,
                data_set=settings.data_set,
                template=settings.template,
            )
        )

    gather(partial(check_device, settings.device), find)
    kind = settings.quantization
    check_installed(found[0].adapter.quantization if kind == "auto" else kind)


def _check_model(spec: str, settings: CompareSettings) -> None:
    """Raises UserError if a model of `--models` is not there."""
    folder = user_path(spec, "--models")
    if folder.is_dir() and not any(folder.iterdir()):
        raise UserError(
            tr("the folder is empty"), place=spec, cure=tr("give a model's or an adapter's folder")
        )
    if is_adapter(folder) and (folder / MANIFEST).is_file():
        find_adapter(
            folder,
            base_model=settings.base_model,
            trust_remote_code=settings.trust_remote_code,
            data_set=settings.data_set if data_set_names(read_adapter_folder(folder)) else None,
        )
        return
    if is_adapter(folder):
        check_adapter_files(folder)
    base = settings.base_model if is_adapter(folder) and settings.base_model is not None else spec
    find_base(base, trust_remote_code=settings.trust_remote_code)


def check_prompt_source(source: GenerateSettings) -> None:
    """Raises UserError unless exactly one source of prompts is given and the answers have a place to go to."""
    sources = {"data_path": source.data_path, "row": source.row, "prompt": source.prompt}
    given = [f"--{name}" for name, value in sources.items() if value is not None]
    if len(given) != 1:
        what = (
            tr("nothing to answer")
            if not given
            else tr("{given} are both given", given=tr(" and ").join(given))
        )
        raise UserError(what, cure=tr("give one of --data_path, --row and --prompt"))
    if source.output is not None:
        output_file(source.output, "--output", source.data_path)


def row_of(text: str) -> Mapping[str, object]:
    """The row that `--row` gives as JSON. Raises UserError."""
    cure = tr("""write '{{"document": "..."}}'""")
    try:
        value, end = parse(text, len(text) - len(text.lstrip(SPACE)))
        if rest := text[end:].lstrip(SPACE):
            raise Fault(tr("more text after the row"), len(text) - len(rest))
    except Fault as fault:
        raise UserError(
            tr("{problem}, at character {at}", problem=fault.problem, at=fault.at + 1),
            place="--row",
            cure=fault.cure or cure,
        ) from None
    if not isinstance(value, Mapping):
        raise UserError(
            tr("a row must be an object, not {value}", value=kind_of(value)), place="--row", cure=cure
        )
    return value


def report_folder(settings: CompareSettings) -> Path:
    """The folder of a report, not created yet. Raises UserError if it cannot be written."""
    output, place = user_path(settings.output_dir, "--output_dir"), f"--output_dir {settings.output_dir}"
    if output.exists() and not output.is_dir():
        raise UserError(tr("it is a file"), place=place, cure=tr("name a folder"))
    if output.is_dir():
        for spec in settings.models:
            model = user_path(spec, "--models")
            if model.is_dir() and output.samefile(model) and not (model / ANSWERS).exists():
                raise UserError(tr("it is a model's folder"), place=place, cure=tr("name another one"))
        _check_writable(output, place)
        return output
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(tr("{parent} is a file", parent=parent), place=place, cure=tr("name a folder"))
    _check_writable(parent, place)
    return output


def _check_writable(folder: Path, place: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(tr("cannot be written"), place=place, cure=tr("name a folder that you can write to"))
