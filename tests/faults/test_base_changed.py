"""Fault 86: the content of the base belongs to a run. Another content is refused when the run is to go on, with what
has changed; the same content elsewhere is the same base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Refused
from tests.faults.test_damage import flip
from tests.runs import Done, articles, command, model_folder, sft, trained, unfinished_copy, write_jsonl
from yeonma.files import hashes_of

SETTINGS: dict[str, object] = {"max_steps": 4, "save_steps": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def original(root: Path) -> Path:
    return model_folder(root / "original")


@pytest.fixture
def own_base(root: Path, original: Path) -> Path:
    """The base, always at the same place and whole."""
    shutil.rmtree(root / "base", ignore_errors=True)
    return Path(shutil.copytree(original, root / "base"))


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    return write_jsonl(root / "rows.jsonl", articles(16))


@pytest.fixture(scope="module")
def whole(root: Path, original: Path, data: Path) -> Done:
    shutil.copytree(original, root / "base")
    return trained(root / "whole", root / "base", data, **SETTINGS)


@pytest.fixture
def unfinished(tmp_path: Path, whole: Done) -> Path:
    """As after a kill after the second step."""
    folder = unfinished_copy(whole.folder, tmp_path / "out")
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(folder / name)
    return folder


def rewrite(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (lambda base: flip(base / "model.safetensors"), "model.safetensors had SHA-256 "),
    "config": (
        lambda base: rewrite(base / "config.json", rms_norm_eps=0.5),
        "config.json: rms_norm_eps was 1e-06 and is now 0.5",
    ),
    "generation config": (
        lambda base: rewrite(base / "generation_config.json", eos_token_id=[2, 7]),
        "generation_config.json: eos_token_id was ",
    ),
}


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_fault_86_a_base_that_changed_since_the_checkpoint(
    unfinished: Path, own_base: Path, original: Path, data: Path, whole: Done, what: str, refused: Refused
) -> None:
    change, told = CHANGES[what]
    change(own_base)
    (line,) = refused(data, output_dir=unfinished, base_model=own_base, **SETTINGS)
    assert f"the content of the base model has changed: {told}" in line
    assert "; restore its files, or give a folder that has them with --base_model; " in line
    done = trained(unfinished, original, data, **SETTINGS)  # the cure
    assert "continuing after step 2 of 4" in done.out
    assert done.weight_bytes == whole.weight_bytes


def test_a_base_that_was_moved_is_the_same(
    unfinished: Path, own_base: Path, root: Path, data: Path, whole: Done
) -> None:
    moved = own_base.rename(root / "moved")
    try:
        done = trained(unfinished, moved, data, **SETTINGS)
        line = f"the base model is {moved} now; it has the content of {own_base}, with which the run began"
        assert done.out.count(line) == 1
        assert "continuing after step 2 of 4" in done.out
        assert done.weight_bytes == whole.weight_bytes
        details = json.loads((unfinished / "yeonma.json").read_text())
        assert details["base"]["name"] == str(moved)
        verified = command(unfinished, "verify", str(unfinished))
        assert verified.status == 0, verified.out
        assert "is finished" in trained(unfinished, moved, data, **SETTINGS).out
    finally:
        shutil.rmtree(moved)


def test_a_run_that_was_moved_with_its_base_is_well_before_it_goes_on(
    unfinished: Path, own_base: Path, root: Path, data: Path
) -> None:
    run = json.loads((unfinished / "run.json").read_text())
    run["identity"]["base_model"] = str(root / "moved")  # as after a kill behind the first step there
    (unfinished / "run.json").write_text(json.dumps(run))
    found = json.loads(command(unfinished, "verify", str(unfinished), "--json", "true").out)["findings"]
    outcomes = {finding["check"]: finding["outcome"] for finding in found}
    assert outcomes["checkpoint-2"] == outcomes["base's content"] == "well"


def test_a_run_of_an_earlier_version_goes_on_as_before(
    unfinished: Path, own_base: Path, data: Path, refused: Refused, root: Path
) -> None:
    for path in (unfinished / "run.json", unfinished / "checkpoint-2" / "state.json"):
        record = json.loads(path.read_text())
        del record["identity"]["content of the base model"]
        path.write_text(json.dumps(record))
    shutil.rmtree(unfinished / "checkpoint-1")
    manifest = unfinished / "checkpoint-2" / "manifest.json"
    manifest.unlink()
    manifest.write_text(json.dumps({"sha256": hashes_of(manifest.parent)}))
    copied = Path(shutil.copytree(own_base, root / "copied"))
    first, _ = refused(data, output_dir=unfinished, base_model=copied, **SETTINGS)
    assert f"base_model was '{own_base}' and is now '{copied}'" in first
    shutil.rmtree(copied)
    done = sft(unfinished, own_base, data, **SETTINGS)
    assert done.status == 0 and "content of" not in done.out
    assert command(unfinished, "verify", str(unfinished)).status == 0
