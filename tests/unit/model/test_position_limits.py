from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from tests.models import BORDER, tiny_model
from yeonma.model.position_limits import LengthBorders, length_borders, model_positions


def config_of(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **changes)


def test_most_models_have_no_border_and_the_positions_of_their_config() -> None:
    assert not length_borders(tiny_model("llama").config)
    assert LengthBorders().rotary_length(5) == LengthBorders().rotary_length(100_000)
    assert model_positions(tiny_model("llama").config) == 128
    assert model_positions(config_of("gpt2", n_positions=77)) == 77
    assert model_positions(config_of("bloom")) is None


@pytest.mark.parametrize(
    "family", ["phi3 longrope", "llama longrope", "gemma3_text longrope", "phimoe longrope"]
)
def test_longrope_has_its_border_at_the_original_length(family: str) -> None:
    borders = length_borders(tiny_model(family).config)
    assert borders == LengthBorders(switches=(BORDER,))
    lengths = [borders.rotary_length(length) for length in (1, BORDER, BORDER + 1, 100)]
    assert lengths == [1, 1, BORDER + 1, BORDER + 1]
    assert borders.switches_between(BORDER, BORDER + 1)
    assert not borders.switches_between(BORDER - 1, BORDER)
    assert not borders.switches_between(BORDER + 1, BORDER + 2)


def test_the_older_name_of_longrope_is_known() -> None:
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    config = config_of(
        "phi3",
        hidden_size=128,
        num_attention_heads=4,
        original_max_position_embeddings=4096,
        max_position_embeddings=131072,
        rope_scaling={"type": "su", "original_max_position_embeddings": 4096, **factors},
    )
    assert length_borders(config) == LengthBorders(switches=(4096,))
    assert model_positions(config) == 131072


def test_dynamic_scaling_has_frequencies_of_its_own_for_every_longer_length() -> None:
    config = tiny_model("llama dynamic").config
    borders = length_borders(config)
    assert borders == LengthBorders(grows_from=BORDER)
    assert [borders.rotary_length(length) for length in (3, BORDER, BORDER + 1, 90)] == [1, 1, BORDER + 1, 90]
    assert not borders.switches_between(BORDER, BORDER + 1)  # cached keys stay as they are
    assert model_positions(config) == 4 * BORDER  # its factor
