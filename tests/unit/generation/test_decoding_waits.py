"""How often the host waits for the GPU while answers grow: counted on a simulated GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models import VOCABULARY, tiny_model
from tests.simulated_cuda import move_to_gpu, simulated_cuda
from yeonma.generation.forest_decode import DecodeRequest, decode
from yeonma.generation.sampling import SamplingParams
from yeonma.model.forest_support import check_forest_support

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
TOKENS = 6


def requests() -> list[DecodeRequest]:
    """Prompts with a common beginning, two to be answered greedily and two by sampling."""
    random = np.random.default_rng(0)
    common = random.integers(3, VOCABULARY, 20).tolist()
    return [
        DecodeRequest(
            [*common, *random.integers(3, VOCABULARY, 2 + number).tolist()],
            SamplingParams((), TOKENS, temperature=temperature, top_p=0.9, seed=number),
        )
        for number, temperature in enumerate([0.0, 0.0, 1.0, 1.0])
    ]


def answers(model: Any) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    decode(model, requests(), max_rows=4, on_done=found.__setitem__)
    return found


@pytest.mark.parametrize("family", ["gemma3_text", "olmo_hybrid"])
def test_host_waits_once_for_every_token_of_all_rows(family: str) -> None:
    model = tiny_model(family)
    check_forest_support(model)
    expected = answers(model)
    with simulated_cuda() as cuda:
        move_to_gpu(cuda, model)
        cuda.waits.clear()
        found = answers(model)
    assert found == expected
    assert cuda.waits == ["decode in generation/forest_decode.py: tolist"] * TOKENS
