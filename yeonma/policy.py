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

from yeonma.adapter.adapter_folder import base_identity, check_base
from yeonma.adapter.prompt_builder import Prompt, PromptBuilder, held_as, open_folder
from yeonma.config.parse import config_from_keywords
from yeonma.config.settings import AnswerSettings, QuantizationOrAuto
from yeonma.data.columns import Columns
from yeonma.data.rows import Row
from yeonma.errors import UserError
from yeonma.generation.completion import Answer, generate
from yeonma.generation.sampling import SamplingParams
from yeonma.model.forest_support import check_forest_support
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.load import load_adapter, load_base, pick_device, pick_dtype
from yeonma.model.logprobs import ForestSupport


@dataclass(frozen=True)
class Policy:
    """An adapter on its base model, ready to be asked; `load_policy` makes it.

    With `adapter_weights` False the base answers alone: `dataclasses.replace(loaded, adapter_weights=False)` is a view
    of the same model in memory.
    """

    asker: PromptBuilder
    model: Any
    forward: ForestSupport
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

    def text_question(self, text: str, max_new_tokens: int, place: str = "prompt") -> Prompt:
        """As `Asker.text_question`. Raises UserError too where the model has no room for so many tokens."""
        question = self.asker.text_question(text, place)
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and len(question.token_ids) + max_new_tokens > most:
            what = f"{len(question.token_ids)} tokens and {max_new_tokens} new ones are more than the model's {most}"
            raise UserError(what, place=place, cure="shorten it, or lower max_new_tokens")
        return question

    def answers(
        self,
        questions: Sequence[Prompt],
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

        def answered(index: int, answer: Answer) -> None:
            if on_answer is not None:
                on_answer(index, questions[index].answer(answer.text))

        with nullcontext() if self.adapter_weights else self.model.disable_adapter():
            answers = generate(
                self.model,
                self.asker.tokenizer,
                [question.token_ids for question in questions],
                SamplingParams.of(settings, self.asker.stop_ids),
                by_forest=self.forward.forest,
                batch_size=batch_size,
                on_answer=answered,
                on_text=on_text,
            )
        return [question.answer(answer.text) for question, answer in zip(questions, answers, strict=True)]


def load_policy(
    adapter: str | Path | PromptBuilder,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantization: QuantizationOrAuto = "auto",
    adapter_weights: bool = True,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> Policy:
    """An adapter on its base model, in eval mode. `adapter`: its folder (or a checkpoint in it), or what `open_folder`
    returned for one; then `base_model` and `trust_remote_code` play no part.

    `quantization` auto holds the base as training did. `base_model` is needed only where the base is no longer where
    it was trained from.
    Raises UserError for a folder that is no adapter folder, and for a base that is missing or another one.
    """
    asker = adapter
    if not isinstance(asker, PromptBuilder):
        asker = open_folder(asker, base_model=base_model, trust_remote_code=trust_remote_code)
    on = pick_device(device)
    try:
        model = load_base(asker.source, on, pick_dtype(dtype, on), held_as(quantization, asker.adapter))
    except UserError as error:
        if Path(asker.source.name).is_dir():
            raise
        cure = "name a folder that has it with --base_model"
        problems = [replace(problem, cure=f"{problem.cure}, or {cure}") for problem in error.problems]
        raise UserError(problems) from error
    inner = model
    if not asker.adapter.is_merged:
        check_base(asker.adapter, base_identity(model, asker.source))
        model = load_adapter(model, str(asker.adapter.path), trainable=False).eval()
        inner = model.get_base_model()
    forward = check_forest_support(inner)
    patch_kernels(inner, support=forward)
    return Policy(asker, model, forward, adapter_weights)


def _answer_settings(options: Mapping[str, Any]) -> AnswerSettings:
    return config_from_keywords(AnswerSettings, options).config


def _rows(rows: Sequence[Any]) -> list[Row]:
    for row in rows:
        if not isinstance(row, Mapping):
            cure = 'give {"field": "text"}, or a list of such rows; complete() continues plain text'
            raise UserError(f"a row is a mapping of fields, not {type(row).__name__}", cure=cure)
    return [Row(number, row, f"row {number}") for number, row in enumerate(rows, start=1)]
