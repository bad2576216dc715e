"""`yeonma studio` in headless Chromium: a run that a terminal started is seen, stopped and resumed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chromium import Browser, browser, contrast, in_chromium
from tests.runs import SETTINGS, TEMPLATE, arguments, articles, model_folder, write_jsonl
from yeonma.run_folder.lock import is_locked

pytestmark = [pytest.mark.slow, in_chromium]
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 180
STATES = {"en": ("running", "stopped before its end"), "ko": ("실행 중", "끝나기 전에 멈춤")}


def until(what: Callable[[], object], about: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < end, about
        time.sleep(0.1)


def environment(cache: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "YEONMA_API_KEY"}
    return {**own, "YEONMA_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def studio(root: Path, lang: str) -> Iterator[str]:
    """The address with its key. Ctrl-C must end it with status 0."""
    words = ["studio", "--root", str(root), "--port", "0", "--lang", lang]
    with (root / f"studio-{time.monotonic()}.err").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "yeonma", *words],
            cwd=root,
            env=environment(root / "cache"),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdout is not None
            address = re.search(r"http://\S+", process.stdout.readline())
            assert address is not None
            yield address[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_SECONDS) == 0
            errors.seek(0)
            assert "Traceback" not in errors.read()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def check_layout(tab: Browser) -> None:
    """Nothing is wider than the window, and text can be read, in light and dark."""
    for width in (390, 1280):
        for dark in (False, True):
            tab.look(width, 900, dark=dark)
            assert tab.run("document.scrollingElement.scrollWidth") <= width
            colours = tab.run(
                "[...document.querySelectorAll('p, h1, h2, a, button, dt, dd, label, figcaption, .state')].map("
                "(e) => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor, e.outerHTML])"
            )
            for text, paper, element in colours:
                assert contrast(text, paper) >= 4.5, (dark, element[:200])
    unnamed = tab.run(
        "[...document.querySelectorAll('input:not([type=hidden]), select')]"
        ".filter((e) => !e.labels.length && !e.ariaLabel).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("lang", ["en", "ko"])
def test_a_run_of_a_terminal_is_seen_stopped_and_resumed(tmp_path: Path, lang: str) -> None:
    model_folder(tmp_path / "base")
    write_jsonl(tmp_path / "rows.jsonl", articles(200))
    (tmp_path / "title.txt").write_text(TEMPLATE)
    wanted = {**SETTINGS, "num_epochs": 400, "val_set_size": 5, "eval_steps": 20, "save_steps": 100_000}
    paths = {"base_model": "base", "data_path": "rows.jsonl", "output_dir": "runs/titles"}
    run = subprocess.Popen(
        [sys.executable, "-m", "yeonma", "sft", *arguments({**wanted, **paths})],
        cwd=tmp_path,
        env=environment(tmp_path / "cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = tmp_path / "runs" / "titles"
    running, stopped = STATES[lang]
    try:
        with browser(tmp_path / "profile") as tab:
            with studio(tmp_path, lang) as address:
                tab.server = address.partition("/?")[0]
                tab.look(1280, 900)
                until(lambda: (folder / "metrics.jsonl").exists(), "the run has no steps")
                tab.open(address)
                assert tab.run("location.search") == ""  # the key has gone from the address
                assert tab.run("document.cookie") == ""
                check_layout(tab)
                tab.look(1280, 900)
                tab.click('a[href^="/run/"]')
                until(
                    lambda: tab.run("document.querySelector('#state .running')?.textContent") == running,
                    "state",
                )
                page = tab.run("location.pathname")
                curve = "document.querySelector('#charts polyline')?.getAttribute('points')"
                until(lambda: tab.run(curve), "no curve")
                before = tab.run(curve)
                until(lambda: tab.run(curve) != before, "the curve does not move")
                check_layout(tab)
                for _ in range(30):  # by keyboard
                    tab.key("Tab", 9)
                    if tab.run("document.activeElement.id") == "stop":
                        break
                assert tab.run("document.activeElement.id") == "stop"
                tab.key("Enter", 13, "\r")
                until(
                    lambda: tab.run("document.querySelector('#state .stopped')?.textContent") == stopped,
                    "no stop",
                )
                assert run.wait(PATIENCE_SECONDS) == 143
                assert tab.problems == []
            steps = len((folder / "metrics.jsonl").read_text().splitlines())
            with studio(tmp_path, lang) as address:  # closed, and opened again
                tab.server = address.partition("/?")[0]
                tab.open(address)
                tab.open(tab.server + page)
                tab.click("#resume")
                until(lambda: tab.run("document.querySelector('#state .running') !== null"), "not resumed")
                until(
                    lambda: len((folder / "metrics.jsonl").read_text().splitlines()) > steps,
                    "no further steps",
                )
                assert tab.problems == []
            assert is_locked(folder)  # the studio has ended, and the run goes on
            with studio(tmp_path, lang) as address:
                tab.server = address.partition("/?")[0]
                tab.open(address)
                tab.open(tab.server + page)
                tab.click("#stop")
                until(lambda: tab.run("document.querySelector('#state .stopped') !== null"), "not stopped")
                tab.open(f"{tab.server}/data?data_path=rows.jsonl")
                assert tab.run("document.querySelectorAll('dd pre').length") > 0
                check_layout(tab)
                tab.open(f"{tab.server}/tokens?data_path=rows.jsonl&template=title.txt&base_model=base")
                until(lambda: tab.run("document.querySelectorAll('pre .answer').length > 0"), "no rows")
                check_layout(tab)
                tab.look(1280, 900)
                tab.click("#borders")
                assert tab.run("document.body.classList.contains('tokens')")
                assert tab.problems == []
            assert not is_locked(folder)
    finally:
        run.kill()
        run.wait()
        from yeonma.run_folder.lock import lock_holder

        holder = lock_holder(folder)
        if holder is not None and holder.is_here_with(folder):
            os.kill(holder.process, signal.SIGKILL)
