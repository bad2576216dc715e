"""How likely the trained model and its base find the answers to the sample rows, for sample_answers.json.

A row costs a few forward passes: of the trained model, of its base, and of the trained model at other scales of its
adapter. In each the row's own answer and those of both models hang below one prompt. Rows come one after the other, so
that memory stays that of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer

from yeonma.adapter.sample_answers import SCALES, GreedyAnswer, SampleAnswer, ScoredIds
from yeonma.batch.batch import Batch
from yeonma.model.forest_support import in_eval_mode
from yeonma.policy import Policy
from yeonma.tokenization.dataset import Dataset
from yeonma.tokenization.example import AnswerRole, Example
from yeonma.tokenization.store import TokenStore
from yeonma.train.card_tables import last_part
from yeonma.train.model_card import CardAnswer, Sample

MOST_IDS = 128
"""Tokens of a row's own answer that are scored, from the first on."""
MOST_OF_BASE = 24
"""The same for the base's answer, in which the two models may have little in common after a few tokens."""
DECIMALS = 4
"""Of a log-probability."""


def sample_answers_of(
    policy: Policy, dataset: Dataset, samples: Sequence[Sample], *, with_base: bool
) -> list[SampleAnswer]:
    """The card's rows that were asked with the prompt of training. `with_base`: whether the base's weights are still in
    memory, below the adapter."""
    policies = [policy, *([replace(policy, adapter_weights=False)] if with_base else [])]
    answers = []
    for sample in samples:
        example = _example_of(dataset, sample)
        if example is None:
            continue
        ids = [
            _own_answer(example),
            list(sample.adapter.generated.token_ids),
            list(sample.base.generated.token_ids[:MOST_OF_BASE]),
        ]
        scores = [_scores(each, example, ids) for each in policies]
        by_base = scores[1] if with_base else [None] * len(ids)
        scaled = _at_scales(policy, example, ids) if with_base else [None] * len(ids)
        wanted, greedy, of_base = (
            ScoredIds(*each) for each in zip(ids, scores[0], by_base, scaled, strict=True)
        )
        answers.append(
            SampleAnswer(
                sample.row,
                list(sample.prompt_ids),
                _greedy(sample.adapter),
                _greedy(sample.base),
                wanted,
                greedy,
                of_base,
                sample.data_set,
            )
        )
    return answers


def _greedy(answer: CardAnswer) -> GreedyAnswer:
    generated = answer.generated
    return GreedyAnswer(list(generated.token_ids), generated.text, answer.text, generated.ended)


def _example_of(dataset: Dataset, sample: Sample) -> Example | None:
    """The row's example. None if its prompt was shortened further for the card, where the model has no room for an
    answer."""
    for one in dataset.sets:
        if len(dataset.sets) > 1 and last_part(one.name) != sample.data_set:
            continue
        example = _preferred((one.validation or one.train).store, sample.row)
        if example is not None and sample.prompt_ids == tuple(
            example.token_ids[: example.prompt_length].tolist()
        ):
            return example
    return None


def _preferred(store: TokenStore, row: int) -> Example | None:
    """The row's last example, of a pair the preferred answer."""
    positions = np.flatnonzero(store.row_numbers == row)
    kept = [position for position in positions if store.roles[position] != AnswerRole.REJECTED]
    return store.example(int(kept[-1])) if kept else None


def _own_answer(example: Example) -> list[int]:
    """The ids after the prompt, up to the last one that is trained."""
    trained = np.flatnonzero(example.trained[example.prompt_length :])
    if not len(trained):
        return []
    end = example.prompt_length + min(int(trained[-1]) + 1, MOST_IDS)
    return [int(number) for number in example.token_ids[example.prompt_length : end]]


def _scores(policy: Policy, example: Example, answers: Sequence[list[int]]) -> list[list[float]]:
    """The log-probability of each token of each answer behind the example's prompt."""
    prompt = example.token_ids[: example.prompt_length]
    given = [ids for ids in answers if ids]
    if not given:
        return [[] for _ in answers]
    batch = Batch.of([_behind(prompt, ids, example) for ids in given], units=[0] * len(given))
    with torch.no_grad(), in_eval_mode(policy.model):
        logprob_N = policy.logprobs(batch).double().cpu().numpy()
    parts = iter(np.split(logprob_N, np.cumsum([len(ids) for ids in given])[:-1]))
    return [[round(float(number), DECIMALS) for number in next(parts)] if ids else [] for ids in answers]


def _at_scales(
    policy: Policy, example: Example, answers: Sequence[list[int]]
) -> list[dict[str, list[float]] | None]:
    """For each answer, its log-probabilities at each of SCALES; None without LoRA layers."""
    layers = [module for module in policy.model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        return [None] * len(answers)
    by_scale = {}
    for scale in SCALES:
        with _scaled(layers, float(scale)):
            by_scale[scale] = _scores(policy, example, answers)
    return [{scale: by_scale[scale][number] for scale in SCALES} for number in range(len(answers))]


@contextmanager
def _scaled(layers: Sequence[Any], factor: float) -> Iterator[None]:
    """The adapters' scales times `factor` within the block."""
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer, scales in zip(layers, before, strict=True):
            layer.scaling.update({name: scale * factor for name, scale in scales.items()})
        yield
    finally:
        for layer, scales in zip(layers, before, strict=True):
            layer.scaling.update(scales)


def _behind(prompt: NDArray[np.int32], ids: Sequence[int], example: Example) -> Example:
    token_ids = np.concatenate([prompt, np.array(ids, dtype=np.int32)])
    trained = np.arange(len(token_ids)) >= len(prompt)
    return replace(example, token_ids=token_ids, trained=trained, weights=None)
