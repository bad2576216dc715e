"""Turns rows into the prompts of training, from an adapter folder without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.adapter.adapter_folder import AdapterFolder, read_adapter_folder
from yeonma.config.settings import Quantization, QuantizationOrAuto
from yeonma.data.column_paths import row_with_paths
from yeonma.data.columns import Columns, column_of, field_text
from yeonma.data.rows import Row
from yeonma.data.template import Placeholder, Rendered, Variant
from yeonma.data.turns import turns_of
from yeonma.errors import Problem, UserError
from yeonma.model.load import load_tokenizer
from yeonma.model.source import BaseSource, find_base
from yeonma.tokenization.example import stop_ids
from yeonma.tokenization.example_encoder import encode_prompts
from yeonma.tokenization.text_encoder import TextEncoder

NO_LIMIT = 2**40  # tokens


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt, and how to cut the answer out of the text that follows it."""

    token_ids: NDArray[np.int32]
    shortened: bool = False
    """Whether a field was shortened so that the answer fits."""
    is_turn: bool = False
    """Whether the model's chat template rendered the prompt. White space around the answer then belongs to the
    template."""
    frame: tuple[str, str] = ("", "")
    """The template's text before and after the answer field."""

    def answer(self, text: str) -> str:
        """The answer, without white space and frame, in the generated `text`."""
        text = text.strip() if self.is_turn else text.rstrip()
        return text.removeprefix(self.frame[0]).removesuffix(self.frame[1].rstrip()).rstrip()


@dataclass(frozen=True)
class PromptBuilder:
    """Turns rows into prompts in the same way as training."""

    adapter: AdapterFolder
    source: BaseSource
    tokenizer: Any
    stop_ids: tuple[int, ...]

    def prompts(self, rows: Sequence[Row], columns: Columns = None, *, max_new_tokens: int) -> list[Prompt]:
        """The prompts of the rows. `columns` maps fields to columns, by default those of training. If a row does not
        have the column, it is read by the field's name.

        Raises UserError with a problem for every row that does not fit the template or leaves no room for
        `max_new_tokens`.
        """
        rendered: list[Rendered] = []
        problems: list[Problem] = []
        for row in rows:
            try:
                full = self.with_paths(row, columns)
                row_columns = self.columns(full, columns)
                rendered.append(self.adapter.template.render(full, row_columns, with_answer=False))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        return [
            Prompt(ids, shortened, text.answer_role is not None, self.frame(text.variant))
            for text, (ids, shortened) in zip(
                rendered, self._token_ids(rendered, rows, max_new_tokens), strict=True
            )
        ]

    def text_prompt(self, text: str, place: str = "prompt") -> Prompt:
        """A prompt of plain text for the model to continue. Special tokens in it stay special. Raises UserError if it
        is empty."""
        if field_text(Row(1, {"prompt": text}, place), "prompt") is None:
            raise UserError("it is empty", place=place, cure="give the text to continue")
        return Prompt(np.array(TextEncoder.of(self.tokenizer).batch([text])[0], dtype=np.int32))

    def reference(self, row: Row, columns: Columns = None) -> str | None:
        """The row's own answer, if it has one."""
        template = self.adapter.template
        try:
            row = self.with_paths(row, columns)
            column = column_of(template.answer_field, self.columns(row, columns), template.answer_field)
            if not template.is_chat:
                return field_text(row, column)
            names = [variant.answer_placeholder.field for variant in template.variants]
            turns = turns_of(row, next((name for name in names if row.values.get(name) is not None), column))
            return turns[-1].text if turns[-1].role == "assistant" else None
        except UserError:  # a reference is optional
            return None

    def with_paths(self, row: Row, columns: Columns) -> Row:
        """The row with the values within its columns that training or `columns` name, such as `answers.text`."""
        named = {**(self.adapter.columns or {}), **(columns or {})}
        return row_with_paths(row, named.values())

    def columns(self, row: Row, columns: Columns) -> dict[str, str]:
        """Field -> column for this row: the columns of training, updated by `columns`, without those that the row
        lacks."""
        answer = self.adapter.template.answer_field
        named = {**(self.adapter.columns or {}), **(columns or {})}
        return {
            field: column
            for field, column in named.items()
            if column in row.values or (answer if field == "answer" else field) not in row.values
        }

    def _token_ids(
        self, rendered: Sequence[Rendered], rows: Sequence[Row], max_new_tokens: int
    ) -> list[tuple[NDArray[np.int32], bool]]:
        """(token ids, whether the prompt was shortened) for each row."""
        rules = self.adapter.rules
        full = encode_prompts(
            rendered, rows, self.tokenizer, replace(rules, cutoff_len=NO_LIMIT), max_new_tokens
        )
        too_long = [index for index, ids in enumerate(full) if len(ids) > rules.cutoff_len - max_new_tokens]
        shortened: dict[int, NDArray[np.int32]] = {}
        if too_long:
            long_rendered, long_rows = (
                [rendered[index] for index in too_long],
                [rows[index] for index in too_long],
            )
            prompts = encode_prompts(long_rendered, long_rows, self.tokenizer, rules, max_new_tokens)
            shortened = dict(zip(too_long, prompts, strict=True))
        return [(shortened.get(index, ids), index in shortened) for index, ids in enumerate(full)]

    def by_field_names(self) -> PromptBuilder:
        """A prompt builder for rows whose columns are named like the fields, whatever they were in training."""
        return replace(self, adapter=replace(self.adapter, columns=None))

    def frame(self, variant: int) -> tuple[str, str]:
        """The text around the answer in a variant of the template."""
        return _around_answer(self.adapter.template.variants[variant])


def open_prompt_builder(
    adapter_dir: str | Path, *, base_model: str | None = None, trust_remote_code: bool = False
) -> PromptBuilder:
    """Opens an adapter folder or a merged model. Needs no weights, so that rows can be checked before they are loaded.
    Raises UserError as `yeonma.policy.load_policy`."""
    adapter = read_adapter_folder(adapter_dir)
    if adapter.is_merged:
        if base_model is not None:
            cure = "leave base_model out"
            raise UserError("the base model is part of this folder", place=str(adapter_dir), cure=cure)
        base_model = str(adapter.path)
    if base_model is None and Path(adapter.base.name).is_absolute() and not Path(adapter.base.name).is_dir():
        what = f"its base model is no longer at {adapter.base.name}"
        raise UserError(what, place=str(adapter_dir), cure="give its new place with --base_model")
    name, revision = (base_model, None) if base_model else (adapter.base.name, adapter.base.revision)
    source = find_base(name, revision, trust_remote_code)
    tokenizer = load_tokenizer(BaseSource(str(adapter.path), None, trust_remote_code))
    template = adapter.template
    turns = template.is_chat or any(variant.answer_role is not None for variant in template.variants)
    return PromptBuilder(adapter, source, tokenizer, stop_ids(tokenizer, chat=turns))


def quantization_for(setting: QuantizationOrAuto, adapter: AdapterFolder) -> Quantization:
    """The base's quantization; `auto` is that of the adapter's training."""
    return adapter.quantization if setting == "auto" else setting


def _around_answer(variant: Variant) -> tuple[str, str]:
    """The frame's text before and after the answer field."""
    sides, side = ["", ""], 0
    for part in variant.answer:
        if isinstance(part, Placeholder):
            side = 1
        else:
            sides[side] += part.text
    return sides[0], sides[1]
