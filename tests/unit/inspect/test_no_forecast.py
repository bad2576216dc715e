"""Models whose memory cannot be traced, or whose activations cannot be recomputed: said in words, by every verb."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.family_trials import TEMPLATE, FamilyTrial
from tests.runs import arguments, command


def inspect(trial: FamilyTrial, **settings: object) -> tuple[str, str]:
    places = {"base_model": trial.base, "data_path": trial.data, "template": TEMPLATE, "rows": "none"}
    done = command(trial.place, "inspect", *arguments({**places, **settings}))
    assert done.status == 0, done.err
    return done.out, done.err


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("stablelm", "ValueError: its layers do not hand the forest on to their attention"),
        ("nemotron", "ValueError: its layers do not hand the forest on to their attention"),
        ("doge", "ValueError: the model made its own attention mask"),
        ("deepseek_v32", "TypeError: 'NoneType' object is not subscriptable"),
        ("glm_moe_dsa", "TypeError: 'NoneType' object is not subscriptable"),
        ("jetmoe", "NotImplementedError: Cannot copy out of meta tensor; no data!"),
    ],
)
def test_inspect_says_why_there_is_no_forecast(tmp_path: Path, model_type: str, reason: str) -> None:
    out, err = inspect(FamilyTrial(model_type, tmp_path))
    assert f"no forecast: base_model: this model's memory cannot be forecast ({reason})" in err
    assert "adapter on: attention 2/2" in out + err


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama4_text", "modernbert-decoder"])
def test_mixtures_and_models_with_another_decoder_have_a_forecast(tmp_path: Path, model_type: str) -> None:
    out, err = inspect(FamilyTrial(model_type, tmp_path))
    assert "peak memory" in out and "no forecast" not in err


def test_budget_of_a_model_that_cannot_be_traced_is_refused_with_the_cure(tmp_path: Path) -> None:
    done = FamilyTrial("stablelm", tmp_path).sft(micro_batch_tokens="auto")
    assert done.status == 2
    assert "give micro_batch_tokens a number and gradient_checkpointing true or false" in done.err


def test_model_that_keeps_all_activations_is_refused_or_trained_without_checkpointing(tmp_path: Path) -> None:
    trial = FamilyTrial("ctrl", tmp_path)
    done = trial.sft(gradient_checkpointing=True)
    assert done.status == 2
    message = (
        "gradient_checkpointing: this model's code keeps all activations; use --gradient_checkpointing false"
    )
    assert message in done.err and "Traceback" not in done.err
    _, err = inspect(trial, gradient_checkpointing=True)
    assert f"no forecast: {message}" in err
    assert trial.sft(gradient_checkpointing="auto").status == 0
