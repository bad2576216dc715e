"""The demos on a tiny model: their files, their output, and that a printed command has the settings of its run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.runs import Done, command, model_folder
from yeonma import load
from yeonma.config.parse import read_config, to_yaml
from yeonma.config.settings import DEFAULTS, GROUPS, TRAINING, RunConfig
from yeonma.data.bundled_samples import FOLDER as SAMPLES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return demo(tmp_path_factory.mktemp("demo") / "out", base)


def demo(output: Path, base: Path, *more: str) -> Done:
    words = ("demo", "--model_dir", str(base), "--quick", "true", "--output_dir", str(output), *more)
    return command(output, *words)


def answers(printed: str) -> list[tuple[str, str]]:
    return re.findall(r"^  (reference|before|after) +(.*)$", printed, re.MULTILINE)


def test_demo_succeeds_and_its_adapter_generates_text(done: Done) -> None:
    assert (done.status, done.err) == (0, "")
    assert [line["step"] for line in done.steps] == [1, 2, 3, 4]
    assert isinstance(load(done.folder).generate({"document": "a storm."}, max_new_tokens=4), str)


def test_demo_prints_reference_and_answers_before_and_after_for_three_rows(done: Done) -> None:
    rows = (SAMPLES / "news_en_validation.jsonl").read_text(encoding="utf-8").splitlines()
    shown = answers(done.out)
    assert [name for name, _ in shown] == ["reference", "before", "after"] * 3
    assert [text for name, text in shown if name == "reference"] == [
        json.loads(row)["title"] for row in rows[:3]
    ]


def test_the_korean_demo_trains_on_korean_titles(base: Path, tmp_path: Path) -> None:
    done = demo(tmp_path / "out", base, "--sample", "ko")
    assert (done.status, done.err) == (0, "")
    rows = (SAMPLES / "news_ko_validation.jsonl").read_text(encoding="utf-8").splitlines()
    assert [text for name, text in answers(done.out) if name == "reference"] == [
        json.loads(row)["title"] for row in rows[:3]
    ]
    assert "갈매기섬의 오래된 등대가" in done.out


def test_preference_pairs_have_no_korean_sample(base: Path, tmp_path: Path) -> None:
    words = ("demo-dpo", "--model_dir", str(base), "--sample", "ko", "--output_dir", str(tmp_path / "out"))
    done = command(tmp_path / "out", *words)
    assert done.status == 2
    assert "--sample: the sample of preference pairs is English; leave it out, or run yeonma demo" in done.err


def test_demo_prints_losses_written_files_and_next_commands(done: Done) -> None:
    first, last = done.looks[0]["loss"], min(evaluation["loss"] for evaluation in done.looks)
    assert f"20 held-out rows: {first:.3f} before, {last:.3f} after" in done.out
    for file_name in ("README.md", "loss.svg", "metrics.jsonl", "adapter_model.safetensors", "settings.yaml"):
        assert file_name in done.out
        assert (done.folder / file_name).is_file()
    for verb in ("generate", "chat"):
        assert f"yeonma {verb} {done.folder}" in done.out


def test_demo_writes_a_report_that_its_printed_command_reproduces(done: Done) -> None:
    report = json.loads((done.folder / "report" / "report.json").read_text("utf-8"))
    assert len(report["rows"]) == 20
    loss = next(metric["values"] for metric in report["metrics"] if metric["key"] == "loss")
    assert loss == pytest.approx(
        [done.looks[0]["loss"], min(evaluation["loss"] for evaluation in done.looks)], abs=1e-4
    )
    page = done.folder / "report" / "report.html"
    assert page.is_file() and f"Open {page} in a browser" in done.out
    printed = (
        done.out.split("4. Comparison on all held-out rows")[1]
        .split("Equivalent command:\n\n")[1]
        .split("\n\n")[0]
    )
    words = shlex.split(printed.replace("\\\n", " "))
    again = command(done.folder, *words[words.index("compare") :])
    assert again.status == 0
    assert json.loads((done.folder / "report" / "report.json").read_text("utf-8"))["rows"] == report["rows"]


def test_printed_sft_command_has_the_settings_of_the_run(done: Done) -> None:
    text = done.out.split("Equivalent command:\n\n")[1].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(text)
    printed = read_config(RunConfig, words[words.index("sft") + 1 :], verb="sft", groups=TRAINING).config
    assert to_yaml(printed) == (done.folder / "settings.yaml").read_text(encoding="utf-8")


def test_second_demo_shows_the_finished_run_without_training(done: Done, base: Path) -> None:
    weights = done.weight_bytes
    again = demo(done.folder, base)
    assert again.status == 0
    assert "holds this run, which is finished" in again.out
    assert answers(again.out) == answers(done.out)
    assert done.weight_bytes == weights


def test_demo_with_other_settings_needs_overwrite_to_replace_a_run(base: Path, tmp_path: Path) -> None:
    assert demo(tmp_path / "out", base, "--max_steps", "1").status == 0
    refused = demo(tmp_path / "out", base, "--max_steps", "2")
    assert refused.status == 2
    assert "--overwrite true" in refused.err
    replaced = demo(tmp_path / "out", base, "--max_steps", "2", "--overwrite", "true")
    assert replaced.status == 0
    assert len(replaced.steps) == 2


# The DPO demo


@pytest.fixture(scope="module")
def dpo_demo(tmp_path_factory: pytest.TempPathFactory) -> Done:
    base = model_folder(tmp_path_factory.mktemp("base") / "tiny")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 1024  # one token a character: the long titles need more than 512
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    output = tmp_path_factory.mktemp("demo-dpo") / "out"
    words = ("--model_dir", str(base), "--quick", "true", "--output_dir", str(output))
    return command(output, "demo-dpo", *words)


def test_dpo_demo_prints_answers_for_three_rows_and_the_reward_accuracy(dpo_demo: Done) -> None:
    assert (dpo_demo.status, dpo_demo.err) == (0, "")
    assert [line["step"] for line in dpo_demo.steps] == [1, 2, 3, 4]
    rows = (SAMPLES / "pairs_en_validation.jsonl").read_text(encoding="utf-8").splitlines()
    shown = answers(dpo_demo.out)
    assert [name for name, _ in shown] == ["reference", "before", "after"] * 3
    assert [text for name, text in shown if name == "reference"] == [
        json.loads(row)["chosen"] for row in rows[:3]
    ]
    best = min(dpo_demo.looks, key=lambda evaluation: evaluation["loss"])
    assert f"in {round(20 * best['reward_accuracy'])} of the 20 held-out pairs" in dpo_demo.out
    assert f"yeonma generate {dpo_demo.folder}" in dpo_demo.out


def test_printed_dpo_command_has_the_settings_of_the_run(dpo_demo: Done) -> None:
    text = dpo_demo.out.split("Equivalent command:\n\n")[1].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(text)
    reading = read_config(
        RunConfig, words[words.index("dpo") + 1 :], verb="dpo", groups=GROUPS["dpo"], defaults=DEFAULTS["dpo"]
    )
    assert to_yaml(reading.config) == (dpo_demo.folder / "settings.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["", "_validation"])
def test_sample_pairs_reject_longer_titles_of_the_sample_articles(name: str) -> None:
    def read(file: str) -> list[dict[str, str]]:
        text = (SAMPLES / f"{file}{name}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    rows, pairs = read("news_en"), read("pairs_en")
    assert [(pair["document"], pair["chosen"]) for pair in pairs] == [
        (row["document"], row["title"]) for row in rows
    ]
    length_ratios = [len(pair["rejected"].split()) / len(pair["chosen"].split()) for pair in pairs]
    assert min(length_ratios) > 1.5
    assert all(15 <= len(pair["rejected"].split()) <= 30 for pair in pairs)
    assert len({pair["rejected"] for pair in pairs}) == len(pairs)
