"""Turns rows into the prompts of training, from an adapter folder without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.adapter.adapter_folder import AdapterFolder
from yeonma.adapter.foreign_adapter import remark_on
from yeonma.adapter.found_adapter import (
    FoundAdapter,
    check_has_template,
    check_room,
    columns_of_row,
    find_adapter,
    rendered_prompts,
    row_with_all_paths,
)
from yeonma.config.settings import Quantization, QuantizationOrAuto
from yeonma.data.columns import Columns, field_text
from yeonma.data.rows import Row
from yeonma.data.template import Rendered, Template
from yeonma.data.template_syntax import Piece, Placeholder, Variant, joined
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.load import generation_eos, load_config, load_tokenizer
from yeonma.model.position_limits import check_fits, model_positions
from yeonma.model.source import BaseSource
from yeonma.tokenization.answer_shape import frame_of
from yeonma.tokenization.chat_template import chat_of
from yeonma.tokenization.chat_template_export import base_chat_template
from yeonma.tokenization.example import AnswerTokens, TokenRules, answer_tokens, end_of_prompt
from yeonma.tokenization.example_encoder import ExampleEncoder, encode_prompts, encoder_for
from yeonma.tokenization.reasoning import PLAIN, AnswerParts, AnswerShape
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.tokenization.tool_calls import FindCalls, call_finder

NO_LIMIT = 2**40  # tokens
_NO_IDS = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt, and how to cut the answer out of the text that follows it."""

    token_ids: NDArray[np.int32]
    shortened: bool = False
    """Whether a field was shortened so that the answer fits."""
    frame: tuple[str, str] = ("", "")
    """The template's text before and after the answer field, as it is trained; in a turn, also what the chat template
    writes after the turn's text."""
    shape: AnswerShape = PLAIN
    """What the chat template makes the model write around reasoning and answer."""
    opens_reasoning: bool = False
    """Whether the prompt ends within a block of reasoning."""

    def parts(self, text: str, *, growing: bool = False) -> AnswerParts:
        """Reasoning and content in the generated `text`, to which more may be added if `growing`."""
        return self.shape.parts(text, is_open=self.opens_reasoning, growing=growing)

    def answer(self, text: str) -> str:
        """The answer in the generated `text`: without reasoning and frame, with all its blanks and line ends."""
        return self.unframed(self.parts(text).content)

    def unframed(self, text: str) -> str:
        """The content without the frame."""
        return text.removeprefix(self.frame[0]).removesuffix(self.frame[1])

    def reasoning(self, text: str) -> str | None:
        """The reasoning in the generated `text`, or None."""
        reasoning = self.parts(text).reasoning
        return reasoning if reasoning and not reasoning.isspace() else None


@dataclass(frozen=True)
class TemplateTexts:
    """How a template's answers stand in generated text, and which answers rows have of their own."""

    template: Template
    rules: TokenRules
    tokenizer: Any
    tokens: AnswerTokens

    def prompt(self, text: Rendered, ids: NDArray[np.int32], shortened: bool = False) -> Prompt:
        """A rendered row's prompt with these token ids."""
        is_turn = text.answer_role is not None
        shape = self.tokens.shape if is_turn else PLAIN
        is_open = shape.opens(end_of_prompt(ids.tolist(), self.tokenizer))
        return Prompt(ids, shortened, self._written_frames[text.variant], shape, is_open)

    def reference(self, rendered: Rendered, place: str) -> str | None:
        """The row's own answer as it is trained, if it has one."""
        frame = self._written_frames[rendered.variant]
        if rendered.answer_role is None:
            return Prompt(_NO_IDS, frame=frame).answer(joined(rendered.answer))
        if not rendered.answer and rendered.turns[-1].role != "assistant":
            return None
        try:
            with encoder_for(self.tokenizer, self.rules, [rendered]) as encoder:
                return self._trained_answer(encoder, rendered, place, frame)
        except UserError:
            return None

    def _trained_answer(
        self, encoder: ExampleEncoder, rendered: Rendered, place: str, frame: tuple[str, str]
    ) -> str:
        """The answer in the text that the chat template writes for the row's last turn."""
        chat, shape = encoder.chat, self.tokens.shape
        assert chat is not None  # the row has turns
        conversation = chat.conversation(rendered, place, with_answer=True)
        text = chat.prompt(conversation.before_last, place)
        answer = chat.answer(conversation, text, place)
        end = max(answer.content[1], answer.calls[1])
        prompt = Prompt(_NO_IDS, frame=(frame[0], ""), shape=shape, opens_reasoning=shape.opens(text))
        after = frame[1].removesuffix(shape.trail)
        return prompt.answer(answer.text[:end]).removesuffix(after)

    @cached_property
    def _written_frames(self) -> tuple[tuple[str, str], ...]:
        """The frame of each variant, as it is trained."""
        variants = self.template.variants
        frames = [_around_answer(variant) for variant in variants]
        rules, trail = self.rules, self.tokens.shape.trail
        if not any(
            variant.answer_role and any(frame) for variant, frame in zip(variants, frames, strict=True)
        ):
            return tuple([(before, after + trail) for before, after in frames])
        with chat_of(TextEncoder.of(self.tokenizer), rules.thinking, rules.chat_template_kwargs) as chat:
            return tuple(
                [
                    frame_of(chat, *frame) if variant.answer_role else frame
                    for variant, frame in zip(variants, frames, strict=True)
                ]
            )


@dataclass(frozen=True)
class PromptBuilder:
    """Turns rows into prompts in the same way as training."""

    adapter: AdapterFolder
    source: BaseSource
    tokenizer: Any
    tokens: AnswerTokens
    positions: int | None = None
    """The most tokens that the model takes, prompt and answer together; None if its config names no limit."""
    remark: str = ""
    """What was taken for an adapter that another tool made; empty for others."""

    @property
    def rules(self) -> TokenRules:
        """The rules of training, with a `cutoff_len` of at most the model's positions."""
        return self.adapter.rules.within(self.positions)

    @property
    def limit(self) -> str:
        """What limits the length of prompt and answer, for messages."""
        if self.rules.cutoff_len < self.adapter.rules.cutoff_len:
            return tr("the model's {positions} positions", positions=self.positions)
        return f"cutoff_len {self.adapter.rules.cutoff_len}"

    def check_template(self) -> None:
        """Raises UserError if there is no template: an adapter of another tool, and none was given."""
        check_has_template(self.adapter)

    def check_room(
        self, max_new_tokens: int, place: str = "--max_new_tokens", cure: str = tr("lower it")
    ) -> None:
        """Raises UserError if `max_new_tokens` leave no room for a prompt."""
        check_room(max_new_tokens, self.rules.cutoff_len, self.limit, place, cure)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.tokens.stop_ids

    @property
    def shown_ids(self) -> tuple[int, ...]:
        return self.tokens.shown_ids

    @property
    def find_calls(self) -> FindCalls | None:
        """The function that finds tool calls in an answer; None if the chat template's format is not known."""
        return call_finder(base_chat_template(self.tokenizer))

    def prompts(self, rows: Sequence[Row], columns: Columns = None, *, max_new_tokens: int) -> list[Prompt]:
        """The prompts of the rows. `columns` maps fields to columns, by default those of training. If a row does not
        have the column, it is read by the field's name.

        Raises UserError with a problem for every row that does not fit the template or leaves no room for
        `max_new_tokens`.
        """
        self.check_template()
        self.check_room(max_new_tokens)
        rendered = rendered_prompts(self.adapter, rows, columns)
        return [
            self.texts.prompt(text, ids, shortened)
            for text, (ids, shortened) in zip(
                rendered, self._token_ids(rendered, rows, max_new_tokens), strict=True
            )
        ]

    def text_prompt(self, text: str, place: str = "prompt", max_new_tokens: int = 0) -> Prompt:
        """A prompt of plain text for the model to continue. Special tokens in it stay special. Raises UserError if it
        is empty, or if it and `max_new_tokens` exceed the model's positions."""
        if field_text(Row(1, {"prompt": text}, place), "prompt") is None:
            raise UserError(tr("it is empty"), place=place, cure=tr("give the text to continue"))
        ids = np.array(TextEncoder.of(self.tokenizer).batch([text])[0], dtype=np.int32)
        if max_new_tokens:
            check_fits(len(ids), max_new_tokens, self.positions, place)
        return Prompt(ids)

    def reference(self, row: Row, columns: Columns = None) -> str | None:
        """The row's own answer as it is trained, if it has one."""
        try:
            row = self.with_paths(row, columns)
        except UserError:  # a reference is optional
            return None
        return self.reference_in(row, self.columns(row, columns))

    def reference_in(self, row: Row, named: Mapping[str, str]) -> str | None:
        """The same, with the columns that fill the fields."""
        try:
            rendered = self.adapter.template.render(row, named)
        except UserError:
            return None
        return self.texts.reference(rendered, row.place)

    def with_paths(self, row: Row, columns: Columns) -> Row:
        """The row with the values within its columns that training or `columns` name, such as `answers.text`."""
        return row_with_all_paths(self.adapter, row, columns)

    def columns(self, row: Row, columns: Columns) -> dict[str, str]:
        """Field -> column for this row: the columns of training, updated by `columns`, without those that the row
        lacks."""
        return columns_of_row(self.adapter, row, columns)

    def _token_ids(
        self, rendered: Sequence[Rendered], rows: Sequence[Row], max_new_tokens: int
    ) -> list[tuple[NDArray[np.int32], bool]]:
        """(token ids, whether the prompt was shortened) for each row."""
        rules = self.rules
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

    @cached_property
    def texts(self) -> TemplateTexts:
        """What template and rules make of the text around answers."""
        return TemplateTexts(self.adapter.template, self.adapter.rules, self.tokenizer, self.tokens)


def open_prompt_builder(
    adapter_dir: str | Path,
    *,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    data_set: str | None = None,
    template: str | None = None,
) -> PromptBuilder:
    """Opens an adapter folder or a merged model. Needs no weights, so that rows can be checked before they are loaded.
    The settings are those of `find_adapter`. Raises UserError as it does, and as `yeonma.policy.load_policy`."""
    return prompt_builder_of(
        find_adapter(
            adapter_dir,
            base_model=base_model,
            trust_remote_code=trust_remote_code,
            data_set=data_set,
            template=template,
        ),
        trust_remote_code,
    )


def prompt_builder_of(found: FoundAdapter, trust_remote_code: bool = False) -> PromptBuilder:
    """Reads the tokenizer of an adapter that was found. Raises UserError if there is none."""
    adapter, source, remark = found.adapter, found.source, ""
    tokenizer_source = BaseSource(str(adapter.path), None, trust_remote_code)
    if found.is_foreign:
        own = any((adapter.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        tokenizer_source = tokenizer_source if own else source
        remark = remark_on(adapter, own_tokenizer=own, base_is_given=found.base_is_given)
    tokenizer = load_tokenizer(tokenizer_source)
    rules = adapter.rules if adapter.template.has_turns else None
    tokens = answer_tokens(tokenizer, rules, generation_eos(source))
    return PromptBuilder(adapter, source, tokenizer, tokens, _positions(source), remark)


def _positions(source: BaseSource) -> int | None:
    """The model's positions; None also if its config cannot be read, which loading its weights will report."""
    try:
        return model_positions(load_config(source))
    except UserError:
        return None


def quantization_for(setting: QuantizationOrAuto, adapter: AdapterFolder) -> Quantization:
    """The base's quantization; `auto` is that of the adapter's training."""
    return adapter.quantization if setting == "auto" else setting


def _around_answer(variant: Variant) -> tuple[str, str]:
    """The frame's text before and after the answer's fields."""
    fields = [index for index, part in enumerate(variant.answer) if isinstance(part, Placeholder)]
    before, after = variant.answer[: fields[0]], variant.answer[fields[-1] + 1 :]
    if len(fields) > 1 and variant.answer_role is not None:
        before = ()  # a tag before reasoning, which is split off with it
    before_text, after_text = (
        "".join(part.text for part in parts if isinstance(part, Piece)) for parts in (before, after)
    )
    return before_text, after_text
