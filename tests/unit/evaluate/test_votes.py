"""Blind votes in the report's page, in headless Chromium: keys, order, storage, the saved pairs, what they train."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import Folders, tiny_adapter
from tests.chromium import Browser, browser, contrast, in_chromium
from tests.comparing import compare
from tests.hostile import TEXT, check_page
from tests.runs import command, write_jsonl
from tests.tokenizers import byte_level
from yeonma.evaluate.report_page import page
from yeonma.shown import many_lines

TEMPLATE = "{desk} desk. Write a title.\n\n{document}\n\nTitle: {title}"
KEYS = {"0": 48, "1": 49, "2": 50}
ROWS = [
    {
        "desk": "Town",
        "body": f"Article {number}.{' ' + TEXT if number == 1 else ''}",
        "title": f"Title {number}",
    }
    for number in range(8)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The run's data had the article in a column of another name."""
    root = tmp_path_factory.mktemp("votes")
    return tiny_adapter(root, byte_level(), template=TEMPLATE, columns={"document": "body"})


@pytest.fixture(scope="module")
def report(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("report")
    data = write_jsonl(root / "rows.jsonl", ROWS)
    done = compare(root / "report", folders.base, folders.adapter, data_path=data)
    assert done.status == 0, done.err
    made: dict[str, Any] = json.loads((root / "report" / "report.json").read_text("utf-8"))
    for row, number in zip(made["rows"], range(8), strict=True):
        texts = [f"base {number}\u202e</script><b>{TEXT}", f"tuned {number}"]
        texts = {5: ["same", "same"], 6: [" \n", "tuned 6"]}.get(number, texts)
        for answer, text in zip(row["answers"], texts, strict=True):
            answer["text"] = text
    return made


@pytest.fixture
def vote_file(report: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "report.html"
    file.write_text(page(report), "utf-8")
    check_page(file.read_text("utf-8"), "report.html")
    return file


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def vote_tab(tab: Browser, vote_file: Path) -> Iterator[Browser]:
    tab.look(1100, 900)
    tab.open(vote_file)
    tab.run("localStorage.clear()")
    tab.open(vote_file)
    yield tab
    assert tab.problems == []


def shown(tab: Browser, element: str) -> str:
    text: str = tab.run(f"document.getElementById('{element}').innerText")
    return text


def press(tab: Browser, key: str) -> None:
    tab.key(key, KEYS[key], key)


def key_for(tab: Browser, beginning: str) -> str:
    """The key of the answer that begins so."""
    return next(side for side in "12" if shown(tab, f"ballot-{side}").lstrip().startswith(beginning))


def saved(tab: Browser, folder: Path) -> list[dict[str, Any]]:
    """What the button saves."""
    folder.mkdir()
    tab.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    tab.click("#vote-save")
    file = folder / "pairs.jsonl"
    for _ in range(200):
        if file.exists() and file.stat().st_size:
            return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
        time.sleep(0.05)
    raise AssertionError("nothing was saved")


@in_chromium
def test_votes_by_keys_become_pairs_that_dpo_trains_on(
    vote_tab: Browser, folders: Folders, report: dict[str, Any], tmp_path: Path
) -> None:
    vote_tab.click("#vote-start")
    assert vote_tab.run("document.activeElement.id") == "ballot-heading"
    rows: list[int] = []
    for _ in range(7):  # the row with equal answers is not asked
        row = int(shown(vote_tab, "ballot-heading").split()[1].rstrip(":"))
        rows.append(row)
        assert vote_tab.run("getComputedStyle(document.getElementById('rows')).display") == "block"
        assert vote_tab.run("document.getElementById('rows').offsetParent") is None  # names are out of sight
        assert "OUT" not in shown(vote_tab, "ballot")
        press(vote_tab, "0" if row == 1 else key_for(vote_tab, "tuned"))
    assert sorted(rows) == [1, 2, 3, 4, 5, 7, 8] and rows != sorted(rows)
    assert vote_tab.run("document.activeElement.id") == "tally-heading"
    tally = shown(vote_tab, "tally")
    for line in ("base: 0 wins", "OUT: 6 wins", "ties: 1", "win rate of OUT: 92.9%", "pairs to save: 5"):
        assert line in tally
    assert "rows with equal answers, which are not asked: 1" in tally
    assert "votes that make no pair, because an answer is empty or the row has tools: 1" in tally

    pairs = saved(vote_tab, tmp_path / "saved")
    assert len(pairs) == 5
    by_chosen = {pair["chosen"]: pair for pair in pairs}
    for number in (1, 2, 3, 4, 7):
        pair = by_chosen[f"tuned {number}"]
        assert set(pair) == {"desk", "document", "chosen", "rejected"}
        assert pair["document"] == ROWS[number]["body"]
        assert pair["rejected"] == f"base {number}\u202e</script><b>{TEXT}"  # as generated, not as shown

    data = tmp_path / "saved" / "pairs.jsonl"
    words = ["--base_model", str(folders.base), "--adapter", str(folders.adapter), "--data_path", str(data)]
    seen = command(tmp_path, "inspect", "--objective", "dpo", *words, "--json", "true", "--rows", "all")
    assert seen.status == 0, seen.err
    lines = [json.loads(line) for line in seen.out.splitlines()]
    prompts = {line["prompt"] for line in lines if "prompt" in line}
    wanted = {row["prompt"] for row in report["rows"] if row["row"] in (2, 3, 4, 5, 8)}
    assert prompts == wanted
    output = tmp_path / "preferred"
    settings = ["--output_dir", str(output), "--batch_size", "2", "--card_rows", "0", "--cutoff_len", "2048"]
    done = command(output, "dpo", *words, *settings)
    assert done.status == 0, done.err
    assert json.loads((output / "run.json").read_text())["identity"]


@in_chromium
def test_votes_survive_a_reload_and_can_be_changed_and_deleted(vote_tab: Browser, vote_file: Path) -> None:
    vote_tab.click("#vote-start")
    first = [shown(vote_tab, f"ballot-{side}") for side in "12"]
    press(vote_tab, "1")
    press(vote_tab, "2")
    vote_tab.key("Backspace", 8)
    assert vote_tab.run("document.getElementById('vote-2').getAttribute('aria-pressed')") == "true"
    vote_tab.key("Backspace", 8)
    assert [shown(vote_tab, f"ballot-{side}") for side in "12"] == first  # the same sides again
    vote_tab.click("#vote-0")
    vote_tab.key("Escape", 27)
    assert "ties: 1" in shown(vote_tab, "tally")
    vote_tab.open(vote_file)
    assert shown(vote_tab, "vote-start") == "Go on voting (2 of 7 rows done)"
    vote_tab.click("#vote-start")
    assert ": 3 of 7" in shown(vote_tab, "ballot-heading")
    vote_tab.key("Escape", 27)
    vote_tab.run("window.confirm = () => true")
    vote_tab.click("#vote-forget")
    assert shown(vote_tab, "vote-start") == "Start voting"
    assert vote_tab.run("document.getElementById('tally').hidden")


@in_chromium
def test_sides_are_random_by_row_and_texts_are_texts(vote_tab: Browser, report: dict[str, Any]) -> None:
    lefts = vote_tab.run("report.rows.map(leftOf)")
    assert {*lefts} == {0, 1}
    many = vote_tab.run("Array.from({length: 2000}, (_, at) => leftOf({row: at})).reduce((a, b) => a + b)")
    assert 900 < many < 1100
    vote_tab.click("#vote-start")
    for _ in range(7):
        row = int(shown(vote_tab, "ballot-heading").split()[1].rstrip(":"))
        texts = vote_tab.run("[1, 2].map(side => document.getElementById(`ballot-${side}`).textContent)")
        answers = [many_lines(answer["text"]) for answer in report["rows"][row - 1]["answers"]]
        assert sorted(texts) == sorted(answers)
        press(vote_tab, "0")
    assert vote_tab.run("document.querySelectorAll('#votes b, #votes img, #votes script').length") == 0


@in_chromium
def test_storage_that_is_refused_stops_no_vote(tab: Browser, vote_file: Path) -> None:
    text = vote_file.read_text("utf-8").replace(
        '"use strict";', '"use strict"; delete window.localStorage;', 1
    )
    refused = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no'); }});"
    file = vote_file.with_name("refused.html")
    file.write_text(text.replace("delete window.localStorage;", refused), "utf-8")
    tab.look(1100, 900)
    tab.open(file)
    tab.click("#vote-start")
    press(tab, "1")
    tab.key("Escape", 27)
    assert "rows without a vote: 6" in shown(tab, "tally")
    assert tab.problems == []


@in_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_ballot_fits_a_phone_and_has_labels(tab: Browser, vote_file: Path, dark: bool) -> None:
    tab.look(390, 740, dark=dark)
    tab.open(vote_file)
    tab.run("localStorage.clear()")
    tab.click("#vote-start")
    assert tab.run("document.documentElement.scrollWidth") == 390
    colours = tab.run(
        "[...document.querySelectorAll('#votes h3, #votes h4, #votes button, #votes p, #votes pre')]"
        ".map(e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor])"
    )
    assert min(contrast(*pair) for pair in colours) >= 4.5
    unlabelled = tab.run(
        "[...document.querySelectorAll('#votes button, #votes [role]')]"
        ".filter(e => !e.textContent.trim() && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby')"
        " && e.getAttribute('role') !== 'status').length"
    )
    assert unlabelled == 0
    tab.key("Escape", 27)
    assert tab.run("document.documentElement.scrollWidth") == 390
    assert tab.problems == []


@in_chromium
def test_two_of_three_models_are_chosen_and_votes_are_kept_apart(
    tab: Browser, report: dict[str, Any], tmp_path: Path
) -> None:
    third = {**report["models"][1], "name": "third"}
    rows = [
        {**row, "answers": [*row["answers"], {**row["answers"][1], "text": f"third {row['row']}"}]}
        for row in report["rows"]
    ]
    metrics = [
        {**metric, "values": [*metric["values"], None], "intervals": [*metric["intervals"], None]}
        for metric in report["metrics"]
    ]
    content = {
        **report,
        "models": [*report["models"], third],
        "rows": rows,
        "metrics": metrics,
        "labels": None,
    }
    file = tmp_path / "three.html"
    file.write_text(page(content), "utf-8")
    tab.look(1100, 900)
    tab.open(file)
    tab.run("localStorage.clear()")
    tab.click("#vote-start")
    press(tab, "1")
    tab.key("Escape", 27)
    tab.run("document.getElementById('vote-second').value = '2'")
    tab.run("document.getElementById('vote-second').dispatchEvent(new Event('change'))")
    assert shown(tab, "vote-start") == "Start voting"
    tab.click("#vote-start")
    press(tab, key_for(tab, "third"))
    tab.key("Escape", 27)
    assert "third: 1 wins" in shown(tab, "tally") and "OUT" not in shown(tab, "tally")
    assert tab.problems == []


# Without a browser


def test_one_model_alone_has_no_votes(report: dict[str, Any]) -> None:
    rows = [{**row, "answers": row["answers"][:1]} for row in report["rows"]]
    metrics = [
        {**metric, "values": metric["values"][:1], "intervals": metric["intervals"][:1], "differences": []}
        for metric in report["metrics"]
    ]
    alone = {**report, "models": report["models"][:1], "rows": rows, "metrics": metrics, "labels": None}
    assert 'id="votes"' not in page(alone)
