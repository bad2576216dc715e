"""Requests of benchmarks on token ids: over forests as one by one, each computed once, until a stop text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness_tasks import full_tokenizer
from tests.models import FOREST_FAMILIES, OTHER_FAMILIES
from tests.runs import model_folder
from yeonma import policy
from yeonma.errors import UserError
from yeonma.evaluate.answer_cache import open_answer_cache
from yeonma.evaluate.harness_requests import Continuation, OpenQuestion, RequestRunner, blocks, seeded
from yeonma.generation.sampling import SamplingParams
from yeonma.model.forest_support import attention
from yeonma.model.source import find_base
from yeonma.policy import build_policy


@contextmanager
def runner(place: Path, family: str = "llama") -> Iterator[RequestRunner]:
    source = find_base(str(model_folder(place / family, family)))
    built = build_policy(source, device=torch.device("cpu"), dtype=torch.float32)
    with open_answer_cache(place / "answers.jsonl") as cache:
        yield RequestRunner(built, full_tokenizer(), "model", "identity", cache, lambda _: None, 4)


@contextmanager
def alone(ours: RequestRunner) -> Iterator[Any]:
    """The runner's model as transformers calls it."""
    model = ours.policy.transformers_model
    with torch.no_grad(), attention(model, ours.policy.support.plain_attention):
        yield model


def requests(count: int = 6, options: int = 3) -> list[Continuation]:
    """Questions behind one beginning of 20 tokens, each with options of one to three tokens; two are equal."""
    draw = np.random.default_rng(0)
    shots = tuple(draw.integers(3, 60, 20).tolist())
    found = []
    for _ in range(count):
        question = tuple(draw.integers(3, 60, 7).tolist())
        for option in range(options):
            found.append(
                Continuation((*shots, *question, *draw.integers(3, 60, option + 1).tolist()), option + 1)
            )
    return [*found, found[0]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "bloom"])
def test_log_likelihoods_are_those_of_each_sequence_alone(tmp_path: Path, family: str) -> None:
    assert family in FOREST_FAMILIES | OTHER_FAMILIES
    with runner(tmp_path, family) as ours:
        found = ours.loglikelihoods(requests())
        for request, (logprob, is_greedy) in zip(requests(), found, strict=True):
            with alone(ours) as model:
                logits = model(torch.tensor([request.token_ids[:-1]])).logits[0, -request.scored :]
            targets = torch.tensor(request.token_ids[-request.scored :])
            expected = torch.log_softmax(logits, dim=-1)[range(request.scored), targets].sum()
            assert logprob == pytest.approx(float(expected), abs=1e-4)
            assert is_greedy == torch.equal(logits.argmax(dim=-1), targets)
        assert ours.counts == {"asked": 19, "computed": 18}


def test_a_greedy_continuation_is_found_and_a_later_call_computes_nothing(tmp_path: Path) -> None:
    with runner(tmp_path) as ours:
        prompt = requests()[0].token_ids[:27]
        ids = list(prompt)
        for _ in range(3):
            with alone(ours) as model:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        greedy = Continuation(tuple(ids), 3)
        ((logprob, is_greedy),) = ours.loglikelihoods([greedy])
        assert is_greedy
    with runner(tmp_path) as later:
        assert later.loglikelihoods([greedy]) == [(logprob, True)]
        assert later.counts == {"asked": 1, "computed": 0}


def test_blocks_hold_every_request_and_no_more_distinct_tokens_than_allowed() -> None:
    asked = requests()[:-1]
    for limit in (1, 40, 64, 10_000):
        found = list(blocks(asked, limit))
        assert sorted(r.token_ids for block in found for r in block) == sorted(r.token_ids for r in asked)
        for block in found:
            beginnings = {r.token_ids[:end] for r in block for end in range(1, len(r.token_ids) + 1)}
            assert len(beginnings) <= limit or len(block) == 1
    assert len(list(blocks(asked, 10_000))) == 1 and list(blocks([], 10)) == []


def test_out_of_memory_halves_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runner(tmp_path) as ours:
        expected = ours.loglikelihoods(requests())
    (tmp_path / "answers.jsonl").unlink()
    score, sizes = policy.example_scores, []

    def small(model: Any, support: Any, token_ids: Sequence[Any], *others: Any, **named: Any) -> list[Any]:
        sizes.append(len(token_ids))
        if len(token_ids) > most:
            raise torch.OutOfMemoryError
        return score(model, support, token_ids, *others, **named)

    most = 5
    monkeypatch.setattr(policy, "example_scores", small)
    with runner(tmp_path) as ours:
        found = ours.loglikelihoods(requests())
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], atol=1e-5)
    assert max(sizes) == 18 and sizes.count(18) == 1
    (tmp_path / "answers.jsonl").unlink()
    most = 0
    with runner(tmp_path) as ours, pytest.raises(UserError, match=r"a request of .* does not fit"):
        ours.loglikelihoods(requests())


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_an_answer_ends_before_its_first_stop_text(tmp_path: Path, family: str) -> None:
    prompts = [request.token_ids[:27] for request in requests()[::3]]
    sampling = SamplingParams((), 16)
    with runner(tmp_path, family) as ours:
        texts = ours.generations([OpenQuestion(prompt, sampling, ()) for prompt in dict.fromkeys(prompts)])
        whole = next(text for text in texts if len(text) > 4)
        number = texts.index(whole)
        stop = whole[2:4]
        asked = OpenQuestion(list(dict.fromkeys(prompts))[number], sampling, (stop,))
        (cut,) = ours.generations([asked])
        assert cut == whole[: whole.index(stop)]
        record = ours.cache.records[asked.key("identity")]
        assert len(record["token_ids"]) < 16  # it was not generated further


def test_repeated_sampling_differs_and_repeated_greedy_answers_do_not() -> None:
    greedy = OpenQuestion((1, 2), SamplingParams((), 4), ())
    sampled = OpenQuestion((1, 2), SamplingParams((), 4, temperature=1.0), ())
    assert seeded(greedy, 1) == greedy and seeded(sampled, 0) == sampled
    assert seeded(sampled, 1).key("") != sampled.key("")
