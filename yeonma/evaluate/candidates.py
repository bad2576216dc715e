"""The models to compare, before their weights are loaded: base, adapter, template, and identity in the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from yeonma.adapter.adapter_folder import (
    MANIFEST,
    TEMPLATE,
    AdapterFolder,
    BaseIdentity,
    base_identity,
    check_base,
    data_set_names,
    read_adapter_folder,
)
from yeonma.adapter.base_check import check_content
from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder, quantization_for
from yeonma.config.settings import CompareSettings, Quantization, QuantizationOrAuto
from yeonma.data.rows import Row, Rows
from yeonma.data.task import ANSWERS, choose_template
from yeonma.data.template import Template, load_template
from yeonma.errors import Log, Problem, UserError, did_you_mean
from yeonma.files import user_path
from yeonma.messages import tr
from yeonma.model.adapter_file import check_adapter_files, is_adapter
from yeonma.model.adapter_weights import added_rows
from yeonma.model.load import check_vocabulary, generation_eos, load_config, load_tokenizer, outline
from yeonma.model.position_limits import model_positions
from yeonma.model.source import BaseSource, find_base
from yeonma.model.weights_identity import weights_identity
from yeonma.policy import check_outline
from yeonma.tokenization.example import TokenRules, answer_tokens

CUTOFF_LEN = 2048
FORMAT = 2
"""Increased whenever a change of the code changes a model's answer to the same prompt."""


@dataclass(frozen=True)
class Candidate:
    """A model to compare."""

    name: str
    prompt_builder: PromptBuilder
    adapter: str | None
    """The folder of the LoRA weights; None if there are none."""
    is_run: bool
    """Whether it is the output folder of a run or one of its checkpoints. Only then is the base checked."""
    template_of: str
    """The origin of the template, for the report."""
    quantization: Quantization = "none"
    """Quantisation of the base."""
    own_rows: str = ""
    """The adapter, if it has tokens of its own: its base has more rows than that of the others."""

    @property
    def weights(self) -> tuple[str, str | None, str, str]:
        """Identifies the base's weights. Candidates with equal `weights` share the base in memory."""
        return (*source_key(self.prompt_builder.source), self.quantization, self.own_rows)

    def columns(self, row: Row, columns: Mapping[str, str] | None) -> dict[str, str]:
        """Field -> column for this row, including the answer. In preference data, that is the chosen answer."""
        adapter = self.prompt_builder.adapter
        template, names = adapter.template, self.prompt_builder.columns(row, columns)
        answer = template.answer_field
        missing = row.values.get(names.get(answer, names.get("answer", answer))) is None
        chosen = (adapter.columns or {}).get("chosen", "chosen")
        if missing and not template.is_chat and isinstance(row.values.get(chosen), str):
            names = {field: column for field, column in names.items() if field != answer}
            names["answer"] = chosen
        return {
            field: column for field, column in names.items() if field in template.fields or field == "answer"
        }


def open_candidates(settings: CompareSettings, rows: Rows, log: Log = lambda _: None) -> list[Candidate]:
    """The models in `--models`, in order. `log` gets a line if reading a base for its SHA-256 takes long. Raises
    UserError with the problems of all of them."""
    specs = [spec.strip() for spec in settings.models]
    if not specs or not all(specs):
        raise UserError(
            tr("no models given"), place="--models", cure=tr("give one or more models or adapter folders")
        )
    repeated = {spec for spec in specs if specs.count(spec) > 1}
    if repeated:
        raise UserError(
            tr("{repeated} is given twice", repeated=min(repeated)),
            place="--models",
            cure=tr("give each model once"),
        )
    problems: list[Problem] = []
    opened: list[PromptBuilder | _PlainModel] = []
    for spec in specs:
        try:
            opened.append(_open(spec, settings))
        except UserError as error:
            problems += error.problems
    runs = [model for model in opened if isinstance(model, PromptBuilder)]
    if settings.data_set is not None and not any(data_set_names(run.adapter) for run in runs):
        problem = tr("no adapter was trained on several data sets")
        problems += [] if problems else [Problem(problem, "--data_set", tr("leave it out"))]
    if problems:
        raise UserError(problems)
    first = _first_template(opened, short_names(specs))
    candidates = []
    for spec, name, model in zip(specs, short_names(specs), opened, strict=True):
        if isinstance(model, PromptBuilder):
            is_chosen = settings.data_set is not None and data_set_names(model.adapter)
            template_of = (
                tr("that of its data set {data_set}", data_set=settings.data_set)
                if is_chosen
                else tr("its own")
            )
            candidates.append(Candidate(name, model, str(model.adapter.path), True, template_of))
        else:
            candidates.append(_with_template(spec, name, model, first, settings, rows))
    candidates = _check_outlines(candidates, log)
    _check_columns(settings, candidates, rows)
    return _with_quantization(candidates, settings.quantization)


def source_key(source: BaseSource) -> tuple[str, str | None]:
    """Equal for equal bases: the real path of a folder, or a name on the hub with its revision."""
    return (
        (os.path.realpath(source.name), None)
        if os.path.isdir(source.name)
        else (source.name, source.revision)
    )


def _with_quantization(candidates: Sequence[Candidate], option: QuantizationOrAuto) -> list[Candidate]:
    """The candidates with their quantisation: that of the option, or of their training. A base model alone uses that of
    the first adapter on it, so that they differ only in the adapter."""
    trained = {
        source_key(candidate.prompt_builder.source): candidate.prompt_builder.adapter
        for candidate in reversed(candidates)
        if candidate.is_run
    }

    def quantization(candidate: Candidate) -> Quantization:
        builder = candidate.prompt_builder
        adapter = builder.adapter if candidate.is_run else trained.get(source_key(builder.source))
        if adapter is None:
            return "none" if option == "auto" else option
        return quantization_for(option, adapter)

    return [replace(candidate, quantization=quantization(candidate)) for candidate in candidates]


def check_model(candidate: Candidate, model: Any) -> None:
    """Raises UserError if the model (or its outline) is not the adapter's base, or if it has fewer embeddings than the
    tokenizer has ids."""
    builder = candidate.prompt_builder
    if candidate.is_run:
        check_base(builder.adapter, base_identity(model, builder.source))
    embeddings = model.get_input_embeddings().weight.shape[0] + _added_rows(candidate, model)
    check_vocabulary(builder.tokenizer, embeddings, builder.source.name)


def _added_rows(candidate: Candidate, model: Any) -> int:
    """The rows that an adapter with tokens of its own adds to the model's embedding."""
    return 0 if candidate.adapter is None else max(0, added_rows(model, candidate.adapter))


def check_candidate_content(candidate: Candidate, log: Log, *, download: bool = True) -> None:
    """Raises UserError if the base has other content than in the adapter's training; see `check_content`."""
    if candidate.is_run:
        builder = candidate.prompt_builder
        check_content(builder.adapter, builder.source, log=log, download=download)


def _check_outlines(candidates: Sequence[Candidate], log: Log) -> list[Candidate]:
    """Runs `check_model` on the models' outlines, checks the adapters' tensors, and the bases that are here. Returns
    the candidates, with `own_rows`. Raises UserError with all problems."""
    problems: list[Problem] = []
    checked: list[Candidate] = []
    outlines: dict[object, Any] = {}
    for candidate in candidates:
        source = candidate.prompt_builder.source
        if candidate.weights not in outlines:
            outlines[candidate.weights] = outline(load_config(source), source)
        try:
            if (model := outlines[candidate.weights]) is not None:
                check_model(candidate, model)
            check_candidate_content(candidate, log, download=False)
            if model is not None:
                if _added_rows(candidate, model):
                    candidate = replace(candidate, own_rows=candidate.adapter or "")
                check_outline(source, [candidate.adapter] if candidate.adapter is not None else [])
            checked.append(candidate)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return checked


@dataclass(frozen=True)
class _PlainModel:
    """A model without an adapter folder. Only a merged model has template, columns and token rules."""

    source: BaseSource
    tokenizer: Any
    positions: int | None
    template: Template | None
    columns: dict[str, str] | None
    rules: TokenRules | None


@dataclass(frozen=True)
class _BorrowedTemplate:
    """How a model without a template is prompted: as another one was trained."""

    owner: str
    template: Template
    columns: dict[str, str] | None
    rules: TokenRules


def _first_template(
    models: Sequence[PromptBuilder | _PlainModel], names: Sequence[str]
) -> _BorrowedTemplate | None:
    """That of the first adapter, or else of the first whole model that has one."""
    for model in models:
        if isinstance(model, PromptBuilder):
            adapter = model.adapter
            return _BorrowedTemplate(adapter.path.name, adapter.template, adapter.columns, adapter.rules)
    for name, model in zip(names, models, strict=True):
        if isinstance(model, _PlainModel) and model.template is not None and model.rules is not None:
            return _BorrowedTemplate(name, model.template, model.columns, model.rules)
    return None


def _open(spec: str, settings: CompareSettings) -> PromptBuilder | _PlainModel:
    folder = user_path(spec, "--models")
    if folder.is_dir() and not any(folder.iterdir()):
        raise UserError(
            tr("the folder is empty"), place=spec, cure=tr("give a model's or an adapter's folder")
        )
    if (folder / "adapter_config.json").is_file() and (folder / MANIFEST).is_file():
        return open_prompt_builder(
            folder,
            base_model=settings.base_model,
            trust_remote_code=settings.trust_remote_code,
            data_set=settings.data_set if data_set_names(read_adapter_folder(folder)) else None,
        )
    if is_adapter(folder):
        check_adapter_files(folder)
    if is_adapter(folder) and settings.base_model is not None:
        source = replace(
            find_base(settings.base_model, None, settings.trust_remote_code), adapter=str(folder)
        )
    else:
        source = find_base(spec, trust_remote_code=settings.trust_remote_code)
    tokenizer_source = source
    if source.adapter is not None and (Path(source.adapter) / "tokenizer_config.json").is_file():
        tokenizer_source = replace(source, name=source.adapter, revision=None)
    config = load_config(source)
    positions = model_positions(config)
    tokenizer = load_tokenizer(tokenizer_source)
    if source.revision is None and getattr(config, "_commit_hash", None):
        source = replace(source, revision=config._commit_hash)
    return _PlainModel(source, tokenizer, positions, *_template_in(folder))


def _template_in(folder: Path) -> tuple[Template | None, dict[str, str] | None, TokenRules | None]:
    """Template, columns and token rules in a model's folder, such as that of a merged model."""
    if not (folder / TEMPLATE).is_file():
        return None, None, None
    template = load_template(str(folder / TEMPLATE))
    try:
        details = json.loads((folder / MANIFEST).read_text("utf-8"))
        known = {field.name for field in fields(TokenRules)}
        rules = TokenRules(**{name: value for name, value in details["rules"].items() if name in known})
        return template, details["columns"], rules
    except (OSError, ValueError, KeyError, TypeError):
        return template, None, None


def _with_template(
    spec: str,
    name: str,
    model: _PlainModel,
    first: _BorrowedTemplate | None,
    settings: CompareSettings,
    rows: Rows,
) -> Candidate:
    """The model with a template: its own, that of the settings, `first`, or one that fits the columns."""
    default = TokenRules(CUTOFF_LEN)
    if model.template is not None:
        template, columns, rules = model.template, model.columns, model.rules or default
        template_of = tr("its own")
    elif settings.template is not None or first is None:
        choice = choose_template(ANSWERS, settings.template, rows, settings.columns)
        template, columns, template_of = choice.template, choice.columns, choice.reason or "--template"
        rules = first.rules if first is not None else default
    else:
        template, columns, rules = first.template, first.columns, first.rules
        template_of = tr("that of {owner}", owner=first.owner)
    folder = AdapterFolder(
        path=Path(spec),
        base=BaseIdentity(model.source.name, model.source.revision, 0, ""),
        trust_remote_code=settings.trust_remote_code,
        template=template,
        columns=columns,
        rules=rules,
        details={},
    )
    tokens = answer_tokens(
        model.tokenizer, rules if template.has_turns else None, generation_eos(model.source)
    )
    builder = PromptBuilder(folder, model.source, model.tokenizer, tokens, model.positions)
    return Candidate(name, builder, model.source.adapter, False, template_of)


def short_names(specs: Sequence[str]) -> list[str]:
    """Distinct names: the last part of the paths, or up to three parts if needed."""
    for parts in (1, 2, 3):
        names = [
            "/".join(Path(spec).parts[-max(parts, 2 if Path(spec).name.startswith("checkpoint-") else 1) :])
            or spec
            for spec in specs
        ]
        if len(set(names)) == len(names):
            return names
    return list(specs)


def _check_columns(settings: CompareSettings, candidates: Sequence[Candidate], rows: Rows) -> None:
    """Raises UserError for a field that no template has, and for a column that the data does not have."""
    templates = [candidate.prompt_builder.adapter.template for candidate in candidates]
    for field, column in (settings.columns or {}).items():
        if column not in rows.columns:
            cure = did_you_mean(column, rows.columns) or tr(
                "it has {columns}", columns=", ".join(rows.columns)
            )
            raise UserError(
                tr('the data has no column "{column}"', column=column), place="--columns", cure=cure
            )
        if field != "answer" and not any(field in template.fields for template in templates):
            names = ", ".join(sorted({name for template in templates for name in template.fields}))
            raise UserError(
                tr('no template has a field "{field}"', field=field),
                place="--columns",
                cure=tr("they have {names}", names=names),
            )


def columns_for(candidate: Candidate, columns: Mapping[str, str] | None) -> dict[str, str] | None:
    """The entries of `--columns` for fields of this model's template."""
    template_fields = candidate.prompt_builder.adapter.template.fields
    return {
        field: column
        for field, column in (columns or {}).items()
        if field in template_fields or field == "answer"
    } or None


def identity_of(candidate: Candidate, dtype: torch.dtype, device: torch.device) -> str:
    """SHA-256 of everything that determines the model's answer to given token ids: weights, adapter, dtype, versions of
    the libraries.

    Reads the weight files of a local model, unless their SHA-256 is known. A model on the hub is identified by its
    commit.
    """
    source = candidate.prompt_builder.source
    return weights_identity(FORMAT, source, candidate.adapter, dtype, device, candidate.quantization)
