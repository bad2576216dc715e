"""`yeonma verify`: a run's folder passes, and every change to it is reported."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from tests.faults.conftest import everything_in
from tests.pairs import chat_folder, pairs, tuned
from tests.runs import Done, articles, characters, command, model_folder, sft, trained, write_jsonl
from yeonma.tokenization.chat_template_export import MARK
from yeonma.train import run as run_module

RUN_RECORDS = ("settings.yaml", "metrics.jsonl", "loss.svg", "README.md", "run.json", "manifest.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A finished run; its base and data lie beside it."""
    base, data = model_folder(place / "base"), write_jsonl(place / "data.jsonl", articles(20))
    return trained(place / "whole", base, data, val_set_size=5, card_rows=3, save_steps=2).folder


@pytest.fixture(scope="module")
def other(place: Path, whole: Path) -> Path:
    """Another run, of another model with another tokenizer and template."""
    base = model_folder(place / "other-base", "qwen2", seed=1)
    tokenizer = characters()
    tokenizer.add_tokens(["storm"])
    tokenizer.save_pretrained(base)
    data = write_jsonl(place / "other.jsonl", articles(20, seed=1))
    settings = {"template": "{document}\n>{title}", "lora_r": 2, "val_set_size": 5, "card_rows": 3}
    return trained(place / "other", base, data, save_steps=2, **settings).folder


@pytest.fixture
def copy(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def verified(folder: Path, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status, and the checks by name. The folder must not change."""
    before = everything_in(folder)
    done = command(folder, "verify", str(folder), "--json", "true", *words)
    assert everything_in(folder) == before
    assert done.err == ""
    report = json.loads(done.out)
    assert report["is_well"] == (done.status == 0)
    return done.status, {finding["check"]: finding for finding in report["findings"]}


def differing(folder: Path, *words: str) -> dict[str, str]:
    """The checks that found differences, with place and problem of each. Each must have a cure."""
    status, checks = verified(folder, *words)
    findings = {name: finding for name, finding in checks.items() if finding["outcome"] == "differs"}
    assert status == (1 if findings else 0)
    for finding in findings.values():
        assert finding["problems"]
        for problem in finding["problems"]:
            assert problem["place"]
            assert problem["cure"]
    return {
        name: "\n".join(f"{problem['place']}: {problem['what']}" for problem in finding["problems"])
        for name, finding in findings.items()
    }


def outcomes(folder: Path, *words: str) -> dict[str, str]:
    return {name: finding["outcome"] for name, finding in verified(folder, *words)[1].items()}


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def rehash(folder: Path) -> None:
    """Updates the checksums, as if the run itself had written the changed files."""
    from yeonma.files import file_hash

    names = json.loads((folder / "manifest.json").read_text())["sha256"]
    hashes = {name: file_hash(folder / name) for name in names}
    (folder / "manifest.json").write_text(json.dumps({"sha256": hashes}))


# Folders that pass


WELL = {
    "files": "well",
    "checkpoint-2": "well",
    "checkpoint-4": "well",
    "run": "well",
    "template and rules": "well",
    "adapter": "well",
    "base": "well",
    "tokenizer": "well",
    "sample rows": "well",
    "chat template": "well",
    "base's tokenizer": "well",
    "sample rows, as the base": "well",
}


def test_a_finished_run_passes_every_check(whole: Path) -> None:
    assert outcomes(whole) == WELL
    done = command(whole, "verify", str(whole))
    assert done.status == 0
    assert done.out.endswith("\nnothing differs\n")
    assert "trained on 15 examples" in done.out


def test_the_manifest_has_the_checksum_of_every_file_of_the_folder_itself(whole: Path) -> None:
    sums = json.loads((whole / "manifest.json").read_text())["sha256"]
    files = {path.name for path in whole.iterdir() if path.is_file()}
    assert set(sums) == files - {"manifest.json", "run.json"}


def test_dpo_that_continues_an_adapter_passes(tmp_path: Path, whole: Path, place: Path) -> None:
    rows = [
        {"document": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs(12)
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    done = tuned(tmp_path / "out", place / "base", data, adapter=whole, card_rows=2, val_set_size=3)
    own_outcomes = outcomes(done.folder)
    assert set(own_outcomes.values()) == {"well"}
    assert not differing(done.folder, "--data_path", str(data))


@pytest.mark.parametrize("shape", [{"use_dora": True}, {"use_rslora": True, "lora_r": 3}])
def test_other_forms_of_lora_pass(tmp_path: Path, place: Path, whole: Path, shape: Any) -> None:
    done = trained(tmp_path / "out", place / "base", place / "data.jsonl", max_steps=1, card_rows=1, **shape)
    assert set(outcomes(done.folder).values()) == {"well"}


def test_turns_pass_until_the_chat_template_changes(tmp_path: Path) -> None:
    base = chat_folder(tmp_path / "base")
    turns = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for n in range(8)
    ]
    data = write_jsonl(tmp_path / "data.jsonl", turns)
    done = trained(tmp_path / "out", base, data, template=None, max_steps=1, card_rows=2)
    assert set(outcomes(done.folder).values()) == {"well"}
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "!" + tokenizer.chat_template
    tokenizer.save_pretrained(base)
    differences = differing(done.folder)
    assert set(differences) == {"base's tokenizer", "sample rows, as the base"}
    assert "chat template is not that of training" in differences["base's tokenizer"]
    tokenizer.save_pretrained(done.folder)
    assert {"files", "tokenizer", "sample rows"} <= set(differing(done.folder))


def test_the_chat_template_does_not_matter_for_plain_text(copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(copy)
    rehash(copy)
    assert not differing(copy)


def test_a_chat_template_that_gives_other_tokens_is_found(copy: Path) -> None:
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text("utf-8").replace("below is", "above is"), "utf-8")
    rehash(copy)
    differences = differing(copy)
    assert set(differences) == {"chat template"}
    assert "messages of row" in differences["chat template"]
    assert "do not give the prompt of training: from token 1 on" in differences["chat template"]
    path.write_text("{{ messages.nothing.here }}", "utf-8")
    assert "chat template" not in differing(copy)  # it no longer claims to contain the training template
    path.write_text(MARK + "{{ messages.nothing.here }}", "utf-8")
    assert "it fails on a row" in differing(copy)["chat template"]


def test_a_run_of_an_earlier_version_has_loss_png(copy: Path, place: Path) -> None:
    (copy / "loss.svg").rename(copy / "loss.png")
    sums = json.loads((copy / "manifest.json").read_text())["sha256"]
    sums["loss.png"] = sums.pop("loss.svg")
    (copy / "manifest.json").write_text(json.dumps({"sha256": sums}))
    assert set(outcomes(copy).values()) == {"well"}
    for name in ("run.json", "loss.png"):  # a copy of the adapter alone
        (copy / name).unlink()
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert not differing(copy)


# Changed files


FILES = (
    *("adapter_model.safetensors", "adapter_config.json", "template.txt", "yeonma.json", "samples.json"),
    *("tokenizer.json", "tokenizer_config.json", "settings.yaml", "metrics.jsonl", "loss.svg", "README.md"),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["flipped", "cut", "deleted", "emptied"])
def test_each_changed_file_is_named(copy: Path, name: str, change: str) -> None:
    damage(copy / name, change)
    differences = differing(copy)
    assert f"{copy / name}: " in differences["files"]
    assert len(differences["files"].splitlines()) == 1


def damage(path: Path, change: str) -> None:
    content = path.read_bytes()
    if change == "deleted":
        path.unlink()
    elif change == "emptied":
        path.write_bytes(b"")
    elif change == "cut":
        path.write_bytes(content[:-1])
    else:
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


CHECKPOINT_FILES = (
    *("adapter_model.safetensors", "adapter_config.json", "template.txt", "yeonma.json", "samples.json"),
    *("tokenizer.json", "tokenizer_config.json", "optimizer.safetensors", "random.safetensors", "state.json"),
)


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("change", ["flipped", "deleted"])
def test_each_changed_file_of_a_checkpoint_is_named(copy: Path, name: str, change: str) -> None:
    damage(copy / "checkpoint-2" / name, change)
    differences = differing(copy)
    assert set(differences) == {"checkpoint-2"}
    assert differences["checkpoint-2"].startswith(f"{copy / 'checkpoint-2' / name}: ")
    assert "checkpoint-2" in differing(copy / "checkpoint-2")


def test_damaged_manifests_are_named(copy: Path) -> None:
    (copy / "manifest.json").write_text('{"sha256": {"../run.json": "0"}}')
    (copy / "checkpoint-4" / "manifest.json").write_text("[1")
    (copy / "run.json").write_text("{}")
    differences = differing(copy)
    assert set(differences) == {
        "run",
        "checkpoint-4",
    }  # the manifest of an unfinished run would prove nothing
    shutil.copy(copy / "checkpoint-2" / "state.json", copy / "run.json")


def test_a_manifest_that_names_files_outside_is_refused(copy: Path) -> None:
    (copy / "manifest.json").write_text(json.dumps({"sha256": {"../run.json": "0" * 64}}))
    assert "no SHA-256 checksums" in differing(copy)["files"]


def test_unknown_files_are_reported(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    status, checks = verified(copy)
    assert status == 0
    assert {name: finding["outcome"] for name, finding in checks.items()} == WELL
    assert "not from the run: notes.txt" in command(copy, "verify", str(copy)).out
    (copy / "checkpoint-2" / "adapter_model.bin").write_text("x")
    assert "adapter_model.bin: not part of the checkpoint" in differing(copy)["checkpoint-2"]


def swap(source: Path, target: Path, *names: str) -> None:
    for name in names:
        shutil.copy(source / name, target / name)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("template.txt",), {"template and rules"}),
        (("tokenizer.json", "tokenizer_config.json"), {"tokenizer"}),
        (("adapter_model.safetensors",), {"adapter", "base"}),
        (("adapter_config.json",), {"template and rules", "adapter", "base", "run"}),
        (("adapter_model.safetensors", "adapter_config.json"), {"template and rules", "run"}),
        (("samples.json",), {"sample rows", "sample rows, as the base"}),
        (("settings.yaml",), {"run"}),
        (("yeonma.json", "template.txt"), {"run"}),
        (("run.json",), {"run", "checkpoint-2", "checkpoint-4"}),
    ],
    ids=lambda names: "+".join(sorted(names)) if isinstance(names, tuple) else "",
)
def test_files_of_another_run_are_found_even_if_the_checksums_were_updated(
    copy: Path, other: Path, names: tuple[str, ...], expected: set[str]
) -> None:
    swap(other, copy, *names)
    if names != ("run.json",):
        assert "files" in differing(copy)
        rehash(copy)
    differences = set(differing(copy))
    assert "files" not in differences
    assert expected <= differences


def test_a_checkpoint_of_another_run_or_under_another_name_is_found(copy: Path, other: Path) -> None:
    shutil.rmtree(copy / "checkpoint-2")
    shutil.copytree(other / "checkpoint-2", copy / "checkpoint-2")
    assert "it belongs to another run, which differs in" in differing(copy)["checkpoint-2"]
    shutil.rmtree(copy / "checkpoint-2")
    (copy / "checkpoint-4").rename(copy / "checkpoint-3")
    assert "the checkpoint of step 4, not of step 3" in differing(copy)["checkpoint-3"]


def test_changed_ids_of_sample_rows_are_reported_with_row_and_token(copy: Path) -> None:
    def change(content: Any) -> None:
        content["samples"][1]["prompt_ids"][4] += 1

    rewrite(copy / "samples.json", change)
    rehash(copy)
    differences = differing(copy)
    assert set(differences) == {"sample rows", "sample rows, as the base"}
    row = json.loads((copy / "samples.json").read_text())["samples"][1]
    assert f"row {row['row_number']} differs from training: from token 5 on" in differences["sample rows"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(copy: Path, value: float) -> None:
    weights = load_file(copy / "adapter_model.safetensors")
    name = sorted(weights)[3]
    weights[name][0, 1] = value
    save_file(weights, copy / "adapter_model.safetensors")
    rehash(copy)
    assert name in differing(copy)["adapter"]


def test_weights_in_bfloat16_are_checked_too() -> None:
    from yeonma.verify.compatibility import _is_finite

    def bfloat16(*values: float) -> bytes:
        return b"".join(struct.pack("<f", value)[2:] for value in values)

    assert _is_finite("BF16", bfloat16(0.0, -1.5, 3e38))
    assert not _is_finite("BF16", bfloat16(1.0, float("inf")))
    assert not _is_finite("BF16", bfloat16(float("nan"), 1.0))


def test_metrics_with_a_gap_or_without_their_end_are_reported(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 2)
    (copy / "metrics.jsonl").write_text("".join(lines[:at] + lines[at + 1 :]))
    rehash(copy)
    assert "step 1 is followed by step 3" in differing(copy)["run"]
    first_lines = [line for line in lines if json.loads(line)["step"] < 4]
    (copy / "metrics.jsonl").write_text("".join(first_lines))
    rehash(copy)
    assert "it has 3 steps, but the run had 4" in differing(copy)["run"]


def test_a_setting_changed_afterwards_is_reported(copy: Path) -> None:
    path = copy / "settings.yaml"
    path.write_text(path.read_text().replace("seed: 42", "seed: 43"))
    rehash(copy)
    assert "seed is 43, but was 42 in the run" in differing(copy)["run"]


# The base


def test_a_base_that_was_replaced_is_found(tmp_path: Path) -> None:
    base, data = model_folder(tmp_path / "base"), write_jsonl(tmp_path / "data.jsonl", articles(8))
    done = trained(tmp_path / "out", base, data, max_steps=1, card_rows=2)
    assert set(outcomes(done.folder).values()) == {"well"}
    tokenizer = characters()
    tokenizer.add_tokens(["storm"])
    tokenizer.save_pretrained(base)
    assert "base's tokenizer" in differing(done.folder)
    shutil.rmtree(base)
    model_folder(base, "qwen2")
    assert "base" in differing(done.folder)
    (base / "model.safetensors").unlink()
    assert "base" in differing(done.folder)


def test_a_base_that_is_gone_is_reported_as_not_checked(copy: Path, place: Path, other: Path) -> None:
    moved = place / "elsewhere"
    (place / "base").rename(moved)
    try:
        status, checks = verified(copy)
        assert status == 0
        assert checks["base"]["outcome"] == "not checked"
        assert "--base_model" in checks["base"]["about"]
        assert "base's tokenizer" not in checks
        assert command(copy, "verify", str(copy)).out.endswith("nothing differs; 1 check could not run\n")
        assert outcomes(copy, "--base_model", str(moved)) == WELL
        assert "base" in differing(copy, "--base_model", str(place / "other-base"))
        done = command(copy, "verify", str(copy), "--base_model", str(place / "nowhere"))
        assert done.status == 2
        assert "no such model folder" in done.err
    finally:
        moved.rename(place / "base")


# The data


def test_other_data_is_recognised(whole: Path, place: Path, tmp_path: Path) -> None:
    copied = shutil.copy(place / "data.jsonl", tmp_path / "same.jsonl")
    assert outcomes(whole, "--data_path", str(copied))["data"] == "well"
    with Path(copied).open("a") as file:
        file.write("\n")
    assert "was not trained on this data" in differing(whole, "--data_path", str(copied))["data"]
    done = command(whole, "verify", str(whole), "--data_path", str(tmp_path / "none.jsonl"))
    assert done.status == 2


# Folders that are not a finished run


def test_a_copied_adapter_is_checked_by_itself(copy: Path) -> None:
    for name in RUN_RECORDS:
        if name != "manifest.json":
            (copy / name).unlink()
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    alone = {name: outcome for name, outcome in WELL.items() if not name.startswith(("run", "checkpoint-"))}
    status, checks = verified(copy)
    assert status == 0
    assert {name: finding["outcome"] for name, finding in checks.items()} == alone
    assert "not in this copy: README.md" in checks["files"]["about"]
    (copy / "tokenizer_config.json").write_text("{}")
    assert "tokenizer_config.json" in differing(copy)["files"]
    (copy / "manifest.json").unlink()
    (copy / "samples.json").unlink()
    status, checks = verified(copy)
    assert checks["files"]["outcome"] == checks["sample rows"]["outcome"] == "not checked"


def test_a_folder_of_an_earlier_version_has_no_differences(copy: Path) -> None:
    for folder in (copy, *copy.glob("checkpoint-*")):
        rewrite(folder / "yeonma.json", lambda content: content.pop("tokenizer"))
        (folder / "samples.json").unlink()
    (copy / "manifest.json").unlink()
    for checkpoint in copy.glob("checkpoint-*"):
        rewrite(checkpoint / "manifest.json", lambda content: content["sha256"].pop("samples.json"))
        rehash(checkpoint)
    assert not differing(copy)
    own_outcomes = outcomes(copy)
    assert {name for name, outcome in own_outcomes.items() if outcome == "not checked"} == {
        "files",
        "tokenizer",
        "sample rows",
        "chat template",
        "base's tokenizer",
        "sample rows, as the base",
    }


@pytest.mark.parametrize("name", ["nothing", "empty", "model"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, place: Path, whole: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    folder = place / "base" if name == "model" else tmp_path / name
    done = command(folder, "verify", str(folder))
    assert done.status == 2
    assert "; give the output folder of a run" in done.err


def stopped(output: Path, place: Path, name: str, owner: Any = run_module, **settings: Any) -> Done:
    """The run of `whole`, interrupted just before it calls one of the last functions of a run."""

    def interrupted(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        run_settings = {"val_set_size": 5, "card_rows": 3, "save_steps": 2, **settings}
        done = sft(output, place / "base", place / "data.jsonl", **run_settings)
    assert done.status == 130
    return done


@pytest.mark.parametrize("name", ["install", "seal", "write_run_json"])
@pytest.mark.parametrize("anew", [True, False])
def test_an_unfinished_run_is_reported_as_such_and_its_checkpoints_are_checked(
    copy: Path, place: Path, whole: Path, name: str, anew: bool
) -> None:
    """Even if the folder held a finished run before, whose checksums must not count for the new run's files."""
    settings = {"overwrite": True} if anew else {"resume_from_checkpoint": copy / "checkpoint-2"}
    if name == "write_run_json":  # its second call: the first begins the run
        write_run_json = run_module.folder.write_run_json

        def interrupted(*arguments: Any, finished: bool) -> None:
            if finished:
                raise KeyboardInterrupt
            write_run_json(*arguments, finished=finished)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module.folder, "write_run_json", interrupted)
            keywords = {"val_set_size": 5, "card_rows": 3, "save_steps": 2, **settings}
            assert sft(copy, place / "base", place / "data.jsonl", **keywords).status == 130
    else:
        stopped(copy, place, name, run_module.folder, **settings)
        assert not (copy / "manifest.json").exists()
    status, checks = verified(copy)
    assert status == 0
    assert checks["files"]["outcome"] == "not checked"
    assert checks["checkpoint-4"]["outcome"] == checks["run"]["outcome"] == "well"
    assert checks["sample rows"]["outcome"] == "well"
    assert "a run that is not finished" in command(copy, "verify", str(copy)).out
    damage(copy / "checkpoint-4" / "tokenizer.json", "flipped")
    assert "checkpoint-4" in differing(copy)
    trained(copy, place / "base", place / "data.jsonl", val_set_size=5, card_rows=3, save_steps=2)
    assert outcomes(copy) == WELL


def test_a_running_run_is_reported_as_under_way(copy: Path) -> None:
    with FileLock(copy / ".lock"):
        assert "a run that is under way" in command(copy, "verify", str(copy)).out
    assert "a finished run" in command(copy, "verify", str(copy)).out
