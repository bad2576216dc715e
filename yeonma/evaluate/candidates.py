"""The models that are compared: what each is, how it is asked, and what it is known by, before weights are loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from yeonma.adapter.adapter_folder import (
    MANIFEST,
    TEMPLATE,
    WEIGHTS,
    AdapterFolder,
    BaseIdentity,
    base_identity,
    check_base,
)
from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder, quantization_for
from yeonma.config.settings import CompareSettings, Quantization, QuantizationOrAuto
from yeonma.data.rows import Row, Rows
from yeonma.data.task import ANSWERS, choose_template
from yeonma.data.template import Template, load_template
from yeonma.errors import Problem, UserError, did_you_mean
from yeonma.files import file_hash, user_path
from yeonma.model.load import check_vocabulary, load_config, load_tokenizer, outline
from yeonma.model.quantization import quantised_by
from yeonma.model.source import BaseSource, find_base
from yeonma.tokenization.example import TokenRules, stop_ids

CUTOFF_LEN = 2048
FORMAT = 1
"""Raised whenever the same model would answer the same prompt differently."""


@dataclass(frozen=True)
class Candidate:
    """One of the models. Its `prompt_builder` turns rows into prompts."""

    name: str
    prompt_builder: PromptBuilder
    adapter: str | None
    """The folder of the LoRA weights that go onto the base."""
    is_run: bool
    """Whether the folder is what a run of Yeonma left behind: then its base is checked, and there is a loss curve."""
    template_of: str
    """Where the template comes from, in words."""
    quantization: Quantization = "none"
    """How the base is held."""

    @property
    def weights(self) -> tuple[str, str | None, str]:
        """Candidates that are equal in it share one base in memory."""
        return (*place_of(self.prompt_builder.source), self.quantization)

    def columns(self, row: Row, columns: Mapping[str, str] | None) -> dict[str, str]:
        """The columns that fill the template from this row, the wanted answer among them: in rows of preference data
        it is the chosen one."""
        template, own = self.prompt_builder.adapter.template, self.prompt_builder.columns(row, columns)
        answer = template.answer_field
        missing = row.values.get(own.get(answer, own.get("answer", answer))) is None
        chosen = (self.prompt_builder.adapter.columns or {}).get("chosen", "chosen")
        if missing and not template.is_chat and isinstance(row.values.get(chosen), str):
            own = {**{field: column for field, column in own.items() if field != answer}, "answer": chosen}
        return {
            field: column for field, column in own.items() if field in template.fields or field == "answer"
        }


def open_candidates(asked: CompareSettings, rows: Rows) -> list[Candidate]:
    """What `--models` names, in order. Raises UserError with all that is wrong with any of them."""
    specs = [spec.strip() for spec in asked.models]
    if not specs or not all(specs):
        raise UserError(
            "no model is named", place="--models", cure="give a model or an adapter folder, or several"
        )
    twice = {spec for spec in specs if specs.count(spec) > 1}
    if twice:
        raise UserError(f"{min(twice)} is named twice", place="--models", cure="name each model once")
    problems: list[Problem] = []
    opened: list[PromptBuilder | _Bare] = []
    for spec in specs:
        try:
            opened.append(_open(spec, asked))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    lent = next((each for each in opened if isinstance(each, PromptBuilder)), None)
    candidates = []
    for spec, name, each in zip(specs, short_names(specs), opened, strict=True):
        if isinstance(each, PromptBuilder):
            candidates.append(Candidate(name, each, str(each.adapter.path), True, "its own"))
        else:
            candidates.append(_lent(spec, name, each, lent, asked, rows))
    _check_outlines(candidates)
    _check_columns(asked, candidates, rows)
    return _held(candidates, asked.quantization)


def place_of(source: BaseSource) -> tuple[str, str | None]:
    """Where a base is, by which two of them are the same: a folder whatever leads to it, a name with its revision."""
    return (
        (os.path.realpath(source.name), None)
        if os.path.isdir(source.name)
        else (source.name, source.revision)
    )


def _held(candidates: Sequence[Candidate], quantization: QuantizationOrAuto) -> list[Candidate]:
    """With how each one's base is held: as asked for; or as in training, and a base by itself as for the first adapter
    on it, so that the two differ in the adapter alone."""
    trained = {
        place_of(each.prompt_builder.source): each.prompt_builder.adapter
        for each in reversed(candidates)
        if each.is_run
    }

    def held(each: Candidate) -> Quantization:
        adapter = (
            each.prompt_builder.adapter if each.is_run else trained.get(place_of(each.prompt_builder.source))
        )
        if adapter is None:
            return "none" if quantization == "auto" else quantization
        return quantization_for(quantization, adapter)

    return [replace(each, quantization=held(each)) for each in candidates]


def check_model(candidate: Candidate, model: Any) -> None:
    """Raises UserError where the model, or its outline, is not the adapter's base or has no embedding for some of the
    tokenizer's ids."""
    prompt_builder = candidate.prompt_builder
    if candidate.is_run:
        check_base(prompt_builder.adapter, base_identity(model, prompt_builder.source))
    embeddings = model.get_input_embeddings().weight.shape[0]
    check_vocabulary(prompt_builder.tokenizer, embeddings, prompt_builder.source.name)


def _check_outlines(candidates: Sequence[Candidate]) -> None:
    """Raises UserError for all that `check_model` finds without weights."""
    problems: list[Problem] = []
    outlines: dict[object, Any] = {}
    for candidate in candidates:
        source = candidate.prompt_builder.source
        if candidate.weights not in outlines:
            outlines[candidate.weights] = outline(load_config(source), source)
        try:
            if (model := outlines[candidate.weights]) is not None:
                check_model(candidate, model)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)


@dataclass(frozen=True)
class _Bare:
    """A model that brings no tokens of its own to be asked with; perhaps a template."""

    source: BaseSource
    tokenizer: Any
    most_tokens: int
    template: Template | None
    columns: dict[str, str] | None
    rules: TokenRules | None


def _open(spec: str, asked: CompareSettings) -> PromptBuilder | _Bare:
    folder = user_path(spec, "--models")
    if folder.is_dir() and not any(folder.iterdir()):
        raise UserError("the folder is empty", place=spec, cure="give a model's or an adapter's folder")
    if (folder / "adapter_config.json").is_file() and (folder / MANIFEST).is_file():
        return open_prompt_builder(
            folder, base_model=asked.base_model, trust_remote_code=asked.trust_remote_code
        )
    source = find_base(spec, trust_remote_code=asked.trust_remote_code)
    if source.adapter is not None and asked.base_model is not None:
        source = replace(find_base(asked.base_model, None, asked.trust_remote_code), adapter=source.adapter)
    own = source
    if source.adapter is not None and (Path(source.adapter) / "tokenizer_config.json").is_file():
        own = replace(source, name=source.adapter, revision=None)
    config = load_config(source)
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or CUTOFF_LEN
    tokenizer = load_tokenizer(own)
    if source.revision is None and getattr(config, "_commit_hash", None):
        source = replace(source, revision=config._commit_hash)
    return _Bare(source, tokenizer, most, *_brought(folder))


def _brought(folder: Path) -> tuple[Template | None, dict[str, str] | None, TokenRules | None]:
    """The template, columns and token rules in a model's folder, such as one that an adapter was merged into."""
    if not (folder / TEMPLATE).is_file():
        return None, None, None
    template = load_template(str(folder / TEMPLATE))
    try:
        details = json.loads((folder / MANIFEST).read_text("utf-8"))
        rules = TokenRules(**{field.name: details["rules"][field.name] for field in fields(TokenRules)})
        return template, details["columns"], rules
    except (OSError, ValueError, KeyError, TypeError):
        return template, None, None


def _lent(
    spec: str, name: str, bare: _Bare, lent: PromptBuilder | None, asked: CompareSettings, rows: Rows
) -> Candidate:
    """A model with the template that it is asked by: its own, the one named, the first adapter's, or by the columns."""
    default = TokenRules(min(CUTOFF_LEN, bare.most_tokens))
    if bare.template is not None:
        template, columns, rules, of = bare.template, bare.columns, bare.rules or default, "its own"
    elif asked.template is not None or lent is None:
        choice = choose_template(ANSWERS, asked.template, rows, asked.columns)
        template, columns, of = choice.template, choice.columns, choice.reason or "--template"
        rules = lent.adapter.rules if lent is not None else default
    else:
        template, columns, rules = lent.adapter.template, lent.adapter.columns, lent.adapter.rules
        of = f"that of {lent.adapter.path.name}"
    folder = AdapterFolder(
        path=Path(spec),
        base=BaseIdentity(bare.source.name, bare.source.revision, 0, ""),
        trust_remote_code=asked.trust_remote_code,
        template=template,
        columns=columns,
        rules=replace(rules, cutoff_len=min(rules.cutoff_len, bare.most_tokens)),
        details={},
    )
    turns = template.is_chat or any(variant.answer_role is not None for variant in template.variants)
    ends = stop_ids(bare.tokenizer, chat=turns)
    return Candidate(
        name, PromptBuilder(folder, bare.source, bare.tokenizer, ends), bare.source.adapter, False, of
    )


def short_names(specs: Sequence[str]) -> list[str]:
    """Short names: the last part of each path, or more of it where that is not enough."""
    for parts in (1, 2, 3):
        names = [
            "/".join(Path(spec).parts[-max(parts, 2 if Path(spec).name.startswith("checkpoint-") else 1) :])
            or spec
            for spec in specs
        ]
        if len(set(names)) == len(names):
            return names
    return list(specs)


def _check_columns(asked: CompareSettings, candidates: Sequence[Candidate], rows: Rows) -> None:
    """Raises UserError for a field that no template has, and for a column that the data lacks."""
    templates = [candidate.prompt_builder.adapter.template for candidate in candidates]
    for field, column in (asked.columns or {}).items():
        if column not in rows.columns:
            cure = did_you_mean(column, rows.columns) or f"it has {', '.join(rows.columns)}"
            raise UserError(f'the data has no column "{column}"', place="--columns", cure=cure)
        if field != "answer" and not any(field in template.fields for template in templates):
            known = ", ".join(sorted({name for template in templates for name in template.fields}))
            raise UserError(
                f'no template has a field "{field}"', place="--columns", cure=f"they have {known}"
            )


def columns_for(candidate: Candidate, columns: Mapping[str, str] | None) -> dict[str, str] | None:
    """Of `--columns` what this model's template has."""
    known = candidate.prompt_builder.adapter.template.fields
    return {
        field: column for field, column in (columns or {}).items() if field in known or field == "answer"
    } or None


def identity_of(candidate: Candidate, dtype: torch.dtype, device: torch.device) -> str:
    """SHA-256 of all that decides what the model answers to some tokens: weights, adapter, number format and the
    versions of the libraries.

    Reads the weight files of a local model; a model of the hub is known by its commit.
    """
    source = candidate.prompt_builder.source
    folder = Path(source.name)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))] if folder.is_dir() else []
    base = [file_hash(path) for path in files] if files else [source.name, source.revision]
    adapter = None
    if candidate.adapter is not None:
        adapter = [file_hash(Path(candidate.adapter) / name) for name in (WEIGHTS, "adapter_config.json")]
    versions = [version(package) for package in ("torch", "transformers", "peft")]
    content = [FORMAT, base, adapter, str(dtype), device.type, versions]
    content += [quantised_by(candidate.quantization)] if candidate.quantization != "none" else []
    return sha256(json.dumps(content).encode()).hexdigest()
