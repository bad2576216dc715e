"""The page of `yeonma compare` in headless Chromium: it shows, sorts, filters, searches, and runs none of the data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import tiny_adapter
from tests.chromium import Browser, browser, contrast, in_chromium, luminance
from tests.runs import command, write_jsonl
from tests.tokenizers import byte_level
from yeonma.evaluate.report_page import embedded, page

HOSTILE = [
    "</script><script>window.ran = 1</script>",
    '<img src=x onerror="window.ran = 2">',
    "\u2028window.ran = 3\u2029//",
    "<!--<script>",
    '"><svg onload="window.ran = 4">',
    "{{constructor}} &lt;b&gt; &amp;",
]
WORDS = "ferry boat bees roof council library river tram"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a base and its adapter on 70 rows, more than are drawn at once; the first are hostile."""
    root = tmp_path_factory.mktemp("page")
    folders = tiny_adapter(root, byte_level(), template="Write a title.\n\n{document}\n\nTitle: {title}")
    rows = [{"document": text, "title": text} for text in HOSTILE]
    words = WORDS.split()
    for number in range(70 - len(rows)):
        title = " ".join(words[number % 8 :][: 1 + number % 4])
        rows.append({"document": f"Article {number} of the {title}.", "title": title})
    output = root / "report"
    models = ["--models", str(folders.base), str(folders.adapter)]
    data = write_jsonl(root / "rows.jsonl", rows)
    done = command(
        output,
        "compare",
        *models,
        "--data_path",
        str(data),
        "--output_dir",
        str(output),
        "--max_new_tokens",
        "8",
    )
    assert done.status == 0, done.err
    return output


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def tab(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(tab: Browser, folder: Path) -> Iterator[Browser]:
    """The page as somebody finds it; whatever is done with it, nothing may go wrong in it."""
    tab.look(1100, 900)
    tab.open(folder / "report.html")
    yield tab
    assert tab.problems == []


def numbers(tab: Browser) -> list[int]:
    found: list[int] = tab.run("[...document.querySelectorAll('#rows > li')].map(e => Number(e.dataset.row))")
    return found


def choose(tab: Browser, select: str, value: str) -> None:
    """As a person does with the keyboard: to the list, and down until it is there."""
    tab.run(f"document.getElementById('{select}').focus()")
    options: Sequence[str] = tab.run(f"[...document.getElementById('{select}').options].map(o => o.value)")
    tab.key("Home", 36)
    for _ in range(options.index(value)):
        tab.key("ArrowDown", 40)
    assert tab.run(f"document.getElementById('{select}').value") == value


def gains(report: dict[str, Any], key: str) -> dict[int, float]:
    sign = -1 if key in ("loss", "repetition") else 1
    found = {}
    for row in report["rows"]:
        first, second = (answer["scores"][key] for answer in row["answers"])
        if first is not None and second is not None:
            found[row["row"]] = sign * (second - first)
    return found


@in_chromium
def test_the_table_shows_the_numbers_of_the_report(opened: Browser, report: dict[str, Any]) -> None:
    shown = opened.run(
        "[...document.querySelectorAll('#metrics tbody tr')].map(e => [e.dataset.metric, e.cells[1].innerText, "
        "e.cells[2].innerText])"
    )
    assert [line[0] for line in shown] == [metric["key"] for metric in report["metrics"]]
    for line, metric in zip(shown, report["metrics"], strict=True):
        for cell, value in zip(line[1:], metric["values"], strict=True):
            assert float(cell.split("\n")[0]) == pytest.approx(value, rel=2e-2, abs=1e-3)
    assert opened.run("document.querySelectorAll('figure svg[role=img][aria-label]').length") >= 9


@in_chromium
def test_fifty_rows_are_drawn_and_the_rest_on_a_click(opened: Browser) -> None:
    assert numbers(opened) == list(range(1, 51))
    assert opened.run("document.getElementById('count').textContent") == "70 of 70 rows"
    opened.click("#more")
    assert numbers(opened) == list(range(1, 71))
    assert opened.run("document.getElementById('more').hidden")
    assert opened.run("document.activeElement.dataset.row") == "51"


@in_chromium
@pytest.mark.parametrize("key", ["chrf", "loss", "tokens"])
def test_rows_are_sorted_by_gain_and_by_loss_of_the_chosen_metric(
    opened: Browser, report: dict[str, Any], key: str
) -> None:
    if key == "chrf":
        pytest.importorskip("sacrebleu")
    choose(opened, "metric", key)
    choose(opened, "order", "gain")
    known = gains(report, key)
    best = [known[row] for row in numbers(opened)]
    assert len(best) == 50 and best == sorted(known.values(), reverse=True)[:50]
    choose(opened, "order", "loss")
    assert [known[row] for row in numbers(opened)] == sorted(known.values())[:50]
    choose(opened, "order", "data")
    assert numbers(opened) == list(range(1, 51))


@in_chromium
def test_rows_are_filtered_by_what_became_of_them(opened: Browser, report: dict[str, Any]) -> None:
    choose(opened, "metric", "loss")
    known = gains(report, "loss")
    for name, holds in (("gained", lambda gain: gain > 0), ("lost", lambda gain: gain < 0)):
        choose(opened, "filter", name)
        expected = [row for row in sorted(known) if holds(known[row])]
        assert 0 < len(expected) < 70
        assert opened.run("document.getElementById('count').textContent") == f"{len(expected)} of 70 rows"
        assert numbers(opened) == expected[:50]
    choose(opened, "filter", "cut")
    cut = [row["row"] for row in report["rows"] if not all(answer["ended"] for answer in row["answers"])]
    assert numbers(opened) == cut[:50]
    choose(opened, "filter", "unwanted")
    assert numbers(opened) == []


@in_chromium
def test_rows_are_searched_as_one_types(opened: Browser, report: dict[str, Any]) -> None:
    opened.click("#search")
    opened.type("Article 1")
    expected = [row["row"] for row in report["rows"] if "article 1" in row["prompt"].lower()]
    assert numbers(opened) == expected and len(expected) == 11
    opened.type("7 of")
    assert numbers(opened) == [24]


@in_chromium
def test_prompts_are_folded_away_and_open_by_click_and_by_key(
    opened: Browser, report: dict[str, Any]
) -> None:
    assert opened.run("document.querySelectorAll('#rows pre').length") == 0
    opened.click("#rows > li[data-row='7'] summary")
    opened.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert (
        opened.run("document.querySelector('#rows > li[data-row=\"7\"] pre').textContent")
        == report["rows"][6]["prompt"]
    )
    opened.run("document.querySelector('#rows > li[data-row=\"8\"] summary').focus()")
    opened.key("Enter", 13, "\r")
    assert opened.run("document.querySelector('#rows > li[data-row=\"8\"] details').open")


@in_chromium
@pytest.mark.parametrize(
    ("text", "other", "marks"),
    [
        ("the old ferry runs", "the ferry runs", ["old "]),
        ("the ferry runs", "the old ferry runs", []),
        ("도서관이 연다", "도서관을 연다", ["이"]),
        ("same", "same", []),
        ("all new", "", ["all new"]),
    ],
)
def test_differences_are_marked(opened: Browser, text: str, other: str, marks: list[str]) -> None:
    parts = opened.run(f"uncommon({json.dumps(text)}, {json.dumps(other)})")
    assert [part["text"] for part in parts if part["marked"]] == marks
    assert "".join(part["text"] for part in parts) == text


@in_chromium
def test_marks_follow_the_choice(opened: Browser) -> None:
    assert opened.run("document.querySelectorAll('#rows mark').length") > 20
    choose(opened, "marks", "none")
    assert opened.run("document.querySelectorAll('#rows mark').length") == 0


@in_chromium
def test_nothing_in_the_data_runs_or_becomes_an_element(opened: Browser) -> None:
    opened.run("document.querySelectorAll('#rows summary').forEach(e => e.click())")
    for value in ("first", "wanted"):
        choose(opened, "marks", value)
    assert opened.run("window.ran === undefined")
    assert (
        opened.run(
            "document.querySelectorAll('main img, main svg:not([role=img]), main script, #rows b').length"
        )
        == 0
    )
    shown = opened.run("[...document.querySelectorAll('.said')].map(e => e.querySelector('p').textContent)")
    for text in HOSTILE:
        assert text.strip() in [each.strip() for each in shown]


@in_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1100])
def test_it_fits_the_window_and_can_be_read_in_it(tab: Browser, folder: Path, width: int, dark: bool) -> None:
    tab.look(width, 740, dark=dark)
    tab.open(folder / "report.html")
    assert tab.run("document.documentElement.scrollWidth") == width
    seen = tab.run(
        "[document.body, ...document.querySelectorAll('.dim, mark, .said > small, .better, .worse, caption, select')]"
        ".map(e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor])"
    )
    assert min(contrast(*pair) for pair in seen) >= 4.5
    assert tab.picture()[:8] == b"\x89PNG\r\n\x1a\n"
    background = luminance(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert (background < 0.1) if dark else (background > 0.9)
    assert tab.problems == []


@in_chromium
def test_every_control_has_a_name_and_is_reached_by_the_keyboard(opened: Browser) -> None:
    controls = "document.querySelectorAll('select, input, button:not([hidden])')"
    unnamed = opened.run(f"[...{controls}].filter(e => !(e.labels?.length || e.textContent)).length")
    assert unnamed == 0
    opened.run("document.body.focus()")
    reached = []
    for _ in range(12):
        opened.key("Tab", 9)
        reached.append(opened.run("document.activeElement.id || document.activeElement.className"))
    for name in ("metric", "order", "filter", "marks", "search", "wide"):
        assert name in reached


@in_chromium
def test_a_thousand_rows_open_quickly(report: dict[str, Any], tab: Browser, tmp_path: Path) -> None:
    text = "The ferry will run every half hour from June, says the council. " * 30
    rows = [
        {**row, "row": number * 70 + row["row"], "prompt": text}
        for number in range(15)
        for row in report["rows"]
    ][:1000]
    place = tmp_path / "large.html"
    place.write_text(page({**report, "rows": rows}), "utf-8")
    tab.open(place)
    assert tab.run("document.getElementById('count').textContent") == "1000 of 1000 rows"
    loaded = tab.run("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert loaded < 5000  # milliseconds; far more than it takes
    redrawn = tab.run(
        "(() => { const start = performance.now(); redraw(); return performance.now() - start; })()"
    )
    assert redrawn < 3000
    assert tab.problems == []


# Without a browser


def test_the_page_holds_everything_and_asks_for_nothing(folder: Path) -> None:
    text = (folder / "report.html").read_text("utf-8")
    without_data = re.sub(r'(?s)id="data">.*?</script>', "", text)
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|https?://", without_data)
    assert "default-src 'none'" in text


def test_data_in_the_page_is_data(folder: Path, report: dict[str, Any]) -> None:
    text = (folder / "report.html").read_text("utf-8")
    inside = text.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(inside)["rows"] == report["rows"]
    assert not set("<>&\u2028\u2029") & set(inside)
    assert json.loads(embedded(HOSTILE)) == HOSTILE
