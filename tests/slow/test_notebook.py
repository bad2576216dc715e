"""Runs in a notebook, by a real kernel: what is shown, how mistakes look, and an interrupt that loses nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import runs
from tests.notebooks import Notebook, open_notebook
from tests.runs import articles, left_behind, model_folder, trained, write_jsonl

pytestmark = pytest.mark.slow

ROWS = articles(23)
SETTINGS = {**runs.SETTINGS, **runs.TWO_EPOCHS}
LAST_STEP = 10
CALL = "run = yeonma.sft(base_model='base', data_path='rows.jsonl', output_dir={output!r}, **SETTINGS)\nrun"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """A notebook beside a tiny model and a file of rows."""
    folder = tmp_path_factory.mktemp("notebook")
    model_folder(folder / "base")
    write_jsonl(folder / "rows.jsonl", ROWS)
    with open_notebook(folder) as opened:
        opened.run(f"import yeonma\nSETTINGS = {SETTINGS!r}\nROWS = {ROWS!r}")
        yield opened


def test_a_run_is_one_block_with_the_curve_and_its_value(notebook: Notebook) -> None:
    cell = notebook.run(CALL.format(output="shown"))
    assert cell.error is None
    block, value = cell.data
    assert f'<progress value="{LAST_STEP}" max="{LAST_STEP}"' in block["text/html"]
    assert "data:image/svg+xml;base64," in block["text/html"]
    step, *evaluations = block["text/plain"].splitlines()
    assert re.fullmatch(rf"step {LAST_STEP}/{LAST_STEP}  epoch .*  loss \d.*  lr .* left  .*", step)
    assert all("  validation loss " in line for line in evaluations)
    assert [int(line.split()[1].partition("/")[0]) for line in evaluations] == [0, 3, 6, 9, LAST_STEP]
    assert f"finished after {LAST_STEP} steps" in value["text/plain"]
    assert "data:image/svg+xml;base64," in value["text/html"]
    assert "tokenised 23 rows" in cell.out
    assert "step " not in cell.out and "\x1b" not in cell.out


def test_a_run_in_a_notebook_equals_that_of_the_command_line(notebook: Notebook, tmp_path: Path) -> None:
    folder = folder_of(notebook)
    notebook.run(CALL.format(output="equal"))
    done = trained(tmp_path / "equal", folder / "base", folder / "rows.jsonl", **SETTINGS)
    names = ("adapter_model.safetensors", "metrics.jsonl", "trained_rows.jsonl", "loss.svg")
    ours, theirs = left_behind(folder / "equal"), left_behind(done.folder)
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_a_mistake_shows_its_message_alone_with_keywords(notebook: Notebook) -> None:
    cell = notebook.run("yeonma.sft(base_model='base', data_path=ROWS, output_dir='x', learning_rat=1)")
    assert cell.error == (
        "UserError",
        ['yeonma: learning_rat: unknown setting; did you mean "learning_rate"?'],
    )
    cell = notebook.run("yeonma.sft(base_model='base', data_path=[{'a': 1}], output_dir='x', max_rows=1)")
    assert cell.error is not None
    name, lines = cell.error
    assert name == "UserError" and not any("Traceback" in line or "--" in line for line in lines)
    assert any("with columns (" in line for line in lines)


def test_values_show_as_html(notebook: Notebook) -> None:
    shown = notebook.run("yeonma.inspect(base_model='base', data_path=ROWS, template=SETTINGS['template'])")
    assert shown.error is None and "<iframe sandbox=" in shown.data[0]["text/html"]
    assert "── forecast ──" in shown.data[0]["text/plain"]
    assert len(shown.data) == 1  # and nothing is shown on the way
    shown = notebook.run(
        "yeonma.compare(models=['base'], data_path=ROWS[:2], template=SETTINGS['template'],"
        " max_new_tokens=2, output_dir='report')"
    )
    assert shown.error is None and shown.data[0]["text/html"].startswith("<pre")


STOPS_AT_STEP_6 = """
from yeonma.train import loop
train_step, calls = loop.train_step, []
def counted(*arguments):
    calls.append(1)
    if len(calls) == 6:
        open('reached', 'w').close()
        open('interrupted').close()
    return train_step(*arguments)
loop.train_step = counted
"""
"""The sixth step waits until the notebook was interrupted: both files are pipes."""


def test_an_interrupted_cell_runs_again_to_the_same_bytes(notebook: Notebook) -> None:
    folder = folder_of(notebook)
    notebook.run(CALL.format(output="whole"))
    notebook.run(STOPS_AT_STEP_6)
    for name in ("reached", "interrupted"):
        os.mkfifo(folder / name)

    def interrupt() -> None:
        (folder / "reached").open().close()
        notebook.interrupt()
        (folder / "interrupted").open("w").close()

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(interrupt)
        stopped = notebook.run(CALL.format(output="stopped"))
        done.result()
    assert stopped.error is not None and stopped.error[0] == "Stopped"
    (line,) = stopped.error[1]
    assert line.startswith(
        f"yeonma: stopped by Ctrl-C after step 6 of {LAST_STEP}; stopped/checkpoint-6 is saved"
    )
    assert (folder / "stopped" / "checkpoint-6").is_dir()
    assert not (folder / "stopped" / "adapter_model.safetensors").exists()
    handlers = notebook.run("import signal; signal.getsignal(signal.SIGINT) is signal.default_int_handler")
    assert handlers.data[0]["text/plain"] == "True"

    again = notebook.run(CALL.format(output="stopped"))
    assert again.error is None
    assert f"continuing after step 6 of {LAST_STEP}" in again.out
    assert notebook.run("len(calls)").data[0]["text/plain"] == str(6 + LAST_STEP - 6)
    ours, theirs = (left_behind(folder / name) for name in ("stopped", "whole"))
    for name in ("adapter_model.safetensors", "metrics.jsonl", "trained_rows.jsonl", "loss.svg"):
        assert ours[name] == theirs[name], name


def folder_of(notebook: Notebook) -> Path:
    return Path(notebook.client.resources["metadata"]["path"])


def test_several_processes_print_lines_and_their_failure_is_a_message(notebook: Notebook) -> None:
    call = "yeonma.sft(base_model='base', data_path=ROWS, output_dir='two', nproc=2, seed={}, **SETTINGS)"
    done = notebook.run(call.format(1))
    assert done.error is None and f"finished after {LAST_STEP} steps" in done.data[0]["text/plain"]
    assert f"step {LAST_STEP}/{LAST_STEP}  epoch 2.00  loss " in done.out and "\x1b" not in done.out
    failed = notebook.run(call.format(2))
    assert failed.error == (
        "RunFailed",
        ["yeonma: training ended with status 2; the reason is printed above"],
    )
    assert "seed was 1 and is now 2" in failed.err
