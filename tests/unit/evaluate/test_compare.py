"""`yeonma compare` on the command line: answers, losses, cache and refusals."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import Folders, tiny_adapter, tiny_base
from tests.comparing import ROWS, TEMPLATE, compare
from tests.runs import Done, articles, command, model_folder, trained, write_jsonl
from tests.tokenizers import byte_level, sentencepiece_bpe
from yeonma import load
from yeonma.data import text_scores
from yeonma.evaluate import answers as compare_module
from yeonma.evaluate.answer_cache import open_answer_cache
from yeonma.model import load as loading


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return tiny_adapter(tmp_path_factory.mktemp("adapter"), byte_level(), template=TEMPLATE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "held_out.jsonl", ROWS)


def report_of(done: Done) -> dict[str, Any]:
    assert done.status == 0, done.err
    report: dict[str, Any] = json.loads((done.folder / "report.json").read_text("utf-8"))
    return report


def values(report: Mapping[str, Any]) -> dict[str, list[float]]:
    return {metric["key"]: metric["values"] for metric in report["metrics"]}


def texts(report: Mapping[str, Any], model: int) -> list[str]:
    return [row["answers"][model]["text"] for row in report["rows"]]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]


def test_the_answers_are_those_of_generate_with_and_without_the_adapter(
    folders: Folders, data: Path, tmp_path: Path
) -> None:
    report = report_of(compare(tmp_path / "report", folders.base, folders.adapter, data_path=data))
    loaded = load(folders.adapter)
    rows = [{"document": row["document"]} for row in ROWS]
    assert texts(report, 0) == replace(loaded, adapter_weights=False).generate(rows, max_new_tokens=12)
    assert texts(report, 1) == loaded.generate(rows, max_new_tokens=12)
    assert texts(report, 0) != texts(report, 1)
    assert [row["wanted"] for row in report["rows"]] == [row["title"] for row in ROWS]
    assert [model["name"] for model in report["models"]] == ["base", "OUT"]
    assert report["models"][0]["template"] == report["models"][1]["template"]
    assert ROWS[0]["document"] in report["rows"][0]["prompt"]
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    for folder in (folders.base, data.parent):  # the report contains no local paths
        assert str(folder) not in page + json.dumps(report)


def test_losses_equal_the_validation_losses_of_training(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    train, held_out = (write_jsonl(tmp_path / f"{seed}.jsonl", articles(8, seed=seed)) for seed in (0, 1))
    run = trained(tmp_path / "OUT", base, train, val_data_path=held_out, keep_best=False)
    report = report_of(compare(tmp_path / "report", base, run.folder, data_path=held_out))
    losses = [line["loss"] for line in run.looks]
    assert values(report)["loss"] == pytest.approx([losses[0], losses[-1]], abs=1e-5)
    assert values(report)["perplexity"] == pytest.approx(
        [math.exp(losses[0]), math.exp(losses[-1])], rel=1e-4
    )
    assert report["models"][1]["curve"]["validation"] == [[line["step"], line["loss"]] for line in run.looks]
    assert report["models"][0]["curve"] is None


def test_single_model_is_evaluated_without_differences(folders: Folders, data: Path, tmp_path: Path) -> None:
    done = compare(tmp_path / "report", folders.base, data_path=data, template=TEMPLATE, rows=3)
    report = report_of(done)
    assert len(report["rows"]) == 3
    assert all(len(metric["values"]) == 1 and not metric["differences"] for metric in report["metrics"])
    assert "loss" in done.out and "change" not in done.out


def test_models_of_different_bases_use_their_own_templates(
    folders: Folders, data: Path, tmp_path: Path
) -> None:
    other = tiny_adapter(tmp_path, sentencepiece_bpe(), template="{document}\n=>\n{title}", columns=None)
    report = report_of(compare(tmp_path / "report", folders.adapter, other.adapter, data_path=data))
    row = report["rows"][0]
    assert "Write a title" in row["prompt"]
    assert "=>" in row["answers"][1]["prompt"]
    assert any("different bases" in note for note in report["notes"])


def test_base_is_loaded_once_for_all_its_adapters(
    folders: Folders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    second = shutil.copytree(folders.adapter, tmp_path / "second")
    loaded: list[str] = []
    load_base = loading.load_base

    def recording_load(source: Any, *arguments: Any) -> Any:
        loaded.append(source.name)
        return load_base(source, *arguments)

    monkeypatch.setattr(loading, "load_base", recording_load)
    done = compare(tmp_path / "report", folders.adapter, folders.base, second, data_path=data)
    report = report_of(done)
    assert loaded == [str(folders.base)]
    # the base is restored after an adapter
    assert texts(report, 0) == texts(report, 2) != texts(report, 1)
    difference = next(
        test
        for test in next(metric for metric in report["metrics"] if metric["key"] == "loss")["differences"]
        if test["models"] == [0, 2]
    )
    assert (difference["difference"], difference["p"], difference["p_corrected"]) == (0.0, 1.0, 1.0)


def test_cached_answers_are_reused_without_loading_a_model(
    folders: Folders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report"
    first = report_of(compare(output, folders.base, folders.adapter, data_path=data))
    text = (output / "answers.jsonl").read_text("utf-8")
    # as after a kill: the last line is incomplete and some lines are missing
    remaining_lines = text.splitlines()[:-3]
    (output / "answers.jsonl").write_text("\n".join(remaining_lines) + '\n{"key": "to', "utf-8")
    resumed = report_of(compare(output, folders.base, folders.adapter, data_path=data))
    assert resumed["rows"] == first["rows"]
    assert [{**metric, "made": ""} for metric in resumed["metrics"]] == [
        {**metric, "made": ""} for metric in first["metrics"]
    ]
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("loaded"))
    assert report_of(compare(output, folders.base, folders.adapter, data_path=data))["rows"] == first["rows"]


def test_changed_settings_or_weights_are_answered_again(folders: Folders, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    compare(output, folders.base, data_path=data, template=TEMPLATE)
    count = len(lines(output))
    # with greedy decoding the seed has no effect
    compare(output, folders.base, data_path=data, template=TEMPLATE, seed=7)
    assert len(lines(output)) == count
    compare(output, folders.base, data_path=data, template=TEMPLATE, temperature=0.9)
    assert len(lines(output)) == count + len(ROWS)  # new answers, but no new losses
    compare(output, folders.base, data_path=data, template=TEMPLATE, temperature=0.9, seed=7)
    assert len(lines(output)) == count + 2 * len(ROWS)
    other = tiny_base(tmp_path / "other", byte_level(), seed=5)
    compare(output, other, data_path=data, template=TEMPLATE)
    assert len(lines(output)) == 2 * count + 2 * len(ROWS)


def test_ctrl_c_keeps_answers_and_the_same_command_continues(
    folders: Folders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = report_of(compare(tmp_path / "whole", folders.base, folders.adapter, data_path=data))
    output = tmp_path / "report"
    add = compare_module.AnswerCache.add

    def add_and_interrupt(self: Any, key: str, record: Any) -> None:
        add(self, key, record)
        if len(self.records) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare_module.AnswerCache, "add", add_and_interrupt)
    done = compare(output, folders.base, folders.adapter, data_path=data)
    assert done.status == 130
    assert "Run the same command again to continue" in done.err
    assert len(lines(output)) == 3
    assert not (output / "report.json").exists()
    monkeypatch.undo()
    done = compare(output, folders.base, folders.adapter, data_path=data)
    assert report_of(done)["rows"] == uninterrupted["rows"]
    assert "3 of 5 rows were answered before" in done.err


@pytest.mark.slow
def test_sigint_ends_the_process_with_130(folders: Folders, tmp_path: Path) -> None:
    rows = [{"document": f"{number} " + "word " * 30, "title": "t"} for number in range(400)]
    data, output = write_jsonl(tmp_path / "many.jsonl", rows), tmp_path / "report"
    arguments = [
        "compare",
        "--models",
        str(folders.adapter),
        "--data_path",
        str(data),
        "--output_dir",
        str(output),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "yeonma", *arguments, "--max_new_tokens", "24", "--batch_size", "4"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "answered" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130, rest
    assert "Run the same command again to continue" in rest and "Traceback" not in rest
    assert 1 <= len(lines(output)) < 400


def test_rows_without_reference_answers_are_still_answered(folders: Folders, tmp_path: Path) -> None:
    no_titles = write_jsonl(tmp_path / "bare.jsonl", [{"document": row["document"]} for row in ROWS])
    report = report_of(compare(tmp_path / "report", folders.adapter, data_path=no_titles))
    assert set(values(report)) == {"tokens", "characters", "repetition", "unended"}
    assert any("No row has a reference answer" in note for note in report["notes"])
    some_titles = write_jsonl(tmp_path / "some.jsonl", [*ROWS[:3], {"document": "x"}])
    report = report_of(compare(tmp_path / "report", folders.adapter, data_path=some_titles))
    assert report["rows"][3]["answers"][0]["scores"]["loss"] is None
    assert report["rows"][3]["answers"][0]["scores"]["chrf"] is None
    assert any("1 of 4 rows have no reference answer" in note for note in report["notes"])


def test_reference_answer_of_preference_data_is_the_chosen_one(folders: Folders, tmp_path: Path) -> None:
    pairs = [{"document": row["document"], "chosen": row["title"], "rejected": "no"} for row in ROWS]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    plain = report_of(
        compare(tmp_path / "a", folders.adapter, data_path=write_jsonl(tmp_path / "b.jsonl", ROWS))
    )
    report = report_of(compare(tmp_path / "report", folders.adapter, data_path=data))
    assert [row["wanted"] for row in report["rows"]] == [row["title"] for row in ROWS]
    assert values(report) == values(plain)


def test_values_within_columns_are_compared_like_columns(folders: Folders, tmp_path: Path) -> None:
    rows = [{"news": {"body": row["document"]}, "titles": [row["title"], "other"]} for row in ROWS]
    nested = write_jsonl(tmp_path / "nested.jsonl", rows)
    plain = write_jsonl(tmp_path / "plain.jsonl", ROWS)
    columns = {"document": "news.body", "answer": "titles[0]"}
    flat = report_of(compare(tmp_path / "a", folders.adapter, data_path=plain))
    report = report_of(compare(tmp_path / "b", folders.adapter, data_path=nested, columns=columns))
    assert values(report) == values(flat)
    trained_on_paths = tiny_adapter(tmp_path, byte_level(), template=TEMPLATE, columns=columns).adapter
    own = report_of(compare(tmp_path / "c", trained_on_paths, data_path=nested))
    assert [row["wanted"] for row in own["rows"]] == [row["title"] for row in ROWS]
    assert values(own) == values(flat)


def test_the_delimiter_is_followed_as_in_training(folders: Folders, tmp_path: Path) -> None:
    """A comma in the header hides that the columns are separated by semicolons."""
    lines_of_file = ["document;title;a,b", *(f"{row['document']};{row['title']};x" for row in ROWS)]
    separated = tmp_path / "rows.csv"
    separated.write_text("\n".join(lines_of_file), encoding="utf-8")
    report = report_of(compare(tmp_path / "report", folders.adapter, data_path=separated, delimiter=";"))
    assert [row["wanted"] for row in report["rows"]] == [row["title"] for row in ROWS]
    given = ("--data_path", str(separated), "--max_new_tokens", "1", "--limit", "2")
    assert command(tmp_path, "generate", str(folders.adapter), *given).status == 2
    done = command(tmp_path, "generate", str(folders.adapter), *given, "--delimiter", ";")
    assert done.status == 0, done.err
    answered = [json.loads(line)["reference"] for line in done.out.splitlines()]
    assert answered == [row["title"] for row in ROWS[:2]]


def test_row_over_cutoff_len_has_no_loss_and_is_reported(tmp_path: Path) -> None:
    small = tiny_adapter(tmp_path, byte_level(), template=TEMPLATE, cutoff_len=90)
    rows = [*ROWS[:1], {"document": "short", "title": "long " * 40}]
    report = report_of(
        compare(tmp_path / "report", small.adapter, data_path=write_jsonl(tmp_path / "r.jsonl", rows))
    )
    assert report["models"][0]["left_out"] == 1
    assert report["rows"][1]["answers"][0]["scores"]["loss"] is None
    assert report["rows"][0]["answers"][0]["scores"]["loss"] is not None
    assert any("1 row is over cutoff_len 90 and has no loss" in note for note in report["notes"])


def test_answers_that_ran_out_of_tokens_are_flagged(folders: Folders, data: Path, tmp_path: Path) -> None:
    report = report_of(compare(tmp_path / "report", folders.adapter, data_path=data, max_new_tokens=3))
    ended = [row["answers"][0]["ended"] for row in report["rows"]]
    assert values(report)["unended"] == [100 * ended.count(False) / len(ended)]
    assert False in ended


def test_missing_sacrebleu_is_reported_and_its_metrics_are_omitted(
    folders: Folders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_scores, "find_spec", lambda name: None)
    done = compare(tmp_path / "report", folders.adapter, data_path=data)
    assert {"bleu", "chrf"}.isdisjoint(values(report_of(done)))
    assert 'pip install "sacrebleu==2.6.0"' in done.err
    assert any('pip install "sacrebleu==2.6.0"' in note for note in report_of(done)["notes"])


def test_the_table_on_the_terminal_has_every_metric_and_the_difference(
    folders: Folders, data: Path, tmp_path: Path
) -> None:
    done = compare(tmp_path / "report", folders.base, folders.adapter, data_path=data)
    report = report_of(done)
    for metric in report["metrics"]:
        assert f" {metric['name']}" in done.out
    loss = next(metric for metric in report["metrics"] if metric["key"] == "loss")
    assert f"{loss['values'][1]:.3f}"[:5] in done.out
    assert "p=" in done.out or "p<" in done.out
    assert f"Open {tmp_path / 'report' / 'report.html'}" in done.out


def test_chat_rows_are_compared_by_their_last_answers(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    folders = tiny_adapter(tmp_path, tokenizer, template="chat")
    turns = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Apple."}]
    data = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}, {"messages": turns[:1]}])
    report = report_of(compare(tmp_path / "report", folders.base, folders.adapter, data_path=data))
    assert [row["wanted"] for row in report["rows"]] == ["Apple.", None]
    assert values(report)["loss"][0] is not None


def test_answer_cache_survives_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    record = {"text": "a\u2028b", "token_ids": [1], "ended": True}
    with open_answer_cache(path) as cache:
        cache.add("one", record)
        cache.add("two", {"nll": 1.5, "trained_tokens": 2})
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(rng.randint(0, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(bytes(damaged[: rng.randint(0, len(damaged))]) + b'{"key": "three", "text": 1}\n[')
        with open_answer_cache(path) as cache:
            assert "three" not in cache.records
            cache.add("four", record)
        with open_answer_cache(path) as cache:
            assert cache.records["four"] == record
