"""Runs on rows that are given in Python: equal to runs on a file of them, and resumed by the same call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import yeonma
from tests import runs
from tests.runs import Done, articles, command, left_behind, model_folder, trained, write_jsonl
from yeonma.train import loop

ROOT = Path(__file__).resolve().parents[3]
ROWS = articles(23)
SETTINGS: dict[str, Any] = {**runs.SETTINGS, **runs.TWO_EPOCHS}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


def sft(output: Path, base: Path, data: Any, **settings: Any) -> Path:
    return Path(yeonma.sft(base_model=base, data_path=data, output_dir=output, **{**SETTINGS, **settings}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The folder of an uninterrupted run on a list of dicts."""
    return sft(tmp_path_factory.mktemp("whole") / "out", base, ROWS)


def test_a_run_on_a_list_equals_the_run_on_a_file_of_its_rows(
    whole: Path, base: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    by_file = trained(tmp_path / "out", base, data, **SETTINGS)
    ours, theirs = (left_behind(folder) for folder in (whole, by_file.folder))
    same = [
        name
        for name in ours
        if name.endswith((".safetensors", "trained_rows.jsonl")) or name == "metrics.jsonl"
    ]
    assert len(same) > 5
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


def test_the_records_of_the_run_say_what_was_given(whole: Path) -> None:
    settings = (whole / "settings.yaml").read_text()
    (line,) = (line for line in settings.splitlines() if line.startswith("data_path:"))
    assert line.startswith("data_path: <list of 23 rows, SHA-256 ")
    label = line.removeprefix("data_path: ")
    assert json.loads((whole / "yeonma.json").read_text())["trained_on"]["data"] == label
    card = (whole / "README.md").read_text()
    assert f"of `{label}`" in card
    assert 'yeonma.sft(config="settings.yaml", data_path=...)   # in Python, with the same data' in card


@pytest.mark.parametrize("kind", [list, pd.DataFrame])
def test_the_same_call_resumes_to_the_same_bytes(
    whole: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    train_step, calls = loop.train_step, [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return train_step(*arguments)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sft(tmp_path / "out", base, kind(ROWS))
    assert (tmp_path / "out" / "checkpoint-4").exists()
    resumed = sft(tmp_path / "out", base, kind(ROWS))
    assert calls[0] == 6 + 6  # steps 5 to 10
    ours, theirs = left_behind(resumed), left_behind(whole)
    if kind is list:
        assert ours == theirs
    else:  # the same rows; only what they were differs
        assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
        assert b"<pandas DataFrame of 23 rows" in ours["settings.yaml"]


def test_other_rows_do_not_continue_the_run(whole: Path, base: Path) -> None:
    with pytest.raises(yeonma.UserError, match="the content of data_path has changed"):
        sft(whole, base, [*ROWS[:-1], {"document": "another", "title": "one"}])


def test_the_command_line_says_that_the_data_was_given_in_python(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    done = command(out, "sft", "--config", str(whole / "settings.yaml"), "--output_dir", str(out))
    assert done.status == 2
    assert "this data was given in Python, and lies in no file; call yeonma.sft" in done.err
    assert not out.exists()


def test_settings_of_a_run_and_its_rows_make_the_same_run_again(whole: Path, tmp_path: Path) -> None:
    folder = yeonma.sft(config=str(whole / "settings.yaml"), data_path=ROWS, output_dir=tmp_path / "out")  # type: ignore[call-arg]
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_faulty_row_has_its_number_and_writes_nothing(base: Path, tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[16]["title"] = None  # type: ignore[assignment]
    with pytest.raises(yeonma.UserError) as caught:
        sft(tmp_path / "out", base, rows)
    problem, way_out = map(str, caught.value.problems)
    assert problem == 'data_path row 17: field "title" is null; the template uses document, title'
    assert way_out == 'bad_rows: bad rows stop the run; bad_rows="skip" leaves them out and counts them'
    assert not (tmp_path / "out").exists()
    skipped = sft(tmp_path / "out", base, rows, bad_rows="skip", num_epochs=1, val_set_size=0)
    details = json.loads((skipped / "yeonma.json").read_text())["trained_on"]
    assert (details["examples"], details["bad_rows"]) == (22, {'field "title" is null': 1})


def test_pairs_and_validation_rows_may_be_given_in_python(base: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{row['document']}", "chosen": row["title"], "rejected": "x"} for row in ROWS]
    folder = yeonma.dpo(
        base_model=base,
        data_path=pd.DataFrame(pairs[:16]),
        val_data_path=pairs[16:],
        output_dir=tmp_path / "out",
        max_steps=1,
        card_rows=0,
    )
    settings = (folder / "settings.yaml").read_text()
    assert "\ndata_path: <pandas DataFrame of 16 rows, SHA-256 " in f"\n{settings}"
    assert "\nval_data_path: <list of 7 rows, SHA-256 " in settings
    assert "data_path=..., val_data_path=...)" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_read_the_rows_of_the_call(base: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "lora_dropout": 0.0}
    one = sft(tmp_path / "one", base, ROWS, lora_dropout=0.0)
    call = {"base_model": str(base), "output_dir": str(tmp_path / "two"), **settings, "nproc": 2}
    script = tmp_path / "call.py"
    script.write_text(f"import yeonma\nyeonma.sft(data_path={ROWS!r}, **{call!r})\n")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (0, "")
    losses = [Done(0, folder, "", "").losses for folder in (one, tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    rows, theirs = ((folder / "trained_rows.jsonl").read_bytes() for folder in (one, tmp_path / "two"))
    assert rows == theirs
    assert "data_path: <list of 23 rows, SHA-256 " in (tmp_path / "two" / "settings.yaml").read_text()
