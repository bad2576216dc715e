"""The page of `yeonma compare` in headless Chromium: it shows, sorts, filters and searches rows, and runs no data."""

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
from yeonma.shown import many_lines

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
    """A report of a base and its adapter on 70 rows, more than are rendered at once. The first rows are hostile."""
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
    report: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return report


@pytest.fixture(scope="module")
def tab(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as browser_tab:
        yield browser_tab


@pytest.fixture
def report_tab(tab: Browser, folder: Path) -> Iterator[Browser]:
    """The page in a browser. The test fails if the page logs an error."""
    tab.look(1100, 900)
    tab.open(folder / "report.html")
    yield tab
    assert tab.problems == []


def row_numbers(tab: Browser) -> list[int]:
    row_numbers: list[int] = tab.run(
        "[...document.querySelectorAll('#rows > li')].map(e => Number(e.dataset.row))"
    )
    return row_numbers


def choose(tab: Browser, select: str, value: str) -> None:
    """Choose an option with the keyboard."""
    tab.run(f"document.getElementById('{select}').focus()")
    options: Sequence[str] = tab.run(f"[...document.getElementById('{select}').options].map(o => o.value)")
    tab.key("Home", 36)
    for _ in range(options.index(value)):
        tab.key("ArrowDown", 40)
    assert tab.run(f"document.getElementById('{select}').value") == value


def gains(report: dict[str, Any], key: str) -> dict[int, float]:
    sign = -1 if key in ("loss", "repetition") else 1
    changes = {}
    for row in report["rows"]:
        base, adapted = (answer["scores"][key] for answer in row["answers"])
        if base is not None and adapted is not None:
            changes[row["row"]] = sign * (adapted - base)
    return changes


@in_chromium
def test_metrics_table_shows_the_values_of_the_report(report_tab: Browser, report: dict[str, Any]) -> None:
    shown = report_tab.run(
        "[...document.querySelectorAll('#metrics tbody tr')].map(e => [e.dataset.metric, e.cells[1].innerText, "
        "e.cells[2].innerText])"
    )
    assert [line[0] for line in shown] == [metric["key"] for metric in report["metrics"]]
    for line, metric in zip(shown, report["metrics"], strict=True):
        for cell, value in zip(line[1:], metric["values"], strict=True):
            assert float(cell.split("\n")[0]) == pytest.approx(value, rel=2e-2, abs=1e-3)
    assert report_tab.run("document.querySelectorAll('figure svg[role=img][aria-label]').length") >= 9


@in_chromium
def test_ten_rows_are_rendered_and_more_on_click(report_tab: Browser) -> None:
    assert row_numbers(report_tab) == list(range(1, 11))
    assert report_tab.run("document.getElementById('count').textContent") == "70 of 70 rows"
    report_tab.click("#more")
    assert row_numbers(report_tab) == list(range(1, 61))
    assert report_tab.run("document.activeElement.dataset.row") == "11"
    report_tab.click("#more")
    assert row_numbers(report_tab) == list(range(1, 71))
    assert report_tab.run("document.getElementById('more').hidden")
    assert report_tab.run("document.activeElement.dataset.row") == "61"


@in_chromium
@pytest.mark.parametrize("key", ["chrf", "loss", "tokens"])
def test_rows_are_sorted_by_gain_and_by_loss_of_the_chosen_metric(
    report_tab: Browser, report: dict[str, Any], key: str
) -> None:
    if key == "chrf":
        pytest.importorskip("sacrebleu")
    choose(report_tab, "metric", key)
    choose(report_tab, "order", "gain")
    gain_of_row = gains(report, key)
    best = [gain_of_row[row] for row in row_numbers(report_tab)]
    assert len(best) == 10 and best == sorted(gain_of_row.values(), reverse=True)[:10]
    choose(report_tab, "order", "loss")
    assert [gain_of_row[row] for row in row_numbers(report_tab)] == sorted(gain_of_row.values())[:10]
    choose(report_tab, "order", "data")
    assert row_numbers(report_tab) == list(range(1, 11))


@in_chromium
def test_rows_are_filtered_by_gain_loss_cut_or_unwanted_answers(
    report_tab: Browser, report: dict[str, Any]
) -> None:
    choose(report_tab, "metric", "loss")
    gain_of_row = gains(report, "loss")
    for name, matches in (("gained", lambda gain: gain > 0), ("lost", lambda gain: gain < 0)):
        choose(report_tab, "filter", name)
        expected = [row for row in sorted(gain_of_row) if matches(gain_of_row[row])]
        assert 0 < len(expected) < 70
        assert report_tab.run("document.getElementById('count').textContent") == f"{len(expected)} of 70 rows"
        assert row_numbers(report_tab) == expected[:10]
    choose(report_tab, "filter", "cut")
    cut = [row["row"] for row in report["rows"] if not all(answer["ended"] for answer in row["answers"])]
    assert row_numbers(report_tab) == cut[:10]
    choose(report_tab, "filter", "unwanted")
    assert row_numbers(report_tab) == []


@in_chromium
def test_search_filters_the_rows_while_typing(report_tab: Browser, report: dict[str, Any]) -> None:
    report_tab.click("#search")
    report_tab.type("Article 1")
    expected = [row["row"] for row in report["rows"] if "article 1" in row["prompt"].lower()]
    assert row_numbers(report_tab) == expected[:10] and len(expected) == 11
    report_tab.type("7 of")
    assert row_numbers(report_tab) == [24]


@in_chromium
def test_folded_prompts_open_by_click_and_by_key(report_tab: Browser, report: dict[str, Any]) -> None:
    assert report_tab.run("document.querySelectorAll('#rows pre').length") == 0
    report_tab.click("#rows > li[data-row='7'] summary")
    report_tab.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert (
        report_tab.run("document.querySelector('#rows > li[data-row=\"7\"] pre').textContent")
        == report["rows"][6]["prompt"]
    )
    report_tab.run("document.querySelector('#rows > li[data-row=\"8\"] summary').focus()")
    report_tab.key("Enter", 13, "\r")
    assert report_tab.run("document.querySelector('#rows > li[data-row=\"8\"] details').open")


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
def test_differences_are_marked(report_tab: Browser, text: str, other: str, marks: list[str]) -> None:
    parts = report_tab.run(f"uncommon({json.dumps(text)}, {json.dumps(other)})")
    assert [part["text"] for part in parts if part["marked"]] == marks
    assert "".join(part["text"] for part in parts) == text


@in_chromium
def test_marks_can_be_turned_off(report_tab: Browser) -> None:
    assert report_tab.run("document.querySelectorAll('#rows mark').length") > 20
    choose(report_tab, "marks", "none")
    assert report_tab.run("document.querySelectorAll('#rows mark').length") == 0


@in_chromium
def test_hostile_data_neither_runs_nor_becomes_elements(report_tab: Browser) -> None:
    report_tab.run("document.querySelectorAll('#rows summary').forEach(e => e.click())")
    for value in ("first", "wanted"):
        choose(report_tab, "marks", value)
    assert report_tab.run("window.ran === undefined")
    assert (
        report_tab.run(
            "document.querySelectorAll('main img, main svg:not([role=img]), main script, #rows b').length"
        )
        == 0
    )
    shown = report_tab.run(
        "[...document.querySelectorAll('.said')].map(e => e.querySelector('p').textContent)"
    )
    for text in HOSTILE:
        assert many_lines(text).strip() in [item.strip() for item in shown]


@in_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 390, 1100])
def test_page_fits_the_window_with_readable_contrast(
    tab: Browser, folder: Path, width: int, dark: bool
) -> None:
    tab.look(width, 740, dark=dark)
    tab.open(folder / "report.html")
    assert tab.run("document.documentElement.scrollWidth") == width
    colours = tab.run(
        "[document.body, ...document.querySelectorAll('.dim, mark, .said > small, .better, .worse, caption, select')]"
        ".map(e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor])"
    )
    assert min(contrast(*pair) for pair in colours) >= 4.5
    assert tab.picture()[:8] == b"\x89PNG\r\n\x1a\n"
    background = luminance(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert (background < 0.1) if dark else (background > 0.9)
    assert tab.problems == []


@in_chromium
def test_every_control_has_a_label_and_is_reachable_by_keyboard(report_tab: Browser) -> None:
    controls = "document.querySelectorAll('select, input, button:not([hidden])')"
    unlabelled = report_tab.run(f"[...{controls}].filter(e => !(e.labels?.length || e.textContent)).length")
    assert unlabelled == 0
    report_tab.run("document.body.focus()")
    focused = []
    for _ in range(24):  # past the prompts of ten rows
        report_tab.key("Tab", 9)
        focused.append(report_tab.run("document.activeElement.id || document.activeElement.className"))
    for name in ("metric", "order", "filter", "marks", "search", "wide"):
        assert name in focused


@in_chromium
def test_page_of_a_thousand_rows_opens_quickly(report: dict[str, Any], tab: Browser, tmp_path: Path) -> None:
    text = "The ferry will run every half hour from June, says the council. " * 30
    rows = [
        {**row, "row": number * 70 + row["row"], "prompt": text}
        for number in range(15)
        for row in report["rows"]
    ][:1000]
    file = tmp_path / "large.html"
    file.write_text(page({**report, "rows": rows}), "utf-8")
    tab.open(file)
    assert tab.run("document.getElementById('count').textContent") == "1000 of 1000 rows"
    load_milliseconds = tab.run("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert load_milliseconds < 5000  # far more than it takes
    redraw_milliseconds = tab.run(
        "(() => { const start = performance.now(); redraw(); return performance.now() - start; })()"
    )
    assert redraw_milliseconds < 3000
    assert tab.problems == []


# Without a browser


def test_page_is_self_contained_and_makes_no_requests(folder: Path) -> None:
    text = (folder / "report.html").read_text("utf-8")
    without_data = re.sub(r'(?s)id="data">.*?</script>', "", text)
    assert not re.findall(r"<[^<>]*(?:src|href)\s*=|url\(|@import|https?://", without_data)
    assert "default-src 'none'" in text


def test_embedded_data_is_escaped_and_equals_the_report(folder: Path, report: dict[str, Any]) -> None:
    text = (folder / "report.html").read_text("utf-8")
    embedded_json = text.partition('id="data">')[2].partition("</script>")[0]
    rows = json.loads(embedded_json)["rows"]
    assert [row["row"] for row in rows] == [row["row"] for row in report["rows"]]
    for row, reported in zip(rows, report["rows"], strict=True):
        assert row["prompt"] == many_lines(reported["prompt"])
        assert [each["text"] for each in row["answers"]] == [
            many_lines(a["text"]) for a in reported["answers"]
        ]
        assert [each["scores"] for each in row["answers"]] == [each["scores"] for each in reported["answers"]]
    assert not set("<>&\u2028\u2029") & set(embedded_json)
    assert json.loads(embedded(HOSTILE)) == HOSTILE
