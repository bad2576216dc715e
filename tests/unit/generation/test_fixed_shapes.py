"""Decoding steps with fixed shapes give the answers of the ordinary steps. The capture of a graph needs a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import VOCABULARY, tiny_model
from tests.simulated_cuda import move_to_gpu, simulated_cuda
from yeonma.generation.fixed_shapes import fixed_shapes, rounded_rows
from yeonma.generation.forest_decode import SLOTS, DecodeRequest, decode
from yeonma.generation.sampling import SamplingParams
from yeonma.generation.token_scores import ScoreLog
from yeonma.model.forest_support import check_forest_support

Answers = dict[int, tuple[list[int], list[float]]]
"""Row -> its tokens and their log-probabilities."""


def requests(shared: int = 20) -> list[DecodeRequest]:
    """Five rows of different lengths, some of which grow beyond the first slots, answered greedily or by sampling."""
    random = np.random.default_rng(0)
    common = random.integers(3, VOCABULARY, shared).tolist()
    return [
        DecodeRequest(
            [*common, *random.integers(3, VOCABULARY, length).tolist()],
            SamplingParams((), tokens, temperature=temperature, seed=number),
            scores=ScoreLog(0),
        )
        for number, (length, tokens, temperature) in enumerate(
            [(2, 9, 0.0), (SLOTS - 5, 12, 0.0), (7, 3, 1.0), (4, 6, 0.0), (9, 10, 1.0)]
        )
    ]


def answers(model: Any, shared: int = 20, max_rows: int = 3) -> Answers:
    found: Answers = {}
    asked = requests(shared)

    def done(row: int, ids: list[int]) -> None:
        scores = asked[row].scores
        assert scores is not None
        found[row] = ids, [score.logprob for score in scores.tokens]

    decode(model, asked, max_rows=max_rows, on_done=done)
    return found


def assert_equal(found: Answers, expected: Answers, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for row, (ids, logprobs) in expected.items():
        assert found[row][0] == ids
        np.testing.assert_allclose(found[row][1], logprobs, rtol=0, atol=tolerance)


def test_rows_are_rounded_up_to_powers_of_two() -> None:
    assert [rounded_rows(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 33, 64)] == [1, 2, 4, 4, 8, 8, 16, 64, 64]


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "mistral"])
def test_answers_and_scores_equal_those_of_ordinary_steps(family: str, shared: int) -> None:
    model = tiny_model(family)
    check_forest_support(model)
    expected = answers(model, shared)
    with fixed_shapes() as mode:
        found = answers(model, shared)
    assert_equal(found, expected)
    assert mode.steps > 10 and mode.replayed == 0 and mode.failures == []
    with fixed_shapes() as nothing:
        pass
    assert_equal(answers(model, shared), expected)
    assert nothing.steps == 0


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next"])
def test_recurrent_models_decode_as_ever(family: str) -> None:
    model = tiny_model(family)
    check_forest_support(model)
    expected = answers(model)
    with fixed_shapes() as mode:
        assert answers(model) == expected
    assert mode.steps == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_no_graph_can_be_captured_steps_run_without_one() -> None:
    model = tiny_model("llama")
    check_forest_support(model)
    expected = answers(model)
    with fixed_shapes(capture=True) as mode:
        found = answers(model)
    assert_equal(found, expected)
    assert len(mode.failures) == 1 and not mode.capture and mode.replayed == 0 < mode.steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
def test_a_step_with_fixed_shapes_never_makes_the_host_wait() -> None:
    """What a graph captures must not."""
    model = tiny_model("llama")
    check_forest_support(model)
    waits = []
    with simulated_cuda() as cuda:
        move_to_gpu(cuda, model)
        for block in (nullcontext(), fixed_shapes()):
            asked = [DecodeRequest(one.prompt, one.sampling) for one in requests()]
            cuda.waits.clear()
            with block:
                decode(model, asked, max_rows=3, on_done=lambda *_: None)
            waits.append(list(cuda.waits))
    assert waits[0] == waits[1] == ["decode in generation/forest_decode.py: tolist"] * len(waits[0])


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_captured_steps_give_the_answers_of_plain_ones_on_a_gpu(family: str) -> None:
    model = tiny_model(family).to("cuda")
    check_forest_support(model)
    expected = answers(model)
    with fixed_shapes(capture=True) as mode:
        found = answers(model)
    assert mode.failures == [] and mode.replayed > 0
    assert_equal(found, expected, tolerance=1e-3)
