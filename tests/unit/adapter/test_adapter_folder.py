"""The base of an adapter: a link that points to another model since training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import Done, articles, command, model_folder, trained, write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """A run on a link, and the link."""
    folder = tmp_path_factory.mktemp("run")
    model_folder(folder / "first")
    model_folder(folder / "second", "qwen2")
    link = folder / "base"
    link.symlink_to(folder / "first")
    data = write_jsonl(folder / "rows.jsonl", articles(8))
    return trained(folder / "OUT", link, data, max_steps=1), link


def without_content(folder: Path) -> None:
    """yeonma.json as versions wrote it that did not record the content of the base."""
    details = json.loads((folder / "yeonma.json").read_text())
    details.pop("base_content", None)
    (folder / "yeonma.json").write_text(json.dumps(details))


def pointed_to(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


def test_what_a_link_points_to_is_recorded_and_named(run: tuple[Done, Path]) -> None:
    done, link = run
    first, second = link.parent / "first", link.parent / "second"
    assert json.loads((done.folder / "yeonma.json").read_text())["base_folder"] == str(first)
    words = ["generate", str(done.folder), "--row", '{"document": "storm"}', "--max_new_tokens", "2"]
    assert command(done.folder, *words).status == 0
    pointed_to(link, second)
    moved = command(done.folder, *words)
    assert moved.status == 2
    assert (
        f"it was trained on {link}, which points to {second} now: model.safetensors had SHA-256 " in moved.err
    )
    assert f"it pointed to {first}; use --base_model {first}" in moved.err
    without_content(done.folder)
    moved = command(done.folder, *words)
    assert moved.status == 2
    assert (
        f"it was trained on {link}, which points to {second} now, another model; it pointed to {first}; "
        f"use --base_model {first}"
    ) in moved.err
    assert command(done.folder, *words, "--base_model", str(first)).status == 0
    pointed_to(link, first)


def test_a_folder_that_was_replaced_is_named(run: tuple[Done, Path], tmp_path: Path) -> None:
    done, link = run
    pointed_to(link, link.parent / "third")
    model_folder(link.parent / "third")
    words = ["generate", str(done.folder), "--row", '{"document": "storm"}', "--max_new_tokens", "2"]
    assert command(done.folder, *words).status == 0  # the same config
    link.unlink()
    model_folder(link, "qwen2")
    replaced = command(done.folder, *words)
    assert replaced.status == 2 and f"it was trained on {link}, where another model is now" in replaced.err
