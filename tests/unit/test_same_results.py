"""scripts/same_results: changed results fail the comparison; changed times and wording do not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from scripts.same_results.__main__ import main
from scripts.same_results.comparison import Difference, Recording, compare_files, compare_within
from scripts.same_results.formats import FIELDS, FORMATS, RENAMED, fields_of, format_of
from scripts.same_results.recording import FORMAT, copy_package
from scripts.same_results.runs import RUNS

METRICS = {"step": 1, "loss": 0.5, "reward_margin": 0.4, "reward_accuracy": 1.0, "seconds": 0.1}
CARD = """---
base_model: models/llama
library_name: peft
---

# sft

| validation | loss |
| --- | --- |
| before | 7.2183 |

### Row 1

with the adapter:

```text
an answer
```

```text
yeonma sft --config settings.yaml   # the settings below
```
"""

Compare = Callable[[str, Any, Any], list[Difference]]


def write(path: Path, content: Any) -> Path:
    """Tensors, text, or anything else as JSON; a list is JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, list):
        path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """The differences of two contents, recorded as a path."""

    def differences(path: str, before: Any, after: Any) -> list[Difference]:
        files = [write(tmp_path / name / path, content) for name, content in (("a", before), ("b", after))]
        return compare_files(path, files[0], files[1])

    return differences


def summary(differences: list[Difference]) -> list[tuple[str, str]]:
    return [(difference.kind, difference.where) for difference in differences]


def test_changed_tensor_is_reported_by_name(compare: Compare) -> None:
    before = {"lora_A": np.ones((2, 3), np.float32), "lora_B": np.zeros(4, np.float32)}
    path = "work/sft/adapter_model.safetensors"
    assert compare(path, before, dict(reversed(before.items()))) == []
    slightly_changed = {**before, "lora_A": np.nextafter(before["lora_A"], 2, dtype=np.float32)}
    assert summary(compare(path, before, slightly_changed)) == [("differs", "lora_A")]
    assert summary(compare(path, before, {**before, "lora_B": np.zeros((2, 2), np.float32)})) == [
        ("differs", "lora_B")
    ]
    assert summary(compare(path, before, {**before, "lora_B": np.zeros(4, np.int32)})) == [
        ("differs", "lora_B")
    ]
    assert summary(compare(path, before, {"lora_A": before["lora_A"]})) == [("differs", "lora_B")]


def test_changed_token_id_is_reported_by_position(compare: Compare) -> None:
    line = {"row": 1, "token_ids": [1, 5, 7], "trained": [0, 0, 1], "left_out": None}
    path = "console/inspect/01-inspect.out.jsonl"
    assert compare(path, [line], [line]) == []
    assert summary(compare(path, [line, line], [line, {**line, "token_ids": [1, 6, 7]}])) == [
        ("differs", "[1].token_ids[1]")
    ]
    assert summary(compare(path, [line], [{**line, "trained": [0, 0, 1, 1]}])) == [
        ("differs", "[0].trained[3]")
    ]
    assert summary(compare(path, [line], [line, line])) == [("differs", "[1]")]
    text = '{"row": 1, "prompt": "a\u2028b"}\n'
    assert compare(path, text, text) == []


def test_changed_loss_differs_but_changed_time_does_not(compare: Compare) -> None:
    path = "work/sft/metrics.jsonl"
    assert compare(path, [METRICS], [{**METRICS, "seconds": 9.9}]) == []
    assert summary(compare(path, [METRICS], [{**METRICS, "loss": math.nextafter(0.5, 1)}])) == [
        ("differs", "[0].loss")
    ]
    nan = {**METRICS, "loss": math.nan}
    assert compare(path, [nan], [nan]) == []
    assert summary(compare(path, [METRICS], [nan])) == [("differs", "[0].loss")]
    assert summary(compare(path, [METRICS], [{**METRICS, "step": 1.0}])) == [("differs", "[0].step")]


def test_rounding_is_accepted_only_where_the_format_allows_it(compare: Compare) -> None:
    rounded = {**METRICS, "loss": 0.5 + 1e-6, "reward_margin": 0.4 + 3e-6}
    (difference,) = compare("work/dpo/metrics.jsonl", [METRICS], [rounded])
    assert (difference.kind, difference.where) == ("rounding", "[0].reward_margin")
    assert difference.size == pytest.approx(3e-6 / 1.4)
    assert summary(compare("work/dpo/metrics.jsonl", [METRICS], [{**rounded, "loss": 0.501}])) == [
        ("differs", "[0].loss"),
        ("rounding", "[0].reward_margin"),
    ]
    assert summary(compare("work/dpo-dora/metrics.jsonl", [METRICS], [rounded])) == [
        ("differs", "[0].loss"),
        ("differs", "[0].reward_margin"),
    ]
    before, after = {"A": np.zeros(3, np.float32)}, {"A": np.array([0, 0, 2e-6], np.float32)}
    assert summary(compare("work/dpo/adapter_model.safetensors", before, after)) == [("rounding", "A")]
    after["A"] += 1e-3
    assert summary(compare("work/dpo/adapter_model.safetensors", before, after)) == [("differs", "A")]
    after["A"][1] = np.nan
    assert summary(compare("work/dpo/adapter_model.safetensors", before, after)) == [("differs", "A")]


def test_reward_accuracy_is_ignored_only_where_rewards_are_tied(compare: Compare) -> None:
    path, tied = "work/dpo/metrics.jsonl", {**METRICS, "reward_margin": 1e-7}
    assert compare(path, [tied], [{**tied, "reward_accuracy": 0.25}]) == []
    assert summary(compare(path, [METRICS], [{**METRICS, "reward_accuracy": 0.25}])) == [
        ("differs", "[0].reward_accuracy")
    ]


def test_changed_wording_is_reported_separately_from_differences(compare: Compare) -> None:
    path = "console/sft/01-sft.out.words"
    (difference,) = compare(path, "one\nstep 1/15  406 MB\n", "one\nafter step 2\n")
    assert (difference.kind, difference.before, difference.after) == (
        "words",
        "step #/#  # MB",
        "after step #",
    )
    assert compare(path, "step 1/15  2.7e-03\n", "step 2/15  2.4e-03\n") == []
    before = {"findings": [{"check": "files", "outcome": "well", "about": "14 files", "problems": []}]}
    after = {"findings": [{"check": "files", "outcome": "well", "about": "14 are whole", "problems": []}]}
    path = "console/verify/01-verify.out.jsonl"
    assert summary(compare(path, [before], [after])) == [("words", "[0].findings[0].about")]
    after["findings"][0]["outcome"] = "differs"
    assert ("differs", "[0].findings[0].outcome") in summary(compare(path, [before], [after]))


def test_reason_may_be_reworded_but_not_removed(compare: Compare) -> None:
    path, line = "console/inspect/01-inspect.out.jsonl", {"row": 1, "left_out": "too long"}
    assert summary(compare(path, [line], [{**line, "left_out": "over the limit"}])) == [
        ("words", "[0].left_out")
    ]
    assert summary(compare(path, [line], [{**line, "left_out": None}])) == [("differs", "[0].left_out")]
    path = "console/mistakes/01-sft.err.words"
    assert summary(compare(path, "yeonma: no\n", "yeonma: never\n")) == [("words", "words")]
    assert ("differs", "is there") in summary(compare(path, "yeonma: no\n", ""))


def test_model_card_is_compared_by_answers_numbers_and_metadata(compare: Compare) -> None:
    path = "work/sft/README.md"
    assert compare(path, CARD, CARD.replace("# sft", "# Adapter").replace("the settings", "settings")) == []
    assert summary(compare(path, CARD, CARD.replace("an answer", "another"))) == [
        ("differs", "answers[0][1]")
    ]
    assert summary(compare(path, CARD, CARD.replace("7.2183", "7.2184"))) == [("differs", "tables[2][0]")]
    assert summary(compare(path, CARD, CARD.replace("peft", "qwen"))) == [
        ("differs", "metadata.library_name")
    ]


def test_html_report_is_compared_by_its_data(compare: Compare) -> None:
    page = '<h1>Report</h1><script type="application/json" id="data">{"rows":[{"text":"a"}]}</script>'
    assert compare("work/compare/report.html", page, page.replace("Report", "Rows")) == []
    assert summary(compare("work/compare/report.html", page, page.replace('"a"', '"b"'))) == [
        ("differs", "[0].rows[0].text")
    ]


def test_answers_are_compared_by_row_regardless_of_order(compare: Compare) -> None:
    lines = [{"model": "sft", "row": row, "text": f"answer {row}"} for row in (1, 2)]
    path = "work/compare/answers.jsonl"
    assert compare(path, lines, lines[::-1]) == []
    assert summary(compare(path, lines, [lines[0], {**lines[1], "text": ""}])) == [
        ("differs", "sft, row 2, answer.text")
    ]


def test_manifest_checksums_must_match_its_files(tmp_path: Path) -> None:
    for side in ("a", "b"):
        file = write(tmp_path / side / "work/sft/settings.yaml", f"output_dir: {side}\n")
        write(file.parent / "manifest.json", {"sha256": {file.name: sha256(file.read_bytes()).hexdigest()}})
    path = "work/sft/manifest.json"
    assert compare_files(path, tmp_path / "a" / path, tmp_path / "b" / path) == []
    write(tmp_path / "b" / "work/sft/settings.yaml", "output_dir: another\n")
    (difference,) = compare_files(path, tmp_path / "a" / path, tmp_path / "b" / path)
    assert (difference.kind, difference.where) == ("differs", "settings.yaml")


def test_changed_exit_status_and_answer_are_shown(compare: Compare) -> None:
    (difference,) = compare("console/mistakes/01-sft.status", "2\n", "1\n")
    assert (difference.kind, difference.before, difference.after) == ("differs", '"2\\n"', '"1\\n"')
    (difference,) = compare("console/chat/01-chat.out.txt", "x" * 99 + "a\n", "x" * 99 + "b\n")
    assert difference.before.endswith('xa\\n"') and difference.after.endswith('xb\\n"')


def test_a_file_that_cannot_be_read_differs(compare: Compare) -> None:
    (difference,) = compare("work/sft/run.json", {"finished": True}, '{"finished": ')
    assert (difference.kind, difference.where) == ("differs", "")
    assert "read_json" in difference.after


def recording(root: Path, runs: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str] = {}) -> Path:
    """A recording of these files by run, as `record` would leave it."""
    for run, files in runs.items():
        for name, content in files.items():
            write(root / "work" / run / name, content)
        write(root / "console" / run / "01-sft.status", "0\n")
    info = {"commit": "c0ffee", "checkout": "/somewhere", "machine": {"torch": "2.13"}}
    info |= {"format": FORMAT, "work": str(root / "work"), "runs": list(runs), "failures": dict(failures)}
    write(root / "recording.json", info)
    return root


def run_compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["compare", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_recordings_are_compared_independently_of_their_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_recording(name: str, **changes: Any) -> Path:
        root = tmp_path / name
        sft = {"metrics.jsonl": [METRICS], "yeonma.json": {"base": str(root / "work" / "models")}}
        return recording(root, {"sft": {**sft, **changes}})

    before = make_recording("before")
    status, output = run_compare(capsys, before, make_recording("after"))
    assert (status, output.splitlines()[-1]) == (0, "the results are the same")
    status, output = run_compare(
        capsys, before, make_recording("changed", **{"metrics.jsonl": [{**METRICS, "loss": 0.25}]})
    )
    assert (status, output.splitlines()[-1]) == (1, "results differ: sft")
    assert "  differs  work/sft/metrics.jsonl [0].loss\n      - 0.5\n      + 0.25\n" in output
    png, svg = (
        make_recording(
            name, **{name: "content", "manifest.json": {"sha256": {name: sha256(b"content").hexdigest()}}}
        )
        for name in ("loss.png", "loss.svg")
    )
    # a renamed file is no difference
    assert run_compare(capsys, png, svg)[0] == run_compare(capsys, svg, png)[0] == 0
    status, output = run_compare(capsys, before, make_recording("more", **{"loss.svg": "<svg/>"}))
    assert status == 1
    assert "  differs  work/sft/loss.svg\n      - missing\n      + there\n" in output


def test_failed_or_missing_run_fails_the_comparison_unless_deselected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {"sft": {"metrics.jsonl": [METRICS]}, "dpo": {"metrics.jsonl": [METRICS]}}
    before = recording(tmp_path / "before", runs)
    failed = recording(tmp_path / "failed", runs, {"dpo": "dpo: exit status 1, not 0"})
    assert run_compare(capsys, before, failed)[0] == 1
    assert run_compare(capsys, before, failed, "--only", "sft")[0] == 0
    fewer = recording(tmp_path / "fewer", {"sft": runs["sft"]})
    status, output = run_compare(capsys, before, fewer)
    assert status == 1
    assert "was not recorded" in output
    assert run_compare(capsys, fewer, fewer)[0] == 0
    assert run_compare(capsys, fewer, fewer, "--only", "dpo")[0] == 1
    with pytest.raises(SystemExit, match="no run sftt"):
        main(["compare", str(before), str(before), "--only", "sftt"])


def test_a_resumed_run_must_equal_the_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, loss: float) -> dict[str, Any]:
        return {"metrics.jsonl": [{**METRICS, "loss": loss}], "settings.yaml": f"output_dir: {name}\n"}

    equal_runs = {name: run(name, 0.5) for name in ("sft-dropout", "sft-killed")}
    root = recording(tmp_path / "same", equal_runs)
    assert compare_within("killed", Recording.read(root), "sft-dropout", "sft-killed").is_same
    differing = recording(tmp_path / "other", {**equal_runs, "sft-killed": run("sft-killed", 0.25)})
    status, output = run_compare(capsys, differing, differing)
    assert (status, output.splitlines()[-1]) == (
        1,
        "results differ: sft-killed = sft-dropout, before, sft-killed = sft-dropout, after",
    )


def test_folder_without_a_valid_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no whole recording"):
        Recording.read(tmp_path)
    write(recording(tmp_path / "old", {}) / "recording.json", {"format": 0})
    with pytest.raises(SystemExit, match="another version"):
        Recording.read(tmp_path / "old")


def test_package_of_a_checkout_is_copied_and_other_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "checkout" / "yeonma" / "__main__.py", "print()\n")
    write(tmp_path / "checkout" / "yeonma" / "__pycache__" / "old.pyc", "")
    origin = copy_package(str(tmp_path / "checkout"), tmp_path / "package")
    assert origin["checkout"] == str(tmp_path / "checkout")
    copied = [path.name for path in (tmp_path / "package").rglob("*") if path.is_file()]
    assert copied == ["__main__.py"]
    with pytest.raises(SystemExit, match="no commit of this repository"):
        copy_package(str(tmp_path), tmp_path / "other")


def test_runs_are_listed_after_the_runs_they_need() -> None:
    for number, run in enumerate(RUNS):
        assert {need.name for need in run.needs} <= {before.name for before in RUNS[:number]}
        assert run.act.__doc__


def test_every_rule_has_a_reason_and_specific_rules_come_first() -> None:
    assert all(rule.why for rule in (*FORMATS, *FIELDS, *RENAMED))
    assert format_of("work/dpo/checkpoint-2/state.json").tolerance > 0
    assert format_of("work/dpo-others/kto/checkpoint-2/state.json").tolerance == 0
    assert format_of("anything/else").pattern == "*"
    assert fields_of("work/sft/adapter_model.safetensors") == ()
