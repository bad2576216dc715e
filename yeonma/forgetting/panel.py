"""General questions and prompts as token ids, and what a model makes of them.

A question's options hang below it as siblings in a forest, and are scored by their log-probabilities: nothing is
generated. The other part are the answers that the base itself gives to general prompts: they are generated once,
greedily, and another model is then asked for each of their tokens, in one forward pass, whether it would choose it too.

The base's own chat template asks; without one, a plain text does. Shapes: as in `yeonma/model/logprobs.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.errors import UserError
from yeonma.files import content_key
from yeonma.forgetting.general_questions import GeneralQuestion, general_prompts, general_questions
from yeonma.generation.sampling import SamplingParams
from yeonma.model.forest_support import in_eval_mode
from yeonma.policy import Policy
from yeonma.tokenization.chat_template_export import base_chat_template
from yeonma.tokenization.example import Example, TokenRules, answer_tokens
from yeonma.tokenization.example_encoder import encode, encode_prompts

CHAT = "[user]\n{question}\n[assistant]\n{answer}"
TEXT = "Question: {question}\nAnswer: {answer}"
"""The templates of a question, for a model with a chat template and for one without."""
MAX_NEW_TOKENS = 48
"""Of an answer of the base's own."""
FOREST_TOKENS = 2048
"""Options and answers of so many tokens go through the model at once."""
CUTOFF_LEN = 1024

Known = MutableMapping[str, Any]
"""What a model has been asked before, by key: JSON values."""


@dataclass(frozen=True, eq=False)
class GeneralPanel:
    """Questions and prompts as a base's tokenizer and chat template write them."""

    questions: tuple[GeneralQuestion, ...]
    options: tuple[tuple[Example, ...], ...]
    """Of each question, the right one first."""
    prompts: tuple[NDArray[np.int32], ...]
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class PanelScores:
    """What a model makes of a panel."""

    option_logprobs: tuple[tuple[float, ...], ...]
    """Of each question's options; empty for a question that was not asked."""
    chosen: tuple[int, ...]
    """Of each prompt: the tokens of the base's answer that this model finds the most likely in their places."""
    logprobs: tuple[float, ...]
    """Of each prompt: the log-probability of the base's answer."""


def make_panel(
    tokenizer: Any, generation_eos: Sequence[int], positions: int | None, count: int
) -> GeneralPanel:
    """So many questions and half as many prompts, without those that do not fit into the model's positions."""
    if base_chat_template(tokenizer):
        try:
            return _panel(CHAT, tokenizer, generation_eos, positions, count)
        except UserError:  # the chat template writes no such conversation
            pass
    return _panel(TEXT, tokenizer, generation_eos, positions, count)


def _panel(
    form: str, tokenizer: Any, generation_eos: Sequence[int], positions: int | None, count: int
) -> GeneralPanel:
    template, cutoff_len = load_template(form), min(CUTOFF_LEN, positions or CUTOFF_LEN)
    rules = TokenRules(cutoff_len, add_eos_token=False)
    questions, options = [], []
    for question in general_questions(count):
        answers = [{"question": question.question, "answer": option} for option in question.options]
        rows, rendered = _rendered(template, answers)
        outcomes = encode(rendered, rows, tokenizer, rules)
        examples = [one for one in outcomes if isinstance(one, Example) and not one.cut_characters]
        if len(examples) == len(answers):
            questions.append(question)
            options.append(tuple(examples))
    prompts: list[NDArray[np.int32]] = []
    if cutoff_len > MAX_NEW_TOKENS:
        asked = [{"question": one.prompt} for one in general_prompts(-(-count // 2))]
        rows, rendered = _rendered(template, asked)
        unlimited = TokenRules(2**40)
        whole = encode_prompts(rendered, rows, tokenizer, unlimited, MAX_NEW_TOKENS)
        prompts = [ids for ids in whole if len(ids) + MAX_NEW_TOKENS <= cutoff_len]
    tokens = answer_tokens(tokenizer, rules if template.has_turns else None, generation_eos)
    return GeneralPanel(tuple(questions), tuple(options), tuple(prompts), tokens.stop_ids)


def _rendered(template: Template, values: Sequence[Mapping[str, str]]) -> tuple[list[Row], list[Any]]:
    rows = [Row(number, one, f"general question {number}") for number, one in enumerate(values, 1)]
    return rows, [template.render(row, with_answer="answer" in row.values) for row in rows]


def needs_model(
    panel: GeneralPanel,
    known: Known,
    answers: Sequence[Sequence[int]] | None,
    languages: Collection[str] | None = None,
) -> bool:
    """Whether `own_answers`, with `answers` None, or `panel_scores` would ask the model."""
    if answers is None:
        return any(_answer_key(panel, prompt) not in known for prompt in panel.prompts)
    return any(key not in known for key, _ in _items(panel, answers, languages))


def own_answers(policy: Policy | None, tokenizer: Any, panel: GeneralPanel, known: Known) -> list[list[int]]:
    """The model's greedy answers to the prompts, as token ids. What is generated is added to `known`; `policy` may be
    None if that has everything already."""
    missing = [prompt for prompt in panel.prompts if _answer_key(panel, prompt) not in known]
    if missing:
        assert policy is not None
        sampling = SamplingParams(stop_ids=panel.stop_ids, max_new_tokens=MAX_NEW_TOKENS)
        generated = policy.generate_from_ids(missing, tokenizer, sampling)
        for prompt, answer in zip(missing, generated, strict=True):
            known[_answer_key(panel, prompt)] = list(answer.token_ids)
    return [known[_answer_key(panel, prompt)] for prompt in panel.prompts]


def panel_scores(
    policy: Policy | None,
    panel: GeneralPanel,
    answers: Sequence[Sequence[int]],
    known: Known,
    languages: Collection[str] | None = None,
) -> PanelScores:
    """What the model makes of the questions, and of the base's answers to the prompts. With `languages`, only questions
    in these are asked. What it is asked is added to `known`; `policy` may be None if that has everything already."""
    items = _items(panel, answers, languages)
    missing = [item for key, item in items if key not in known]
    if missing:
        assert policy is not None
        with in_eval_mode(policy.model):
            found = [record for group in _groups(missing) for record in _ask(policy, group)]
        known.update(zip([key for key, _ in items if key not in known], found, strict=True))
    records = iter([known[key] for key, _ in items])
    options = [
        tuple(next(records)[1]) if _is_asked(question, languages) else () for question in panel.questions
    ]
    kept = list(records)
    return PanelScores(
        tuple(options),
        tuple(sum(chosen) for chosen, _ in kept),
        tuple(sum(logprobs) for _, logprobs in kept),
    )


def _is_asked(question: GeneralQuestion, languages: Collection[str] | None) -> bool:
    return languages is None or question.language in languages


@dataclass(frozen=True, eq=False)
class _Item:
    """Sequences with a common beginning, and which of their tokens are scored."""

    token_ids: list[NDArray[np.int32]]
    scored: list[NDArray[np.bool_]]


def _items(
    panel: GeneralPanel, answers: Sequence[Sequence[int]], languages: Collection[str] | None
) -> list[tuple[str, _Item]]:
    """The questions with their options, then the prompts with the base's answers, and keys for them."""
    items = [
        _Item(
            [option.token_ids for option in options],
            [_text_of(option, panel.stop_ids) for option in options],
        )
        for question, options in zip(panel.questions, panel.options, strict=True)
        if _is_asked(question, languages)
    ]
    for prompt, answer in zip(panel.prompts, answers, strict=True):
        ids = np.concatenate([prompt, np.array(answer, dtype=np.int32)])
        items.append(_Item([ids], [np.arange(len(ids)) >= len(prompt)]))
    return [
        (
            content_key(
                "scores", [ids.tolist() for ids in item.token_ids], [int(mask.sum()) for mask in item.scored]
            ),
            item,
        )
        for item in items
    ]


def _text_of(option: Example, stop_ids: Sequence[int]) -> NDArray[np.bool_]:
    """The tokens of an option without those that end it: whether a model ends an answer there is no knowledge."""
    is_end = np.isin(option.token_ids, stop_ids) & option.trained
    return np.asarray(option.trained & ~np.logical_or.accumulate(is_end))


def _answer_key(panel: GeneralPanel, prompt: NDArray[np.int32]) -> str:
    return content_key("answer", prompt.tolist(), panel.stop_ids, MAX_NEW_TOKENS)


def _groups(items: Sequence[_Item]) -> Iterator[list[_Item]]:
    """The items in order, in groups of at most FOREST_TOKENS; a longer one is alone."""
    group: list[_Item] = []
    tokens = 0
    for item in items:
        count = sum(map(len, item.token_ids))
        if group and tokens + count > FOREST_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(item)
        tokens += count
    yield group


def _ask(policy: Policy, items: Sequence[_Item]) -> list[tuple[list[int], list[float]]]:
    """For each item, of each of its sequences: how many of the scored tokens the model finds the most likely, and the
    log-probability of all of them."""
    units = [number for number, item in enumerate(items) for _ in item.token_ids]
    token_ids = [ids for item in items for ids in item.token_ids]
    scored = [mask for item in items for mask in item.scored]
    all_scores = policy.token_scores(token_ids, scored, top=1, units=units)
    records = [(list[int](), list[float]()) for _ in items]
    for unit, ids, mask, scores in zip(units, token_ids, scored, all_scores, strict=True):
        chosen, logprobs = records[unit]
        chosen.append(int((scores.top_id_NK[:, 0].cpu().numpy() == ids[mask]).sum()))
        logprobs.append(float(scores.logprob_N.double().sum()))
    return records
