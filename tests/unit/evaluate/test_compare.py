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
from tests.runs import Done, articles, model_folder, trained, write_jsonl
from tests.tokenizers import byte_level, sentencepiece_bpe
from yeonma import load
from yeonma.evaluate import answers as compare_module
from yeonma.evaluate import metrics
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
    for folder in (folders.base, data.parent):  # what is passed on does not say where it lay
        assert str(folder) not in page + json.dumps(report)


def test_the_losses_are_those_of_training_on_the_same_rows(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    train, held_out = (write_jsonl(tmp_path / f"{at}.jsonl", articles(8, seed=at)) for at in (0, 1))
    run = trained(tmp_path / "OUT", base, train, val_data_path=held_out, keep_best=False)
    report = report_of(compare(tmp_path / "report", base, run.folder, data_path=held_out))
    looks = [look["loss"] for look in run.looks]
    assert values(report)["loss"] == pytest.approx([looks[0], looks[-1]], abs=1e-5)
    assert values(report)["perplexity"] == pytest.approx([math.exp(looks[0]), math.exp(looks[-1])], rel=1e-4)
    assert report["models"][1]["curve"]["validation"] == [[look["step"], look["loss"]] for look in run.looks]
    assert report["models"][0]["curve"] is None


def test_one_model_alone_is_an_evaluation(folders: Folders, data: Path, tmp_path: Path) -> None:
    done = compare(tmp_path / "report", folders.base, data_path=data, template=TEMPLATE, rows=3)
    report = report_of(done)
    assert len(report["rows"]) == 3
    assert all(len(metric["values"]) == 1 and not metric["differences"] for metric in report["metrics"])
    assert "loss" in done.out and "change" not in done.out


def test_models_of_other_bases_are_each_asked_in_their_own_way(
    folders: Folders, data: Path, tmp_path: Path
) -> None:
    other = tiny_adapter(tmp_path, sentencepiece_bpe(), template="{document}\n=>\n{title}", columns=None)
    report = report_of(compare(tmp_path / "report", folders.adapter, other.adapter, data_path=data))
    row = report["rows"][0]
    assert "Write a title" in row["prompt"]
    assert "=>" in row["answers"][1]["prompt"]
    assert any("different bases" in note for note in report["notes"])


def test_a_base_is_in_memory_once_for_all_its_adapters(
    folders: Folders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    second = shutil.copytree(folders.adapter, tmp_path / "second")
    loads: list[str] = []
    load_base = loading.load_base

    def counted(source: Any, *more: Any) -> Any:
        loads.append(source.name)
        return load_base(source, *more)

    monkeypatch.setattr(loading, "load_base", counted)
    done = compare(tmp_path / "report", folders.adapter, folders.base, second, data_path=data)
    report = report_of(done)
    assert loads == [str(folders.base)]
    assert (
        texts(report, 0) == texts(report, 2) != texts(report, 1)
    )  # the base is whole again after an adapter
    difference = next(
        test
        for test in next(metric for metric in report["metrics"] if metric["key"] == "loss")["differences"]
        if test["models"] == [0, 2]
    )
    assert (difference["difference"], difference["p"], difference["p_corrected"]) == (0.0, 1.0, 1.0)


def test_what_is_answered_is_not_asked_again_and_no_model_is_loaded_for_it(
    folders: Folders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report"
    first = report_of(compare(output, folders.base, folders.adapter, data_path=data))
    text = (output / "answers.jsonl").read_text("utf-8")
    # as a kill leaves it: the last line torn, some lines gone
    remaining = text.splitlines()[:-3]
    (output / "answers.jsonl").write_text("\n".join(remaining) + '\n{"key": "to', "utf-8")
    again = report_of(compare(output, folders.base, folders.adapter, data_path=data))
    assert again["rows"] == first["rows"]
    assert [{**metric, "made": ""} for metric in again["metrics"]] == [
        {**metric, "made": ""} for metric in first["metrics"]
    ]
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("loaded"))
    assert report_of(compare(output, folders.base, folders.adapter, data_path=data))["rows"] == first["rows"]


def test_other_settings_weights_or_rows_are_asked_anew(folders: Folders, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    compare(output, folders.base, data_path=data, template=TEMPLATE)
    count = len(lines(output))
    compare(
        output, folders.base, data_path=data, template=TEMPLATE, seed=7
    )  # greedy: the seed is nothing to it
    assert len(lines(output)) == count
    compare(output, folders.base, data_path=data, template=TEMPLATE, temperature=0.9)
    assert len(lines(output)) == count + len(ROWS)  # the answers, not the losses
    compare(output, folders.base, data_path=data, template=TEMPLATE, temperature=0.9, seed=7)
    assert len(lines(output)) == count + 2 * len(ROWS)
    other = tiny_base(tmp_path / "other", byte_level(), seed=5)
    compare(output, other, data_path=data, template=TEMPLATE)
    assert len(lines(output)) == 2 * count + 2 * len(ROWS)


def test_ctrl_c_keeps_what_was_answered_and_the_same_command_goes_on(
    folders: Folders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = report_of(compare(tmp_path / "whole", folders.base, folders.adapter, data_path=data))
    output = tmp_path / "report"
    add = compare_module.AnswerCache.add

    def pressed(self: Any, key: str, record: Any) -> None:
        add(self, key, record)
        if len(self.records) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare_module.AnswerCache, "add", pressed)
    done = compare(output, folders.base, folders.adapter, data_path=data)
    assert done.status == 130
    assert "Run the same command again to continue" in done.err
    assert len(lines(output)) == 3
    assert not (output / "report.json").exists()
    monkeypatch.undo()
    done = compare(output, folders.base, folders.adapter, data_path=data)
    assert report_of(done)["rows"] == uninterrupted["rows"]
    assert "3 of 5 rows were answered before" in done.err


def test_sigint_ends_the_process_with_130(folders: Folders, tmp_path: Path) -> None:
    rows = [{"document": f"{number} " + "word " * 30, "title": "t"} for number in range(400)]
    data, output = write_jsonl(tmp_path / "many.jsonl", rows), tmp_path / "report"
    words = [
        "compare",
        "--models",
        str(folders.adapter),
        "--data_path",
        str(data),
        "--output_dir",
        str(output),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "yeonma", *words, "--max_new_tokens", "200", "--batch_size", "4"],
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


def test_rows_without_wanted_answers_are_answered_all_the_same(folders: Folders, tmp_path: Path) -> None:
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"document": row["document"]} for row in ROWS])
    report = report_of(compare(tmp_path / "report", folders.adapter, data_path=bare))
    assert set(values(report)) == {"tokens", "characters", "repetition", "unended"}
    assert any("No row has a reference answer" in note for note in report["notes"])
    some = write_jsonl(tmp_path / "some.jsonl", [*ROWS[:3], {"document": "x"}])
    report = report_of(compare(tmp_path / "report", folders.adapter, data_path=some))
    assert report["rows"][3]["answers"][0]["scores"]["loss"] is None
    assert report["rows"][3]["answers"][0]["scores"]["chrf"] is None
    assert any("1 of 4 rows have no reference answer" in note for note in report["notes"])


def test_the_wanted_answer_of_preference_data_is_the_chosen_one(folders: Folders, tmp_path: Path) -> None:
    pairs = [{"document": row["document"], "chosen": row["title"], "rejected": "no"} for row in ROWS]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    plain = report_of(
        compare(tmp_path / "a", folders.adapter, data_path=write_jsonl(tmp_path / "b.jsonl", ROWS))
    )
    report = report_of(compare(tmp_path / "report", folders.adapter, data_path=data))
    assert [row["wanted"] for row in report["rows"]] == [row["title"] for row in ROWS]
    assert values(report) == values(plain)


def test_a_row_too_long_for_its_answer_has_no_loss_and_is_told(tmp_path: Path) -> None:
    small = tiny_adapter(tmp_path, byte_level(), template=TEMPLATE, cutoff_len=90)
    rows = [*ROWS[:1], {"document": "short", "title": "long " * 40}]
    report = report_of(
        compare(tmp_path / "report", small.adapter, data_path=write_jsonl(tmp_path / "r.jsonl", rows))
    )
    assert report["models"][0]["left_out"] == 1
    assert report["rows"][1]["answers"][0]["scores"]["loss"] is None
    assert report["rows"][0]["answers"][0]["scores"]["loss"] is not None
    assert any("1 rows are over cutoff_len 90" in note for note in report["notes"])


def test_answers_that_ran_out_of_tokens_are_flagged(folders: Folders, data: Path, tmp_path: Path) -> None:
    report = report_of(compare(tmp_path / "report", folders.adapter, data_path=data, max_new_tokens=3))
    ended = [row["answers"][0]["ended"] for row in report["rows"]]
    assert values(report)["unended"] == [100 * ended.count(False) / len(ended)]
    assert False in ended


def test_without_sacrebleu_the_command_says_how_to_get_it_and_goes_on(
    folders: Folders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    done = compare(tmp_path / "report", folders.adapter, data_path=data)
    assert {"bleu", "chrf"}.isdisjoint(values(report_of(done)))
    assert "pip install sacrebleu" in done.err
    assert any("pip install sacrebleu" in note for note in report_of(done)["notes"])


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


def test_a_chat_template_is_compared_by_its_last_answers(tmp_path: Path) -> None:
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


def test_kept_answers_survive_any_torn_or_foreign_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    record = {"text": "a\u2028b", "token_ids": [1], "ended": True}
    with open_answer_cache(path) as cache:
        cache.add("one", record)
        cache.add("two", {"nll": 1.5, "trained_tokens": 2})
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(draw.randint(0, 3)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(bytes(damaged[: draw.randint(0, len(damaged))]) + b'{"key": "three", "text": 1}\n[')
        with open_answer_cache(path) as cache:
            assert "three" not in cache.records
            cache.add("four", record)
        with open_answer_cache(path) as cache:
            assert cache.records["four"] == record
