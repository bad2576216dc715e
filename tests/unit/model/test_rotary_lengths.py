from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models import BORDER, BORDER_FAMILIES, tiny_model
from yeonma.model.forest_support import check_forest_support
from yeonma.model.position_limits import length_borders
from yeonma.model.rotary_lengths import TRIAL_BORDER, near_borders, position_ids, split_by_length

CPU = torch.device("cpu")
LENGTHS = (BORDER - 4, BORDER + 5, 3, BORDER + 9, BORDER)
SPLIT = ["phi3 longrope", "llama dynamic"]


def rotary(model: Any) -> Any:
    return model.model.rotary_emb


def angles(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    result: tuple[torch.Tensor, ...] = rotary(model)(torch.zeros(1, 1, 8), position_ids=ids)
    return result


@pytest.mark.parametrize("family", SPLIT)
def test_every_sequence_of_a_pass_has_the_angles_that_it_has_alone(family: str) -> None:
    model = tiny_model(family)
    assert split_by_length(model) == ""
    borders = length_borders(model.config)
    positions = np.concatenate([np.arange(length) for length in LENGTHS])
    lengths = np.concatenate([np.full(length, borders.rotary_length(length)) for length in LENGTHS])
    together = angles(model, position_ids(positions, lengths, CPU))
    start = 0
    for length in LENGTHS:
        alone = angles(tiny_model(family), torch.arange(length).unsqueeze(0))
        for ours, expected in zip(together, alone, strict=True):
            assert torch.equal(ours[:, start : start + length], expected)
        start += length


@pytest.mark.parametrize("family", SPLIT)
def test_the_border_changes_the_angles_of_a_plain_pass(family: str) -> None:
    """Otherwise the test above would show nothing."""
    short = angles(tiny_model(family), torch.arange(BORDER).unsqueeze(0))
    long = angles(tiny_model(family), torch.arange(BORDER + 5).unsqueeze(0))
    assert not torch.allclose(short[0], long[0][:, :BORDER], atol=1e-3)


@pytest.mark.parametrize("family", SPLIT)
def test_a_long_pass_leaves_no_trace_on_the_next_direct_call(family: str) -> None:
    model = tiny_model(family)
    split_by_length(model)
    for length in (BORDER + 9, BORDER, BORDER + 1, 5):
        ours = angles(model, torch.arange(length).unsqueeze(0))
        alone = angles(tiny_model(family), torch.arange(length).unsqueeze(0))
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


def test_splitting_twice_changes_nothing() -> None:
    model = tiny_model("phi3 longrope")
    split_by_length(model)
    forward = rotary(model).forward
    split_by_length(model)
    assert rotary(model).forward is forward


def test_a_model_without_borders_keeps_its_rotary_modules() -> None:
    model = tiny_model("llama")
    assert split_by_length(model) == ""
    assert "forward" not in vars(rotary(model))


def test_a_model_with_rotary_code_of_its_own_goes_one_by_one() -> None:
    model = tiny_model("phi3 longrope")
    del rotary(model).rope_type
    support = check_forest_support(model)
    assert not support.forest
    assert support.why_not == "code of its own picks rotary frequencies by the length of the sequence"


@pytest.mark.parametrize("family", [*BORDER_FAMILIES, "mistral", "gemma2", "llama"])
def test_borders_are_near_in_a_trial_and_then_as_they_were(family: str) -> None:
    model = tiny_model(family)
    text = model.config.get_text_config()
    if getattr(text, "sliding_window", None):
        text.sliding_window = 64
    before = str(model.config.to_dict())
    with near_borders(model, 12) as has_borders:
        assert has_borders == (family not in ("llama", "llama4_text"))
        borders = length_borders(model.config)
        assert set(borders.switches) <= {TRIAL_BORDER}
        assert borders.grows_from in (None, TRIAL_BORDER)
        assert getattr(text, "sliding_window", None) in (None, 12)
    assert str(model.config.to_dict()) == before


@pytest.mark.parametrize("family", ["phi3 longrope", "llama dynamic"])
def test_borders_far_beyond_the_trial_are_crossed_by_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check would let a model pass that gives a forest the frequencies of its longest sequence."""
    far = 4096

    def model_with_far_border() -> Any:
        model = tiny_model(family)
        for name in ("max_position_embeddings", "original_max_position_embeddings"):
            if hasattr(model.config, name):
                setattr(model.config, name, far)
        if "original_max_position_embeddings" in model.config.rope_parameters:
            model.config.rope_parameters["original_max_position_embeddings"] = far
        rotary(model).max_seq_len_cached = rotary(model).original_max_seq_len = far
        return model

    assert check_forest_support(model_with_far_border()).forest
    monkeypatch.setattr("yeonma.model.forest_support.rotary_lengths", lambda *_: None)
    support = check_forest_support(model_with_far_border())
    assert not support.forest
    assert support.why_not.startswith("sequences on both sides of a border of the model differ by")


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "exaone4"])
def test_a_wide_window_that_the_layers_pass_on_wrongly_is_detected(family: str) -> None:
    def model_with_window(of_layers: int) -> Any:
        model = tiny_model(family)
        model.config.sliding_window = 64
        for module in model.modules():
            if getattr(module, "sliding_window", None) is not None:
                module.sliding_window = of_layers
                module.config = model.config
        return model

    assert check_forest_support(model_with_window(64)).forest
    support = check_forest_support(model_with_window(1000))  # stays wide where the mask becomes narrow
    assert not support.forest
