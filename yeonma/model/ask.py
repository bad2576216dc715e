"""Asking an adapter: base, template and tokenizer are found from its folder, and rows become the prompts that they
were in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from yeonma.choices import AskedQuantization, Quantization
from yeonma.configure import group_of, settings_from_keywords
from yeonma.errors import Problem, UserError
from yeonma.model.adapter import AdapterFolder, base_identity, check_base, read_adapter_folder
from yeonma.model.generate import generate
from yeonma.model.load import (
    BaseSource,
    find_base,
    load_adapter,
    load_base,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from yeonma.settings import AnswerSettings
from yeonma.text.formats import column_of, field_text, turns_of
from yeonma.text.frame import Placeholder, Variant
from yeonma.text.rows import Row
from yeonma.text.template import Rendered
from yeonma.tokens.desk import encode_prompts
from yeonma.tokens.encode import TextEncoder
from yeonma.tokens.example import stop_ids

NO_LIMIT = 2**40  # tokens

Columns = Mapping[str, str] | None


@dataclass(frozen=True, eq=False)
class Question:
    """One prompt, and what of the model's text after it is the answer."""

    token_ids: NDArray[np.int32]
    shortened: bool = False
    """Whether a prompt field lost text so that the answer has room."""
    is_turn: bool = False
    """Whether the model's chat template wrote the prompt: then blanks around the answer are the template's."""
    frame: tuple[str, str] = ("", "")
    """The template's own text before and after the answer's field."""

    def answer(self, text: str) -> str:
        """The answer in the model's `text`."""
        text = text.strip() if self.is_turn else text.rstrip()
        return text.removeprefix(self.frame[0]).removesuffix(self.frame[1].rstrip()).rstrip()


@dataclass(frozen=True)
class Asker:
    """An adapter folder without its weights: all that turns rows into prompts."""

    adapter: AdapterFolder
    source: BaseSource
    tokenizer: Any
    stop_ids: tuple[int, ...]

    def questions(
        self, rows: Sequence[Row], columns: Columns = None, *, max_new_tokens: int
    ) -> list[Question]:
        """The rows' prompts, with the columns of training but for those that `columns` names.

        Where a row lacks such a column, the template's own name for the field holds. Raises UserError with a problem
        for every row that the template does not fit or that leaves no room for `max_new_tokens`.
        """
        rendered: list[Rendered] = []
        problems: list[Problem] = []
        for row in rows:
            try:
                own = self.columns(row, columns)
                rendered.append(self.adapter.template.render(row, own, with_answer=False))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        return [
            Question(ids, shortened, text.answer_role is not None, self.frame(text.variant))
            for text, (ids, shortened) in zip(
                rendered, self._fitted(rendered, rows, max_new_tokens), strict=True
            )
        ]

    def text_question(self, text: str, place: str = "prompt") -> Question:
        """Text to continue as it stands; special tokens in it stay special. Raises UserError where it is empty."""
        if field_text(Row(1, {"prompt": text}, place), "prompt") is None:
            raise UserError("it is empty", place=place, cure="give the text to continue")
        return Question(np.array(TextEncoder.of(self.tokenizer).batch([text])[0], dtype=np.int32))

    def reference(self, row: Row, columns: Columns = None) -> str | None:
        """The row's own answer, where it has one."""
        template = self.adapter.template
        column = column_of(template.answer_field, self.columns(row, columns), template.answer_field)
        try:
            if not template.is_chat:
                return field_text(row, column)
            names = [variant.answer_placeholder.field for variant in template.variants]
            turns = turns_of(row, next((name for name in names if row.values.get(name) is not None), column))
            return turns[-1].text if turns[-1].role == "assistant" else None
        except UserError:  # not needed, so no reason to stop
            return None

    def columns(self, row: Row, columns: Columns) -> dict[str, str]:
        """Field -> column for this row: those of training and `columns`, but for columns that the row lacks."""
        answer = self.adapter.template.answer_field
        wanted = {**(self.adapter.columns or {}), **(columns or {})}
        return {
            field: column
            for field, column in wanted.items()
            if column in row.values or (answer if field == "answer" else field) not in row.values
        }

    def _fitted(
        self, rendered: Sequence[Rendered], rows: Sequence[Row], max_new_tokens: int
    ) -> list[tuple[NDArray[np.int32], bool]]:
        """The prompts' ids and whether they were shortened."""
        rules = self.adapter.rules
        whole = encode_prompts(
            rendered, rows, self.tokenizer, replace(rules, cutoff_len=NO_LIMIT), max_new_tokens
        )
        long = [at for at, ids in enumerate(whole) if len(ids) > rules.cutoff_len - max_new_tokens]
        texts, places = [rendered[at] for at in long], [rows[at] for at in long]
        short = encode_prompts(texts, places, self.tokenizer, rules, max_new_tokens) if long else []
        fitted = dict(zip(long, short, strict=True))
        return [(fitted.get(at, ids), at in fitted) for at, ids in enumerate(whole)]

    def by_field_names(self) -> Asker:
        """For rows that have the fields' own names, whatever the columns were called in training."""
        return replace(self, adapter=replace(self.adapter, columns=None))

    def frame(self, variant: int) -> tuple[str, str]:
        """The text around the answer in a variant of the template."""
        return _around_answer(self.adapter.template.variants[variant])


@dataclass(frozen=True)
class Loaded:
    """An adapter on its base model, ready to be asked; `load` makes it.

    With `adapter_weights` False the base answers alone: `dataclasses.replace(loaded, adapter_weights=False)` is a view
    of the same model in memory.
    """

    asker: Asker
    model: Any
    adapter_weights: bool = True

    @overload
    def generate(
        self, row: Mapping[str, object], *, columns: Columns = ..., batch_size: int = ..., **options: Any
    ) -> str: ...
    @overload
    def generate(
        self,
        row: Sequence[Mapping[str, object]],
        *,
        columns: Columns = ...,
        batch_size: int = ...,
        **options: Any,
    ) -> list[str]: ...
    def generate(
        self,
        row: Mapping[str, object] | Sequence[Mapping[str, object]],
        *,
        columns: Columns = None,
        batch_size: int = 8,
        **options: Any,
    ) -> str | list[str]:
        """The answer to a row, or the answers to several: `loaded.generate({"document": "..."})`.

        Rows need the template's prompt fields, by the columns of training or the template's own names. `options` are
        those of `yeonma generate`: max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed.
        Raises UserError for rows that do not fit the template and for options that do not exist.
        """
        settings = _answer_settings(options)
        rows = _rows([row] if isinstance(row, Mapping) else row)
        questions = self.asker.questions(rows, columns, max_new_tokens=settings.max_new_tokens)
        answers = self.answers(questions, settings, batch_size=batch_size)
        return answers[0] if isinstance(row, Mapping) else answers

    def complete(self, text: str, **options: Any) -> str:
        """What the model writes after `text` as it stands, without the template. Options as for `generate`."""
        settings = _answer_settings(options)
        return self.answers([self.text_question(text, settings.max_new_tokens)], settings)[0]

    def prompt_ids(
        self, row: Mapping[str, object], *, columns: Columns = None, max_new_tokens: int = 128
    ) -> NDArray[np.int32]:
        """The token ids that the model is asked a row with: shape (tokens,), those of training."""
        (question,) = self.asker.questions(_rows([row]), columns, max_new_tokens=max_new_tokens)
        return question.token_ids

    def text_question(self, text: str, max_new_tokens: int, place: str = "prompt") -> Question:
        """As `Asker.text_question`. Raises UserError too where the model has no room for so many tokens."""
        question = self.asker.text_question(text, place)
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and len(question.token_ids) + max_new_tokens > most:
            what = f"{len(question.token_ids)} tokens and {max_new_tokens} new ones are more than the model's {most}"
            raise UserError(what, place=place, cure="shorten it, or lower max_new_tokens")
        return question

    def answers(
        self,
        questions: Sequence[Question],
        settings: AnswerSettings,
        *,
        batch_size: int = 8,
        on_answer: Callable[[int, str], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """The answers in the order of the questions. The callbacks are those of `generate`, with the answers' texts;
        `on_text` gets the model's text as it comes, with the template's own text after the answer if there is any."""

        if not self.adapter_weights and self.asker.adapter.is_merged:
            what, cure = "the adapter is merged into it", "ask the base model's adapter folder instead"
            raise UserError(what, place=str(self.asker.adapter.path), cure=cure)

        def answered(index: int, text: str) -> None:
            if on_answer is not None:
                on_answer(index, questions[index].answer(text))

        with nullcontext() if self.adapter_weights else self.model.disable_adapter():
            texts = generate(
                self.model,
                self.asker.tokenizer,
                [question.token_ids for question in questions],
                stop_ids=self.asker.stop_ids,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                repetition_penalty=settings.repetition_penalty,
                batch_size=batch_size,
                seed=settings.seed,
                on_answer=lambda index, answer: answered(index, answer.text),
                on_text=on_text,
            )
        return [question.answer(text) for question, text in zip(questions, texts, strict=True)]


def load(
    adapter_dir: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantization: AskedQuantization = "auto",
    adapter_weights: bool = True,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """An adapter folder (or a checkpoint in it) on its base model, in eval mode.

    `quantization` auto holds the base as training did. `base_model` is needed only where the base is no longer where
    it was trained from.
    Raises UserError for a folder that is no adapter folder, and for a base that is missing or another one.
    """
    asker = open_folder(adapter_dir, base_model=base_model, trust_remote_code=trust_remote_code)
    return Loaded(asker, load_model(asker, device, dtype, quantization), adapter_weights)


def open_folder(
    adapter_dir: str | Path, *, base_model: str | None = None, trust_remote_code: bool = False
) -> Asker:
    """What `load` needs before the weights, so that rows can be checked first. Raises UserError as `load`."""
    adapter = read_adapter_folder(adapter_dir)
    if adapter.is_merged:
        if base_model is not None:
            cure = "leave base_model out"
            raise UserError("the base model is part of it", place=str(adapter_dir), cure=cure)
        base_model = str(adapter.path)
    if base_model is None and Path(adapter.base.name).is_absolute() and not Path(adapter.base.name).is_dir():
        what = f"its base model is no longer at {adapter.base.name}"
        raise UserError(what, place=str(adapter_dir), cure="say with --base_model where it is")
    name, revision = (base_model, None) if base_model else (adapter.base.name, adapter.base.revision)
    source = find_base(name, revision, trust_remote_code)
    tokenizer = load_tokenizer(BaseSource(str(adapter.path), None, trust_remote_code))
    template = adapter.template
    turns = template.is_chat or any(variant.answer_role is not None for variant in template.variants)
    return Asker(adapter, source, tokenizer, stop_ids(tokenizer, chat=turns))


def held_as(asked: AskedQuantization, adapter: AdapterFolder) -> Quantization:
    """How the base is held for an adapter: as asked for, or as in its training."""
    return adapter.quantization if asked == "auto" else asked


def load_model(asker: Asker, device: str, dtype: str, quantization: AskedQuantization = "auto") -> Any:
    """The base with the adapter on it, a PeftModel, or a merged model. Raises UserError where it cannot be had or is
    another base."""
    on = pick_device(device)
    try:
        base = load_base(asker.source, on, pick_dtype(dtype, on), held_as(quantization, asker.adapter))
    except UserError as error:
        if Path(asker.source.name).is_dir():
            raise
        cure = "name a folder that has it with --base_model"
        raise UserError([replace(each, cure=f"{each.cure}, or {cure}") for each in error.problems]) from error
    if asker.adapter.is_merged:
        return base
    check_base(asker.adapter, base_identity(base, asker.source))
    return load_adapter(base, str(asker.adapter.path), trainable=False).eval()


def _answer_settings(options: Mapping[str, Any]) -> AnswerSettings:
    return group_of(settings_from_keywords((AnswerSettings,), options).settings, AnswerSettings)


def _rows(rows: Sequence[Any]) -> list[Row]:
    for row in rows:
        if not isinstance(row, Mapping):
            cure = 'give {"field": "text"}, or a list of such rows; complete() continues plain text'
            raise UserError(f"a row is a mapping of fields, not {type(row).__name__}", cure=cure)
    return [Row(number, row, f"row {number}") for number, row in enumerate(rows, start=1)]


def _around_answer(variant: Variant) -> tuple[str, str]:
    """The frame's text before and after the answer's field."""
    sides, side = ["", ""], 0
    for part in variant.answer:
        if isinstance(part, Placeholder):
            side = 1
        else:
            sides[side] += part.text
    return sides[0], sides[1]
