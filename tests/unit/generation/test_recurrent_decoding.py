"""Decoding over a forest with recurrent layers: the answers of plain forward passes, one for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import ALL_RECURRENT, VOCABULARY, tiny_model
from yeonma.generation.forest_decode import DecodeRequest, decode
from yeonma.generation.sampling import SamplingParams
from yeonma.model.forest_support import check_forest_support

QUICK = ["qwen3_5_text", "bamba", "lfm2"]
SOME = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ALL_RECURRENT]


def prompts() -> dict[str, list[list[int]]]:
    """Lists by name: with a long common beginning, of which one comes twice, and short ones without."""
    draw = np.random.default_rng(3)
    frame, *ends = (draw.integers(3, VOCABULARY, count).tolist() for count in (66, 1, 5, 2, 67, 9))
    together = [frame + end for end in ends]
    apart = [draw.integers(3, VOCABULARY, count).tolist() for count in (1, 2, 3, 20)]
    return {"one beginning": [*together, together[1]], "none": apart}


def plain_answer(model: Any, prompt: Sequence[int], length: int) -> list[int]:
    """The most likely tokens, each from a pass over all tokens before it. (The states that transformers' own loop
    carries on drift: on zamba2 it takes another token where two are 0.003 apart.)"""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", SOME)
def test_rows_have_the_answers_of_plain_forward_passes(family: str) -> None:
    own, model = tiny_model(family), tiny_model(family)
    assert check_forest_support(model).forest
    for asked in prompts().values():
        lengths = [4 + 2 * index for index in range(len(asked))]  # rows end one after the other
        requests = [
            DecodeRequest(prompt, SamplingParams((), length))
            for prompt, length in zip(asked, lengths, strict=True)
        ]
        found: dict[int, list[int]] = {}
        decode(model, requests, max_rows=3, on_done=found.__setitem__)
        for index, (prompt, length) in enumerate(zip(asked, lengths, strict=True)):
            assert found[index] == plain_answer(own, prompt, length)


def test_a_shared_beginning_goes_through_the_model_once() -> None:
    model = tiny_model("qwen3_5_text")
    assert check_forest_support(model).forest
    fed: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: fed.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    asked = prompts()["one beginning"]
    requests = [DecodeRequest(prompt, SamplingParams((), 3)) for prompt in asked]
    decode(model, requests, max_rows=8, on_done=lambda index, ids: None)
    distinct = {tuple(prompt) for prompt in asked}
    assert fed == [66, sum(len(prompt) - 66 for prompt in distinct), len(asked), len(asked)]
