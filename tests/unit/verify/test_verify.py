"""`yeonma verify`: a run's folder passes, and every change to it is reported."""

from __future__ import annotations

import json
import os
import shutil
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
from yeonma.files import file_hash
from yeonma.tokenization.chat_template_export import MARK
from yeonma.train import run as run_module

RUN_RECORDS = ("settings.yaml", "metrics.jsonl", "loss.svg", "README.md", "run.json", "manifest.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def finished_run(root: Path) -> Path:
    """A finished run; its base and data lie beside it."""
    base, data = model_folder(root / "base"), write_jsonl(root / "data.jsonl", articles(20))
    return trained(root / "whole", base, data, val_set_size=5, card_rows=3, save_steps=2).folder


@pytest.fixture(scope="module")
def other_run(root: Path, finished_run: Path) -> Path:
    """Another run, of another model with another tokenizer and template."""
    base = model_folder(root / "other-base", "qwen2", seed=1)
    tokenizer = characters()
    tokenizer.add_tokens(["storm"])
    tokenizer.save_pretrained(base)
    data = write_jsonl(root / "other.jsonl", articles(20, seed=1))
    settings = {"template": "{document}\n>{title}", "lora_r": 2, "val_set_size": 5, "card_rows": 3}
    return trained(root / "other", base, data, save_steps=2, **settings).folder


@pytest.fixture
def copy(tmp_path: Path, finished_run: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "out"))


def run_verify(folder: Path, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and the findings by check name. The folder must not change."""
    before = everything_in(folder)
    done = command(folder, "verify", str(folder), "--json", "true", *options)
    assert everything_in(folder) == before
    assert done.err == ""
    report = json.loads(done.out)
    assert report["is_well"] == (done.status == 0)
    return done.status, {finding["check"]: finding for finding in report["findings"]}


def find_differences(folder: Path, *options: str) -> dict[str, str]:
    """For each check that found differences, the place and text of its problems. Each must have a cure."""
    status, checks = run_verify(folder, *options)
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


def outcomes(folder: Path, *options: str) -> dict[str, str]:
    return {name: finding["outcome"] for name, finding in run_verify(folder, *options)[1].items()}


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


def turns_of(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "yes"}]


# Folders that pass


ALL_WELL = {
    "files": "well",
    "checkpoint-2": "well",
    "checkpoint-4": "well",
    "run": "well",
    "template and rules": "well",
    "adapter": "well",
    "base": "well",
    "base's content": "well",
    "tokenizer": "well",
    "sample rows": "well",
    "chat template": "well",
    "base's tokenizer": "well",
    "sample rows, as the base": "well",
}


def test_a_finished_run_passes_every_check(finished_run: Path) -> None:
    assert outcomes(finished_run) == ALL_WELL
    done = command(finished_run, "verify", str(finished_run))
    assert done.status == 0
    assert done.out.endswith("\nnothing differs\n")
    assert "trained on 15 examples" in done.out


def test_a_run_with_weights_of_rows_passes_every_check_and_compares_rows_without_them(tmp_path: Path) -> None:
    rows = [{**row, "w": number % 3} for number, row in enumerate(articles(9), 1)]
    base, data = model_folder(tmp_path / "base"), write_jsonl(tmp_path / "data.jsonl", rows)
    folder = trained(tmp_path / "run", base, data, row_weights="w", val_set_size=2, card_rows=3).folder
    found = outcomes(folder)
    assert found["sample rows"] == "well" and set(found.values()) <= {"well", "not checked"}
    plain = write_jsonl(tmp_path / "plain.jsonl", articles(3))
    words = ["--models", str(folder), "--data_path", str(plain), "--max_new_tokens", "4"]
    assert command(tmp_path, "compare", *words, "--output_dir", str(tmp_path / "report")).status == 0


def test_manifest_has_checksums_of_all_top_level_files(finished_run: Path) -> None:
    sums = json.loads((finished_run / "manifest.json").read_text())["sha256"]
    files = {path.name for path in finished_run.iterdir() if path.is_file()}
    assert set(sums) == files - {"manifest.json", "run.json", "log.txt"}


def test_dpo_that_continues_an_adapter_passes(tmp_path: Path, finished_run: Path, root: Path) -> None:
    rows = [
        {"document": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs(12)
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    done = tuned(tmp_path / "out", root / "base", data, adapter=finished_run, card_rows=2, val_set_size=3)
    run_outcomes = outcomes(done.folder)
    assert set(run_outcomes.values()) == {"well"}
    assert not find_differences(done.folder, "--data_path", str(data))


def test_dpo_on_turns_with_system_prompts_and_several_rejected_answers_passes(tmp_path: Path) -> None:
    rows = [
        {"messages": turns_of(n), "system": f"rule {n}", "rejected_response": ["no", "never"], "id": n}
        for n in range(6)
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    done = tuned(tmp_path / "out", chat_folder(tmp_path / "base"), data, card_rows=2, max_steps=1)
    run_outcomes = outcomes(done.folder)
    assert set(run_outcomes.values()) == {"well"}
    samples = json.loads((done.folder / "samples.json").read_text("utf-8"))["samples"]
    assert set(samples[0]["row"]) == {"messages", "system", "rejected_response"}
    assert f"{data}: 6 rows, 12 pairs, " in done.out
    assert "rows with several rejected answers, each in a pair of its own: 6 (rows 1, 2" in done.out


@pytest.mark.usefixtures("finished_run")
def test_a_run_on_values_within_columns_passes(tmp_path: Path, root: Path) -> None:
    rows = [{"news": {"body": [f"{n}"]}, "made": {"title": n}, "unused": "x" * 99} for n in range(8)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    columns = {"document": "news.body", "title": "json(made)"}
    done = trained(tmp_path / "out", root / "base", data, columns=columns, max_steps=1, card_rows=2)
    assert set(outcomes(done.folder).values()) == {"well"}
    samples = json.loads((done.folder / "samples.json").read_text("utf-8"))["samples"]
    assert samples[1]["row"] == {"news.body": "1", "json(made)": '{"title":1}'}


@pytest.mark.parametrize("lora_settings", [{"use_dora": True}, {"use_rslora": True, "lora_r": 3}])
def test_dora_and_rslora_runs_pass(
    tmp_path: Path, root: Path, finished_run: Path, lora_settings: Any
) -> None:
    done = trained(
        tmp_path / "out", root / "base", root / "data.jsonl", max_steps=1, card_rows=1, **lora_settings
    )
    assert set(outcomes(done.folder).values()) == {"well"}


def test_chat_run_differs_after_the_chat_template_changes(tmp_path: Path) -> None:
    base = chat_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": turns_of(n)} for n in range(8)])
    done = trained(tmp_path / "out", base, data, template=None, max_steps=1, card_rows=2)
    assert set(outcomes(done.folder).values()) == {"well"}
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "!" + tokenizer.chat_template
    tokenizer.save_pretrained(base)
    differences = find_differences(done.folder)
    assert set(differences) == {"base's tokenizer", "sample rows, as the base"}
    assert "chat template is not that of training" in differences["base's tokenizer"]
    tokenizer.save_pretrained(done.folder)
    assert {"files", "tokenizer", "sample rows"} <= set(find_differences(done.folder))


def test_the_chat_template_does_not_matter_for_plain_text(copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(copy)
    rehash(copy)
    assert not find_differences(copy)


def test_chat_template_giving_other_tokens_is_reported(copy: Path) -> None:
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text("utf-8").replace("below is", "above is"), "utf-8")
    rehash(copy)
    differences = find_differences(copy)
    assert set(differences) == {"chat template"}
    assert "messages of row" in differences["chat template"]
    assert "do not give the prompt of training: from token 1 on" in differences["chat template"]
    path.write_text("{{ messages.nothing.here }}", "utf-8")
    assert "chat template" not in find_differences(copy)  # no longer marked as the training template
    path.write_text(MARK + "{{ messages.nothing.here }}", "utf-8")
    assert "it fails on a row" in find_differences(copy)["chat template"]


def test_older_run_with_loss_png_passes(copy: Path, root: Path) -> None:
    (copy / "loss.svg").rename(copy / "loss.png")
    sums = json.loads((copy / "manifest.json").read_text())["sha256"]
    sums["loss.png"] = sums.pop("loss.svg")
    (copy / "manifest.json").write_text(json.dumps({"sha256": sums}))
    assert set(outcomes(copy).values()) == {"well"}
    for name in ("run.json", "loss.png"):  # a copy of the adapter alone
        (copy / name).unlink()
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert not find_differences(copy)


# Changed files


FILES = (
    *("adapter_model.safetensors", "adapter_config.json", "template.txt", "yeonma.json", "samples.json"),
    *("tokenizer.json", "tokenizer_config.json", "settings.yaml", "metrics.jsonl", "loss.svg", "README.md"),
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["flipped", "cut", "deleted", "emptied"])
def test_each_changed_file_is_named(copy: Path, name: str, change: str) -> None:
    damage(copy / name, change)
    differences = find_differences(copy)
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
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


CHECKPOINT_FILES = (
    *("adapter_model.safetensors", "adapter_config.json", "template.txt", "yeonma.json", "samples.json"),
    *("tokenizer.json", "tokenizer_config.json", "optimizer.safetensors", "random.safetensors", "state.json"),
)


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("change", ["flipped", "deleted"])
def test_each_changed_file_of_a_checkpoint_is_named(copy: Path, name: str, change: str) -> None:
    damage(copy / "checkpoint-2" / name, change)
    differences = find_differences(copy)
    assert set(differences) == {"checkpoint-2"}
    assert differences["checkpoint-2"].startswith(f"{copy / 'checkpoint-2' / name}: ")
    assert "checkpoint-2" in find_differences(copy / "checkpoint-2")


def test_damaged_run_json_and_checkpoint_manifest_are_reported(copy: Path) -> None:
    (copy / "manifest.json").write_text('{"sha256": {"../run.json": "0"}}')
    (copy / "checkpoint-4" / "manifest.json").write_text("[1")
    (copy / "run.json").write_text("{}")
    differences = find_differences(copy)
    # not "files": the manifest of an unfinished run is not used
    assert set(differences) == {"run", "checkpoint-4"}
    shutil.copy(copy / "checkpoint-2" / "state.json", copy / "run.json")


def test_manifest_naming_files_outside_the_folder_is_reported(copy: Path) -> None:
    (copy / "manifest.json").write_text(json.dumps({"sha256": {"../run.json": "0" * 64}}))
    assert "no SHA-256 checksums" in find_differences(copy)["files"]


def test_unknown_files_are_reported(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    status, checks = run_verify(copy)
    assert status == 0
    assert {name: finding["outcome"] for name, finding in checks.items()} == ALL_WELL
    assert "not from the run: notes.txt" in command(copy, "verify", str(copy)).out
    (copy / "checkpoint-2" / "adapter_model.bin").write_text("x")
    assert "adapter_model.bin: not part of the checkpoint" in find_differences(copy)["checkpoint-2"]


def copy_files(source: Path, target: Path, *names: str) -> None:
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
def test_files_of_another_run_are_reported_despite_updated_checksums(
    copy: Path, other_run: Path, names: tuple[str, ...], expected: set[str]
) -> None:
    copy_files(other_run, copy, *names)
    if names != ("run.json",):
        assert "files" in find_differences(copy)
        rehash(copy)
    differences = set(find_differences(copy))
    assert "files" not in differences
    assert expected <= differences


def test_checkpoint_of_another_run_or_step_is_reported(copy: Path, other_run: Path) -> None:
    shutil.rmtree(copy / "checkpoint-2")
    shutil.copytree(other_run / "checkpoint-2", copy / "checkpoint-2")
    assert "it belongs to another run, which differs in" in find_differences(copy)["checkpoint-2"]
    shutil.rmtree(copy / "checkpoint-2")
    (copy / "checkpoint-4").rename(copy / "checkpoint-3")
    assert "the checkpoint of step 4, not of step 3" in find_differences(copy)["checkpoint-3"]


def test_changed_ids_of_sample_rows_are_reported_with_row_and_token(copy: Path) -> None:
    def change(content: Any) -> None:
        content["samples"][1]["prompt_ids"][4] += 1

    rewrite(copy / "samples.json", change)
    rehash(copy)
    differences = find_differences(copy)
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
    assert name in find_differences(copy)["adapter"]


def test_missing_metrics_lines_are_reported(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    index = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 2)
    (copy / "metrics.jsonl").write_text("".join(lines[:index] + lines[index + 1 :]))
    rehash(copy)
    assert "step 1 is followed by step 3" in find_differences(copy)["run"]
    first_lines = [line for line in lines if json.loads(line)["step"] < 4]
    (copy / "metrics.jsonl").write_text("".join(first_lines))
    rehash(copy)
    assert "it has 3 steps, but the run had 4" in find_differences(copy)["run"]


def test_a_setting_changed_afterwards_is_reported(copy: Path) -> None:
    path = copy / "settings.yaml"
    path.write_text(path.read_text().replace("seed: 42", "seed: 43"))
    rehash(copy)
    assert "seed is 43, but was 42 in the run" in find_differences(copy)["run"]


# The base


def test_replaced_or_damaged_base_is_reported(tmp_path: Path) -> None:
    base, data = model_folder(tmp_path / "base"), write_jsonl(tmp_path / "data.jsonl", articles(8))
    done = trained(tmp_path / "out", base, data, max_steps=1, card_rows=2)
    assert set(outcomes(done.folder).values()) == {"well"}
    tokenizer = characters()
    tokenizer.add_tokens(["storm"])
    tokenizer.save_pretrained(base)
    assert "base's tokenizer" in find_differences(done.folder)
    shutil.rmtree(base)
    model_folder(base, "qwen2")
    assert "base" in find_differences(done.folder)
    (base / "model.safetensors").unlink()
    assert "base" in find_differences(done.folder)


def test_missing_base_is_reported_as_not_checked(copy: Path, root: Path, other_run: Path) -> None:
    moved = root / "elsewhere"
    (root / "base").rename(moved)
    try:
        status, checks = run_verify(copy)
        assert status == 0
        assert checks["base"]["outcome"] == "not checked"
        assert "--base_model" in checks["base"]["about"]
        assert checks["base's content"]["about"] == "the base is not here"
        assert "base's tokenizer" not in checks
        assert command(copy, "verify", str(copy)).out.endswith("nothing differs; 2 checks could not run\n")
        assert outcomes(copy, "--base_model", str(moved)) == ALL_WELL
        assert "base" in find_differences(copy, "--base_model", str(root / "other-base"))
        done = command(copy, "verify", str(copy), "--base_model", str(root / "nowhere"))
        assert done.status == 2
        assert "no such model folder" in done.err
    finally:
        moved.rename(root / "base")


# The data


def test_changed_data_is_reported(finished_run: Path, root: Path, tmp_path: Path) -> None:
    copied_data = shutil.copy(root / "data.jsonl", tmp_path / "same.jsonl")
    assert outcomes(finished_run, "--data_path", str(copied_data))["data"] == "well"
    with Path(copied_data).open("a") as file:
        file.write("\n")
    assert (
        "was not trained on this data"
        in find_differences(finished_run, "--data_path", str(copied_data))["data"]
    )
    done = command(finished_run, "verify", str(finished_run), "--data_path", str(tmp_path / "none.jsonl"))
    assert done.status == 2


def test_data_is_compared_as_the_run_read_it(finished_run: Path, root: Path) -> None:
    rows = "".join(f"{row['document']}|{row['title']}\n" for row in articles(20))
    data = root / "rows.csv"
    data.write_text(f"document|title\n{rows}")
    settings = {"val_set_size": 2, "card_rows": 0, "max_steps": 1}
    folder = trained(root / "first", root / "base", data, max_rows=8, delimiter="|", **settings).folder
    assert outcomes(folder, "--data_path", str(data))["data"] == "well"
    data.write_text(f"document|title\n{rows[:-2]}\n")
    assert "data" in find_differences(folder, "--data_path", str(data))


# Folders that are not a finished run


def test_adapter_copied_without_run_records_is_checked(copy: Path) -> None:
    for name in RUN_RECORDS:
        if name != "manifest.json":
            (copy / name).unlink()
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    expected = {
        name: outcome for name, outcome in ALL_WELL.items() if not name.startswith(("run", "checkpoint-"))
    }
    status, checks = run_verify(copy)
    assert status == 0
    assert {name: finding["outcome"] for name, finding in checks.items()} == expected
    assert "not in this copy: README.md" in checks["files"]["about"]
    (copy / "tokenizer_config.json").write_text("{}")
    assert "tokenizer_config.json" in find_differences(copy)["files"]
    (copy / "manifest.json").unlink()
    (copy / "samples.json").unlink()
    status, checks = run_verify(copy)
    assert checks["files"]["outcome"] == checks["sample rows"]["outcome"] == "not checked"


def test_a_folder_of_an_earlier_version_has_no_differences(copy: Path) -> None:
    for folder in (copy, *copy.glob("checkpoint-*")):
        for key in ("tokenizer", "base_content"):
            rewrite(folder / "yeonma.json", lambda content, key=key: content.pop(key))
        (folder / "samples.json").unlink()
    (copy / "manifest.json").unlink()
    for checkpoint in copy.glob("checkpoint-*"):
        rewrite(checkpoint / "manifest.json", lambda content: content["sha256"].pop("samples.json"))
        rehash(checkpoint)
    assert not find_differences(copy)
    run_outcomes = outcomes(copy)
    assert {name for name, outcome in run_outcomes.items() if outcome == "not checked"} == {
        "files",
        "base's content",
        "tokenizer",
        "sample rows",
        "chat template",
        "base's tokenizer",
        "sample rows, as the base",
    }


@pytest.mark.parametrize("name", ["nothing", "empty", "model"])
def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, root: Path, finished_run: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    folder = root / "base" if name == "model" else tmp_path / name
    done = command(folder, "verify", str(folder))
    assert done.status == 2
    assert "; give the output folder of a run" in done.err


def interrupted_run(output: Path, root: Path, name: str, owner: Any = run_module, **settings: Any) -> Done:
    """Repeats `finished_run` and interrupts it just before it calls one of the last functions of a run."""

    def interrupt(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        run_settings = {"val_set_size": 5, "card_rows": 3, "save_steps": 2, **settings}
        done = sft(output, root / "base", root / "data.jsonl", **run_settings)
    assert done.status == 130
    return done


@pytest.mark.parametrize("name", ["install", "seal", "write_run_json"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_unfinished_run_is_reported_and_its_checkpoints_are_checked(
    copy: Path, root: Path, finished_run: Path, name: str, overwrite: bool
) -> None:
    """Also if the folder held a finished run before: its checksums must not be used for the new run's files."""
    settings = {"overwrite": True} if overwrite else {"resume_from_checkpoint": copy / "checkpoint-2"}
    if name == "write_run_json":  # its second call; the first one starts the run
        write_run_json = run_module.folder.write_run_json

        def interrupt(*arguments: Any, finished: bool) -> None:
            if finished:
                raise KeyboardInterrupt
            write_run_json(*arguments, finished=finished)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module.folder, "write_run_json", interrupt)
            run_settings = {"val_set_size": 5, "card_rows": 3, "save_steps": 2, **settings}
            assert sft(copy, root / "base", root / "data.jsonl", **run_settings).status == 130
    else:
        interrupted_run(copy, root, name, run_module.folder, **settings)
        assert not (copy / "manifest.json").exists()
    status, checks = run_verify(copy)
    assert status == 0
    assert checks["files"]["outcome"] == "not checked"
    assert checks["checkpoint-4"]["outcome"] == checks["run"]["outcome"] == "well"
    assert checks["sample rows"]["outcome"] == "well"
    assert "a run that is not finished" in command(copy, "verify", str(copy)).out
    damage(copy / "checkpoint-4" / "tokenizer.json", "flipped")
    assert "checkpoint-4" in find_differences(copy)
    trained(copy, root / "base", root / "data.jsonl", val_set_size=5, card_rows=3, save_steps=2)
    assert outcomes(copy) == ALL_WELL


def test_a_running_run_is_reported_as_under_way(copy: Path) -> None:
    with FileLock(copy / ".lock"):
        assert "a run that is under way" in command(copy, "verify", str(copy)).out
    assert "a finished run" in command(copy, "verify", str(copy)).out


@pytest.mark.parametrize(
    "name", ["run.json", "manifest.json", "yeonma.json", "settings.yaml", "metrics.jsonl"]
)
@pytest.mark.parametrize("where", ["", "checkpoint-2"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(copy: Path, name: str, where: str) -> None:
    path = copy / where / name
    if path.exists():
        path.unlink()
        os.mkfifo(path)
        done = command(copy, "verify", str(copy))
        assert done.status == (0 if path == copy / "manifest.json" else 1), done.out
        assert where in done.out and "Traceback" not in done.out + done.err


def test_a_manifest_of_names_that_no_disk_takes_is_reported(copy: Path) -> None:
    path = copy / "manifest.json"
    sums = json.loads(path.read_text())
    sums["sha256"] |= {"a" * 5000: "0" * 64, "a\0b": "0" * 64}
    path.write_text(json.dumps(sums))
    assert command(copy, "verify", str(copy)).status == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trained_on", None),
        ("trained_on", [1]),
        ("trained_on", {"data": "x", "examples": "many"}),
        ("tokenizer", [1]),
    ],
)
def test_a_description_of_other_types_is_reported(copy: Path, key: str, value: object) -> None:
    path = copy / "yeonma.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    sums = json.loads((copy / "manifest.json").read_text())
    sums["sha256"]["yeonma.json"] = file_hash(path)
    (copy / "manifest.json").write_text(json.dumps(sums))
    done = command(copy, "verify", str(copy))
    assert done.status == 1 and "yeonma.json" in done.out
