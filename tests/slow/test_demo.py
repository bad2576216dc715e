"""The demos on a tiny model: what they leave behind, what they print, and that their command is the one they ran."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.runs import Done, command, model_folder
from yeonma import load
from yeonma.commands.demo import SAMPLES
from yeonma.config.parse import read_config, to_yaml
from yeonma.config.settings import PREFERENCE_DEFAULTS, TRAINING, RunConfig

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
    return re.findall(r"^  (wanted|before|after ) +(.*)$", printed, re.MULTILINE)


def test_the_demo_ends_well_and_leaves_an_adapter_that_answers(done: Done) -> None:
    assert (done.status, done.err) == (0, "")
    assert [line["step"] for line in done.steps] == [1, 2, 3, 4]
    assert isinstance(load(done.folder).generate({"document": "a storm."}, max_new_tokens=4), str)


def test_it_shows_three_held_out_rows_wanted_before_and_after(done: Done) -> None:
    rows = (SAMPLES / "news_en_validation.jsonl").read_text(encoding="utf-8").splitlines()
    shown = answers(done.out)
    assert [name.strip() for name, _ in shown] == ["wanted", "before", "after"] * 3
    assert [text for name, text in shown if name == "wanted"] == [
        json.loads(row)["title"] for row in rows[:3]
    ]


def test_it_ends_with_the_losses_of_the_run_and_what_to_try(done: Done) -> None:
    first, last = done.looks[0]["loss"], min(look["loss"] for look in done.looks)
    assert f"20 held-out rows: {first:.3f} before, {last:.3f} after" in done.out
    for named in ("README.md", "loss.svg", "metrics.jsonl", "adapter_model.safetensors", "settings.yaml"):
        assert named in done.out
        assert (done.folder / named).is_file()
    for verb in ("generate", "chat"):
        assert f"yeonma {verb} {done.folder}" in done.out


def test_it_ends_with_a_report_of_base_and_adapter_on_all_held_out_rows(done: Done) -> None:
    report = json.loads((done.folder / "report" / "report.json").read_text("utf-8"))
    assert len(report["rows"]) == 20
    loss = next(metric["values"] for metric in report["metrics"] if metric["key"] == "loss")
    assert loss == pytest.approx([done.looks[0]["loss"], min(look["loss"] for look in done.looks)], abs=1e-4)
    page = done.folder / "report" / "report.html"
    assert page.is_file() and f"Open {page} in a browser" in done.out
    text = done.out.split("4. All held-out rows")[1].split("does the same:\n\n")[1].split("\n\n")[0]
    words = shlex.split(text.replace("\\\n", " "))
    again = command(done.folder, *words[words.index("compare") :])
    assert again.status == 0
    assert json.loads((done.folder / "report" / "report.json").read_text("utf-8"))["rows"] == report["rows"]


def test_the_command_it_prints_is_the_run_that_it_made(done: Done) -> None:
    text = done.out.split("This command does the same:\n\n")[1].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(text)
    printed = read_config(RunConfig, words[words.index("sft") + 1 :], verb="sft", groups=TRAINING).config
    assert to_yaml(printed) == (done.folder / "settings.yaml").read_text(encoding="utf-8")


def test_a_second_demo_shows_the_finished_run_again(done: Done, base: Path) -> None:
    weights = done.weight_bytes
    again = demo(done.folder, base)
    assert again.status == 0
    assert "holds this run, finished" in again.out
    assert answers(again.out) == answers(done.out)
    assert done.weight_bytes == weights


def test_a_demo_of_other_settings_replaces_the_first_only_when_told(base: Path, tmp_path: Path) -> None:
    assert demo(tmp_path / "out", base, "--max_steps", "1").status == 0
    refused = demo(tmp_path / "out", base, "--max_steps", "2")
    assert refused.status == 2
    assert "--overwrite true" in refused.err
    replaced = demo(tmp_path / "out", base, "--max_steps", "2", "--overwrite", "true")
    assert replaced.status == 0
    assert len(replaced.steps) == 2


# With pairs


@pytest.fixture(scope="module")
def from_pairs(tmp_path_factory: pytest.TempPathFactory) -> Done:
    base = model_folder(tmp_path_factory.mktemp("base") / "tiny")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 1024  # one token a character: the long titles need more than 512
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    output = tmp_path_factory.mktemp("demo-dpo") / "out"
    words = ("--model_dir", str(base), "--quick", "true", "--output_dir", str(output))
    return command(output, "demo-dpo", *words)


def test_the_demo_of_pairs_shows_three_answers_and_the_reward_accuracy(from_pairs: Done) -> None:
    assert (from_pairs.status, from_pairs.err) == (0, "")
    assert [line["step"] for line in from_pairs.steps] == [1, 2, 3, 4]
    rows = (SAMPLES / "pairs_en_validation.jsonl").read_text(encoding="utf-8").splitlines()
    shown = answers(from_pairs.out)
    assert [name.strip() for name, _ in shown] == ["wanted", "before", "after"] * 3
    assert [text for name, text in shown if name == "wanted"] == [
        json.loads(row)["chosen"] for row in rows[:3]
    ]
    best = min(from_pairs.looks, key=lambda look: look["loss"])
    assert f"in {round(20 * best['reward_accuracy'])} of the 20 held-out pairs" in from_pairs.out
    assert f"yeonma generate {from_pairs.folder}" in from_pairs.out


def test_the_command_of_the_demo_of_pairs_is_the_run_that_it_made(from_pairs: Done) -> None:
    text = from_pairs.out.split("This command does the same:\n\n")[1].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(text)
    reading = read_config(
        RunConfig, words[words.index("dpo") + 1 :], verb="dpo", defaults=PREFERENCE_DEFAULTS
    )
    assert to_yaml(reading.config) == (from_pairs.folder / "settings.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["", "_validation"])
def test_the_pairs_are_the_sample_articles_with_their_titles_and_long_winded_ones(name: str) -> None:
    def read(file: str) -> list[dict[str, str]]:
        text = (SAMPLES / f"{file}{name}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    rows, pairs = read("news_en"), read("pairs_en")
    assert [(pair["document"], pair["chosen"]) for pair in pairs] == [
        (row["document"], row["title"]) for row in rows
    ]
    longer = [len(pair["rejected"].split()) / len(pair["chosen"].split()) for pair in pairs]
    assert min(longer) > 1.5
    assert all(15 <= len(pair["rejected"].split()) <= 30 for pair in pairs)
    assert len({pair["rejected"] for pair in pairs}) == len(pairs)
