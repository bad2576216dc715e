"""Bias, penalties and min_p follow their formulas, the same by the forest and by transformers' loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models import VOCABULARY, tiny_model
from yeonma.generation.completion import answer_alone
from yeonma.generation.forest_decode import DecodeRequest, decode
from yeonma.generation.logit_rules import LogitRules
from yeonma.generation.sampling import LogitChanges, SamplingParams, sample
from yeonma.generation.token_scores import ScoreLog, score_prompts
from yeonma.model.forest_support import check_forest_support
from yeonma.model.logprobs import sequence_logprobs

CHANGES = (
    LogitChanges(),
    LogitChanges(logit_bias=((5, 4.0), (9, -100.0))),
    LogitChanges(presence_penalty=1.5, frequency_penalty=-0.5),
    LogitChanges(min_p=0.4),
)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(4, VOCABULARY, length).tolist() for length in (20, 4, 9, 1)]


def forest_answers(model: Any, requests: list[DecodeRequest], max_rows: int = 8) -> list[list[int]]:
    answers: dict[int, list[int]] = {}
    decode(model, requests, max_rows=max_rows, on_done=answers.__setitem__)
    return [answers[index] for index in range(len(requests))]


def params(index: int) -> SamplingParams:
    return SamplingParams(
        (),
        10,
        temperature=float(index % 2),
        repetition_penalty=1.0 + 0.2 * (index % 3),
        changes=CHANGES[index],
    )


def test_answers_are_the_same_alone_in_company_and_in_transformers_loop() -> None:
    model = tiny_model("llama")
    alone = [
        answer_alone(model, prompt, params(index), lambda _: False) for index, prompt in enumerate(prompts())
    ]
    assert check_forest_support(model).forest
    requests = [DecodeRequest(prompt, params(index)) for index, prompt in enumerate(prompts())]
    assert forest_answers(model, requests) == alone
    assert [forest_answers(model, [request])[0] for request in requests] == alone
    plain = [DecodeRequest(prompt, SamplingParams((), 10)) for prompt in prompts()]
    assert forest_answers(model, plain) != alone


def test_the_rules_follow_their_formulas() -> None:
    logits = torch.tensor([1.0, -2.0, 3.0, 0.5])
    changes = LogitChanges(logit_bias=((3, 2.5),), presence_penalty=0.5, frequency_penalty=0.25)
    rules = LogitRules.of(SamplingParams((), 9, repetition_penalty=2.0, changes=changes), [1], None)
    assert rules is not None
    # the bias first; the repetition penalty counts the prompt, the others only the answer
    assert rules.apply(logits).tolist() == [1.0, -4.0, 3.0, 3.0]
    rules.accept(3)
    rules.accept(3)
    assert rules.apply(logits).tolist() == [1.0, -4.0, 3.0, 1.5 - 0.5 - 0.5]
    assert logits.tolist() == [1.0, -2.0, 3.0, 0.5]
    assert LogitRules.of(SamplingParams((), 9, changes=LogitChanges(min_p=0.5)), [1], None) is None


def test_min_p_leaves_tokens_of_a_share_of_the_most_likely_one() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    drawn = [
        int(sample(logits, torch.tensor([number], dtype=torch.float64), 1.0, 1.0, 0, 0.4))
        for number in (0.0, 0.6, 0.63, 0.999)
    ]
    assert drawn == [0, 0, 1, 1]  # 0.5 / 0.8 = 0.625


@pytest.mark.parametrize("family", ["llama", "lfm2", "bloom"])  # the last one by one
def test_scores_are_the_models_own_log_probabilities(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    support = check_forest_support(model)
    logs = [ScoreLog(3) for _ in prompts()]
    if support.forest:
        requests = [
            DecodeRequest(prompt, params(index), scores=log)
            for index, (prompt, log) in enumerate(zip(prompts(), logs, strict=True))
        ]
        answers = forest_answers(model, requests)
    else:
        answers = [
            answer_alone(model, prompt, params(index), lambda _: False, scores=logs[index])
            for index, prompt in enumerate(prompts())
        ]
    wholes = [[*prompt, *answer] for prompt, answer in zip(prompts(), answers, strict=True)]
    scored = score_prompts(model, support, wholes, 2)
    for prompt, whole, log, tokens in zip(prompts(), wholes, logs, scored, strict=True):
        ids = torch.tensor(whole)
        with torch.no_grad():
            expected = sequence_logprobs(plain, ids, torch.arange(len(whole)) > 0).tolist()
        assert tokens[0].logprob is None and [token.token_id for token in tokens] == whole
        assert [token.logprob for token in tokens[1:]] == pytest.approx(expected, abs=1e-5)
        assert [token.token_id for token in log.tokens] == whole[len(prompt) :]
        assert [token.logprob for token in log.tokens] == pytest.approx(expected[len(prompt) - 1 :], abs=1e-5)
        assert all(len(token.top) == 3 and token.top[0][1] >= token.top[1][1] for token in log.tokens)


@pytest.mark.parametrize("family", ["llama", "llama longrope"])
def test_scores_of_prompts_do_not_depend_on_their_company(family: str) -> None:
    model = tiny_model(family)
    support = check_forest_support(model)
    rng = np.random.default_rng(0)
    shared = rng.integers(4, VOCABULARY, 30).tolist()
    inputs = [shared + prompt for prompt in prompts()] + [[7], shared]
    together = score_prompts(model, support, inputs, 1)
    for prompt, tokens in zip(inputs, together, strict=True):
        (alone,) = score_prompts(model, support, [prompt], 1)
        assert [token.logprob for token in tokens[1:]] == pytest.approx(
            [token.logprob for token in alone[1:]], abs=1e-5
        )
        assert len(tokens) == len(prompt)


def test_a_prompt_of_several_rows_is_computed_once() -> None:
    model = tiny_model("llama")
    assert check_forest_support(model).forest
    fed: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: fed.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    first, second = prompts()[0], prompts()[2]  # nothing in common
    sampling = [SamplingParams((), 6, temperature=1.0, seed=seed) for seed in range(3)]
    requests = [DecodeRequest(prompt, one) for one in sampling for prompt in (first, second)]
    together = forest_answers(model, requests)
    assert fed[0] == len(first) + len(second) and fed[1:] == [6] * 5
    assert together == [forest_answers(model, [request])[0] for request in requests]
    assert forest_answers(model, requests, max_rows=4) == together
