"""A judge of `yeonma compare` on a real server of ours, and a comparison that is killed among its verdicts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.adapters import tiny_adapter
from tests.comparing import ROWS, TEMPLATE, compare
from tests.judge_server import RuledJudge, judging, longer
from tests.runs import write_jsonl
from tests.served_runs import served_run
from tests.servers import ROOT, serving
from tests.tokenizers import byte_level

pytestmark = pytest.mark.slow


def test_killed_comparison_goes_on_without_asking_again(tmp_path: Path) -> None:
    folders = tiny_adapter(tmp_path, byte_level(), template=TEMPLATE)
    rows = [{**row, "document": f"{number}. {row['document']}"} for number, row in enumerate(ROWS * 4)]
    data, output = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "report"
    with judging(RuledJudge(longer, wait_seconds=0.3)) as judge:
        words = ["--models", str(folders.base), str(folders.adapter), "--data_path", str(data)]
        words += ["--output_dir", str(output), "--max_new_tokens", "12"]
        words += ["--judge", judge.url, "--judge_model", "judge", "--judge_requests", "2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "yeonma", "compare", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        records = output / "judge.jsonl"
        while not (records.exists() and records.read_bytes().count(b"\n") >= 6):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept, asked = records.read_bytes().count(b"\n"), len(judge.bodies)
        judge.wait_seconds = 0
        assert not (output / "report.json").exists()
        models = (folders.base, folders.adapter)
        settings = {"data_path": data, "judge": judge.url, "judge_model": "judge"}
        done = compare(output, *models, **settings)
        assert done.status == 0, done.err
        lines = [json.loads(line) for line in records.read_text("utf-8").splitlines()]
        assert len(judge.bodies) - asked == len(lines) - kept  # the trial is among the kept ones
        other = compare(tmp_path / "other", *models, **settings)
        assert other.status == 0, other.err
    resumed, whole = (
        json.loads((folder / "report.json").read_text("utf-8")) for folder in (output, tmp_path / "other")
    )
    assert resumed.pop("made") and whole.pop("made")
    assert resumed == whole


def test_tiny_model_as_a_judge_is_asked_in_json_and_its_verdicts_are_kept(tmp_path: Path) -> None:
    run = served_run(tmp_path)
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"document": f"{n} storm", "title": "storm"} for n in range(3)]
    )
    rubric = tmp_path / "short.txt"
    rubric.write_text("{question} a: {first} b: {second}")
    with serving(tmp_path / "errors", run) as server:
        settings = {"data_path": data, "judge": server.url, "judge_model": "run", "judge_tokens": 40}
        done = compare(tmp_path / "report", tmp_path / "base", run, rubric=rubric, **settings)
        assert done.status == 0, done.err
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    (pair,) = report["judge"]["pairs"]
    assert sum(pair["wins"]) + pair["ties"] + pair["equal"] + pair["unjudged"] == 3
    records = [
        json.loads(line) for line in (tmp_path / "report" / "judge.jsonl").read_text("utf-8").splitlines()
    ]
    assert records[0]["trial"] and len(records) == 1 + 2 * (3 - pair["equal"])
    assert all(record["finish"] in ("stop", "length") for record in records[1:])
