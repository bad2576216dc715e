"""The reference is taken from the first look at the pairs: the same bits, kept in time, and never from a later step."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.models import FOREST_FAMILIES, OTHER_FAMILIES, tiny_model
from tests.pairs import dpo, pairs, tuned
from tests.runs import Done, model_folder, write_jsonl
from tests.unit.train.test_dpo import LOSSES as NAMES
from tests.unit.train.test_dpo import MORE, left_behind
from yeonma.model import load
from yeonma.model.forest_support import check_forest_support, in_eval_mode
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.logprobs import example_logprobs
from yeonma.tokenization.example import AnswerRole
from yeonma.train import build as setup
from yeonma.train import loop, opening, reference
from yeonma.train import step as step_module
from yeonma.train.distributed import Processes
from yeonma.train.losses import LOSSES, PreferenceOptions, preference_objective

ALONE = Processes(0, 1)
QUIET = [family for family in OTHER_FAMILIES if family != "phimoe"]  # whose router draws in training


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", pairs(21))


def adapted(model: Any, checkpointing: bool = False, **shape: Any) -> tuple[Any, Any, Any]:
    """(PEFT's model, the base in it, the way through it), as a run makes them."""
    wanted: dict[str, Any] = {"r": 4, "alpha": 8, "dropout": 0.3, "target_modules": "all-linear"}
    peft_model = load.add_lora(model, load.LoraShape(**{**wanted, **shape}), 0)
    how = check_forest_support(model)
    if checkpointing:
        load.checkpoint_activations(model)
    patch_kernels(model)
    return peft_model, model, how


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [*FOREST_FAMILIES, *QUIET])
def test_a_fresh_adapter_in_training_gives_the_bits_of_the_base(family: str, checkpointing: bool) -> None:
    shape: dict[str, Any] = {}
    if family in ("qwen3_moe", "qwen3_next"):  # on their experts, too, where PEFT has no dropout
        shape = {"dropout": 0.0}
    peft_model, model, how = adapted(tiny_model(family), checkpointing, use_rslora=True, **shape)
    random = np.random.default_rng(1)
    ids = [random.integers(3, 90, length, dtype=np.int32) for length in (70, 41, 9, 33)]
    trained = [np.arange(len(each)) > len(each) // 2 for each in ids]
    before = torch.get_rng_state()
    assert opening.is_reference(model, how, peft_model.disable_adapter, ALONE)
    assert torch.equal(torch.get_rng_state(), before)
    with in_eval_mode(model), torch.no_grad(), peft_model.disable_adapter():
        expected = example_logprobs(model, how, ids, trained, share_prefix=True)
    model.train()
    assert torch.equal(example_logprobs(model, how, ids, trained, share_prefix=True), expected)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name:
                weight += 0.01
    assert not opening.is_reference(model, how, peft_model.disable_adapter, ALONE)


def test_noise_of_the_models_own_and_dropout_of_a_continued_adapter_are_seen() -> None:
    noisy = tiny_model("gpt2")
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    peft_model, model, how = adapted(noisy)
    assert not opening.is_reference(model, how, peft_model.disable_adapter, ALONE)
    drawing = tiny_model("phimoe")
    peft_model, model, how = adapted(drawing, target_modules=["q_proj", "v_proj"])
    assert not opening.is_reference(model, how, peft_model.disable_adapter, ALONE)
    for dropout in (0.0, 0.3):
        peft_model, model, how = adapted(tiny_model("llama"), dropout=dropout)
        with torch.no_grad():
            for name, weight in peft_model.named_parameters():
                if "lora_B" in name:
                    weight += 0.01
        assert opening.is_reference(model, how, nullcontext, ALONE) == (dropout == 0)


def examples_through(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The examples of every pass through the model, whoever asks, from now on."""
    seen: list[int] = []
    for module in (step_module, reference):
        compute = module.pass_logprobs

        def counted(
            model: Any, how: Any, store: Any, turn: Any, *others: Any, _compute: Any = compute
        ) -> Any:
            seen.append(len(turn.examples))
            return _compute(model, how, store, turn, *others)

        monkeypatch.setattr(module, "pass_logprobs", counted)
    return seen


RUN: dict[str, object] = {"num_epochs": 2, "save_steps": 1, "val_set_size": 5, "lora_dropout": 0.1}


@pytest.mark.parametrize("loss", [name for name in NAMES if LOSSES[name].needs_reference])
def test_nothing_is_computed_twice_and_the_run_is_the_same(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    settings: dict[str, object] = {**RUN, "loss": loss, **MORE.get(loss, {})}
    seen = examples_through(monkeypatch)
    done = tuned(tmp_path / "out", base, data, cache_dir=tmp_path / "cache", **settings)
    looks = len(done.looks)
    assert sum(seen) == 2 * (2 * 16 + looks * 5 + (16 - 4))  # steps, looks, and what neither began with
    seen.clear()
    with monkeypatch.context() as patch:  # as if the model were not its reference
        patch.setattr(setup, "is_reference", lambda *_: False)
        before = tuned(tmp_path / "before", base, data, cache_dir=tmp_path / "other", **settings)
    assert sum(seen) == 2 * (2 * 16 + looks * 5 + 21)
    for name in ("loss", "reward_chosen", "reward_margin", "logprob_rejected"):
        ours, theirs = ([line[name] for line in each.lines] for each in (done, before))
        assert ours == pytest.approx(theirs, abs=2e-4), name
    (one,), (other,) = ((tmp_path / name).glob("*.reference") for name in ("cache", "other"))
    ours, theirs = load_file(one)["logprobs"], load_file(other)["logprobs"]
    assert not np.isnan(ours).any()
    assert np.allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> tuple[Done, bytes]:
    place = tmp_path_factory.mktemp("whole")
    done = tuned(place / "out", base, data, cache_dir=place / "cache", **RUN)
    (file,) = (place / "cache").glob("*.reference")
    return done, file.read_bytes()


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("point", ["look", "forward", "kept", "update", "step 2", "step 6"])
def test_killed_at_any_point_it_ends_with_the_same_bytes(
    tmp_path: Path,
    base: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[Done, bytes],
    point: str,
    removed: bool,
) -> None:
    module, name, at = {
        "look": (opening, "write_reference", 1),  # before the held-out pairs are kept
        "forward": (opening, "write_reference", 2),  # before the first step's are
        "kept": (torch.optim.AdamW, "step", 1),
        "update": (loop, "write_checkpoint", 1),
        "step 2": (loop, "write_checkpoint", 2),
        "step 6": (loop, "write_checkpoint", 6),
    }[point]
    kept, calls = getattr(module, name), 0

    def killed(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return kept(*arguments, **more)

    place = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        assert dpo(tmp_path / "out", base, data, cache_dir=place, **RUN).status == 130
    if removed:
        shutil.rmtree(place)
    done = tuned(tmp_path / "out", base, data, cache_dir=place, **RUN)
    assert ("continuing after step" in done.out) == (point in ("step 2", "step 6"))
    (file,) = place.glob("*.reference")
    assert file.read_bytes() == whole[1]
    ours, theirs = left_behind(done.folder), left_behind(whole[0].folder)
    assert {k: v for k, v in ours.items() if "settings" not in k and k != "README.md"} == {
        k: v for k, v in theirs.items() if "settings" not in k and k != "README.md"
    }


class OnePair:
    """As much of a store as a loss reads."""

    key = "pair"
    roles, units = np.array([AnswerRole.CHOSEN, AnswerRole.REJECTED]), np.array([0, 0])
    trained_counts = np.array([2, 3])

    def examples_of(self, units: np.ndarray) -> np.ndarray:
        return np.array([0, 1])


def test_only_the_first_objective_takes_the_policy_for_the_reference(tmp_path: Path) -> None:
    store, known = OnePair(), np.full(2, math.nan)
    plain = preference_objective(LOSSES["sigmoid"], PreferenceOptions(), {"pair": known})
    opened = opening.Opening(tmp_path / "pair.reference", known, np.array([True, True]))
    objective = opening.with_opening(plain, {"pair": opened}, ALONE, torch.device("cpu"))
    both, first = np.array([0, 1]), objective.at_start
    assert first is not None
    logprob_N = -torch.arange(1.0, 6.0)
    assert math.isnan(float(objective.sums(logprob_N, store, both, None)[0]))  # type: ignore[arg-type]
    assert np.isnan(known).all()
    first.sums(2 * logprob_N, store, both, None)  # type: ignore[arg-type]
    loss, _ = first.sums(logprob_N, store, both, None)  # type: ignore[arg-type]  # a step that is repeated
    assert float(loss) == pytest.approx(math.log(2))
    assert known.tolist() == [-3.0, -12.0]
    assert not opened.path.exists()
    first.settle()
    assert load_file(opened.path)["logprobs"].tolist() == [-3.0, -12.0]
    first.sums(3 * logprob_N, store, both, None)  # type: ignore[arg-type]
    assert known.tolist() == [-3.0, -12.0]
