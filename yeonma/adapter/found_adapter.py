"""An adapter folder, its base and its template, found and checked before torch is imported.

What a user can get wrong is said here, within a second: a folder that is no adapter, a base that is gone, rows that do
not fill the template.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from yeonma.adapter.adapter_folder import AdapterFolder, asked_as, read_adapter_folder
from yeonma.adapter.foreign_adapter import (
    TEMPLATE_CURE,
    check_is_adapter,
    is_foreign,
    read_foreign_adapter,
)
from yeonma.data.column_paths import row_with_paths
from yeonma.data.columns import Columns
from yeonma.data.rows import Row
from yeonma.data.template import Rendered
from yeonma.errors import Problem, UserError, did_you_mean
from yeonma.files import user_path
from yeonma.messages import tr
from yeonma.model.adapter_file import check_adapter_files
from yeonma.model.source import BaseSource, find_base

MAX_PROBLEMS = 20
BASE_CURE = tr("name a folder that has it with --base_model")


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter folder or a merged model, with its base, before tokenizer and weights are read."""

    adapter: AdapterFolder
    source: BaseSource
    is_foreign: bool = False
    """Whether another tool made it."""
    base_is_given: bool = False

    def check_template(self) -> None:
        """Raises UserError if there is no template: an adapter of another tool, and none was given."""
        check_has_template(self.adapter)

    def with_paths(self, row: Row, columns: Columns) -> Row:
        """The row with the values within its columns that training or `columns` name, such as `answers.text`."""
        return row_with_all_paths(self.adapter, row, columns)

    def check_rows(self, rows: Iterable[Row], columns: Columns = None, name: str = "") -> None:
        """Raises UserError with the first problems of rows that do not fill the template. `name`: that of the data."""
        problems: list[Problem] = []
        for row in rows:
            try:
                rendered_prompts(self.adapter, [row], columns)
            except UserError as error:
                problems += error.problems
            if len(problems) > MAX_PROBLEMS:
                problems = [*problems[:MAX_PROBLEMS], Problem(tr("there are more such problems"), name)]
                break
        if problems:
            raise UserError(problems)

    def check_columns(self, columns: Columns, known: Sequence[str]) -> None:
        """Raises UserError for a field in `--columns` that the template does not have, and for a column of the prompt
        that is not among those of the data, which are `known`. An answer may be missing."""
        fields = self.adapter.template.fields
        answers = ("answer", self.adapter.template.answer_field)
        asked = {field: column for field, column in (columns or {}).items() if field not in answers}
        check_columns_there(asked, known)
        for field in columns or {}:
            if field != "answer" and field not in fields:
                cure = did_you_mean(field, fields) or tr("it has {fields}", fields=", ".join(sorted(fields)))
                problem = tr('the template has no field "{field}"', field=field)
                raise UserError(problem, place="--columns", cure=cure)

    def check_room(
        self, max_new_tokens: int, place: str = "--max_new_tokens", cure: str = tr("lower it")
    ) -> None:
        """Raises UserError if `max_new_tokens` leave no room for a prompt in the adapter's `cutoff_len`."""
        cutoff_len = self.adapter.rules.cutoff_len
        check_room(max_new_tokens, cutoff_len, f"cutoff_len {cutoff_len}", place, cure)


def given_twice(folders: Sequence[str]) -> list[Problem]:
    """A problem for every folder that was named before."""
    return [
        Problem(tr("given twice"), folder, tr("give each adapter once"))
        for index, folder in enumerate(folders)
        if folder in folders[:index]
    ]


def check_columns_there(columns: Columns, known: Sequence[str]) -> None:
    """Raises UserError for a column in `--columns` that is not among those of the data, which are `known`."""
    for column in (columns or {}).values():
        if column not in known:
            cure = did_you_mean(column, known) or tr("it has {known}", known=", ".join(known))
            raise UserError(
                tr('the data has no column "{column}"', column=column), place="--columns", cure=cure
            )


def check_room(max_new_tokens: int, tokens: int, limit: str, place: str, cure: str) -> None:
    """Raises UserError if `max_new_tokens` leave no room for a prompt in so many `tokens`, whose name is `limit`."""
    if max_new_tokens >= tokens:
        problem = tr(
            "{max_new_tokens} new tokens leave no room for a prompt in {limit}",
            max_new_tokens=max_new_tokens,
            limit=limit,
        )
        raise UserError(problem, place=place, cure=cure)


def find_adapter(
    adapter_dir: str | Path,
    *,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    data_set: str | None = None,
    template: str | None = None,
) -> FoundAdapter:
    """Finds an adapter folder or a merged model and its base. `data_set`: the one of several data sets whose template
    is used, by default the first. `template`: that of an adapter which another tool made.

    Raises UserError for anything else, for damaged files, for settings that do not go with the folder, and if the base
    is not there.
    """
    check_is_adapter(adapter_dir)
    if is_foreign(adapter_dir):
        return _find_foreign(adapter_dir, base_model, trust_remote_code, template)
    adapter = read_adapter_folder(adapter_dir)
    if template is not None:
        what = tr("{adapter_dir} has a template of its own", adapter_dir=adapter_dir)
        cure = tr("leave it out; it is for adapters of other tools")
        raise UserError(what, place="--template", cure=cure)
    if not adapter.is_whole:
        check_adapter_files(adapter.path)
    if data_set is not None:
        adapter = asked_as(adapter, data_set)
    base_is_given = base_model is not None
    if adapter.is_whole:
        if base_is_given:
            cure = tr("leave base_model out")
            raise UserError(tr("the base model is part of this folder"), place=str(adapter_dir), cure=cure)
        base_model = str(adapter.path)
    _check_base_there(adapter, adapter_dir, base_model)
    name, revision = (base_model, None) if base_model else (adapter.base.name, adapter.base.revision)
    return FoundAdapter(adapter, _base(name, revision, trust_remote_code), base_is_given=base_is_given)


def check_has_template(adapter: AdapterFolder) -> None:
    """Raises UserError if there is no template: an adapter of another tool, and none was given."""
    if not adapter.has_template:
        what = tr("another tool made this adapter, so it has no template")
        raise UserError(what, place=str(adapter.path), cure=TEMPLATE_CURE)


def rendered_prompts(adapter: AdapterFolder, rows: Sequence[Row], columns: Columns) -> list[Rendered]:
    """The text of the rows' prompts. Raises UserError with a problem for every row that does not fit the template."""
    rendered: list[Rendered] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            full = row_with_all_paths(adapter, row, columns)
            rendered.append(
                adapter.template.render(full, columns_of_row(adapter, full, columns), with_answer=False)
            )
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return rendered


def row_with_all_paths(adapter: AdapterFolder, row: Row, columns: Columns) -> Row:
    """The row with the values within its columns that training or `columns` name, such as `answers.text`."""
    named = {**(adapter.columns or {}), **(columns or {})}
    return row_with_paths(row, named.values())


def columns_of_row(adapter: AdapterFolder, row: Row, columns: Columns) -> dict[str, str]:
    """Field -> column for this row: the columns of training, updated by `columns`, without those that the row lacks."""
    answer = adapter.template.answer_field
    named: Mapping[str, str] = {**(adapter.columns or {}), **(columns or {})}
    return {
        field: column
        for field, column in named.items()
        if column in row.values or (answer if field == "answer" else field) not in row.values
    }


def _base(name: str, revision: str | None, trust_remote_code: bool) -> BaseSource:
    """The base. If it is on the hub and cannot be had, the cure also says how a folder is named."""
    try:
        return find_base(name, revision, trust_remote_code)
    except UserError as error:
        if user_path(name).exists():
            raise
        problems = [
            replace(problem, cure=tr("{cure}, or {other}", cure=problem.cure, other=BASE_CURE))
            for problem in error.problems
        ]
        raise UserError(problems) from error


def _check_base_there(adapter: AdapterFolder, folder: str | Path, base_model: str | None) -> None:
    """Raises UserError if the base was a local folder and is gone."""
    name = adapter.base.name
    if base_model is None and Path(name).is_absolute() and not Path(name).is_dir():
        what = tr("its base model is no longer at {name}", name=name)
        raise UserError(what, place=str(folder), cure=tr("give its new place with --base_model"))


def _find_foreign(
    folder: str | Path, base_model: str | None, trust_remote_code: bool, template: str | None
) -> FoundAdapter:
    """An adapter that another tool made."""
    adapter = read_foreign_adapter(folder, template, base_model)
    _check_base_there(adapter, folder, base_model)
    source = _base(adapter.base.name, adapter.base.revision, trust_remote_code)
    if source.adapter is not None:
        what = tr("its base {base} is an adapter too", base=adapter.base.name)
        raise UserError(
            what, place=str(folder), cure=tr("merge that one into its base first, and give --base_model")
        )
    return FoundAdapter(adapter, source, is_foreign=True, base_is_given=base_model is not None)
