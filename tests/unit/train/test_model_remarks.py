"""Runs of models with a border or dropout of their own: the same losses for any micro-batch, and what the run says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models import BORDER
from tests.runs import Done, command, model_folder, trained, write_jsonl

ROWS = [{"q": "a" * length, "a": f"{length}."} for length in (2, 9, 14, 17, 18, 19, 22, 30, 40, 16, 11, 3)]
SETTINGS = {"template": "{q}:{a}", "batch_size": 12, "max_steps": 2, "val_set_size": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "phi", "phi3 longrope")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    return trained(tmp_path_factory.mktemp("done") / "out", base, data, **SETTINGS, micro_batch_size=12)


def lengths() -> list[int]:
    """Question, colon, answer and EOS; one token a character."""
    return [len(row["q"]) + 1 + len(row["a"]) + 1 for row in ROWS]


def remark() -> str:
    short = sum(length <= BORDER for length in lengths())
    assert 0 < short < len(ROWS)
    return (
        f"LongRoPE with original_max_position_embeddings {BORDER}: of this run's {len(ROWS)} examples, {short} have "
        f"the short frequencies and {len(ROWS) - short}, which are longer, the long ones"
    )


def test_losses_and_weights_do_not_depend_on_the_micro_batch(
    done: Done, base: Path, data: Path, tmp_path: Path
) -> None:
    for size in (1, 3):
        other = trained(tmp_path / f"out{size}", base, data, **SETTINGS, micro_batch_size=size)
        assert other.losses == pytest.approx(done.losses, abs=1e-5)
        for name, weight in other.weights.items():
            torch.testing.assert_close(weight, done.weights[name], rtol=0, atol=1e-5)


def test_the_sides_of_the_border_are_said_at_the_start_and_on_the_card(done: Done) -> None:
    assert remark() in done.out
    assert f"--max-model-len is above {BORDER}" in done.out
    assert f"- {remark()}" in (done.folder / "README.md").read_text()


def test_inspect_says_the_same(base: Path, data: Path, tmp_path: Path) -> None:
    words = ["--base_model", str(base), "--data_path", str(data), "--template", SETTINGS["template"]]
    words += ["--output_dir", str(tmp_path / "out")]
    page = tmp_path / "page.html"
    shown = command(tmp_path, "inspect", *map(str, words), "--html", str(page))
    assert f"model: {remark()}" in shown.out, shown.err
    assert f"model: {remark().replace(chr(39), '&#x27;')}" in page.read_text()
    printed = command(tmp_path, "inspect", *map(str, words), "--json", "true")
    (audit,) = [json.loads(line) for line in printed.out.splitlines() if "model_remarks" in line]
    assert audit["model_remarks"][0].startswith(remark())


def test_dropout_of_the_base_is_said_and_changes_nothing(data: Path, tmp_path: Path) -> None:
    plain = model_folder(tmp_path / "plain", "gpt2")
    noisy = model_folder(tmp_path / "noisy", "gpt2")
    config = json.loads((noisy / "config.json").read_text())
    config |= {"attn_pdrop": 0.3, "embd_pdrop": 0.2, "resid_pdrop": 0.5}
    (noisy / "config.json").write_text(json.dumps(config))
    settings = {**SETTINGS, "micro_batch_size": 12}
    with_noise = trained(tmp_path / "out1", noisy, data, **settings)
    without = trained(tmp_path / "out2", plain, data, **settings)
    assert with_noise.losses == without.losses
    assert "the base's own dropout is off in training" in with_noise.out
    for named in ("attn_pdrop 0.3", "embd_pdrop 0.2", "resid_pdrop 0.5"):
        assert named in with_noise.out
        assert named in (with_noise.folder / "README.md").read_text()
    assert "own dropout" not in without.out
