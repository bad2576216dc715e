"""A report as one page that opens offline: nothing from elsewhere, light and dark, for a desk and for a phone.

Numbers and plots stand in the HTML; the rows are JSON, drawn by a script that never takes a text for HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from yeonma.evaluate.plots import colour, legend, length_lines, loss_curve, metric_bars
from yeonma.evaluate.report import ARROWS, SURE, ComparisonReport, about_numbers, shown, shown_p
from yeonma.inspect.inspect_page import COLOURS

PARTS = Path(__file__).parent / "page_parts"
PLOTTED = ("loss", "chrf", "bleu", "rouge1", "rouge2", "rougel", "exact", "tokens", "repetition", "unended")


def page(report: ComparisonReport) -> str:
    """HTML of the report; as large as its texts."""
    names = [model["name"] for model in report["models"]]
    title = " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
    style = COLOURS + (PARTS / "report.css").read_text("utf-8")
    script = (PARTS / "report.js").read_text("utf-8")
    made = f"{report['data']['rows']:,} rows of {report['data']['name']}, {report['made']}, Yeonma {report['yeonma']}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title><style>{style}</style></head><body>",
            f'<header><h1>{escape(title)}</h1><p class="dim">{escape(made)}</p></header>',
            "<main>",
            *_notes(report["notes"]),
            *_table(report, names),
            *_plots(report, names),
            *_rows_part(report, names),
            *_about(report),
            "</main>",
            f'<script type="application/json" id="data">{embedded(_for_script(report))}</script>',
            f"<script>{script}</script>",
            "</body></html>",
            "",
        ]
    )


def embedded(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or is a line end to JavaScript."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _for_script(report: ComparisonReport) -> dict[str, Any]:
    return {
        "models": [{"name": model["name"]} for model in report["models"]],
        "metrics": [{key: metric[key] for key in ("key", "name", "better")} for metric in report["metrics"]],
        "rows": report["rows"],
    }


def _notes(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"


def _table(report: ComparisonReport, names: Sequence[str]) -> Iterator[str]:
    yield '<h2 id="numbers">Numbers</h2>'
    yield '<div class="wide" tabindex="0" role="region" aria-labelledby="numbers"><table id="metrics">'
    yield "<caption>Of all rows, with 95% intervals; ↑ higher is better, ↓ lower is better.</caption>"
    heads = [
        f'<th scope="col"><i class="key" style="background:{colour(at)}"></i>{escape(name)}</th>'
        for at, name in enumerate(names)
    ]
    pairs = [each["models"] for each in report["metrics"][0]["differences"]]
    for a, b in pairs:
        said = "change" if len(pairs) == 1 else f"{names[b]} - {names[a]}"
        heads.append(f'<th scope="col">{escape(said)}</th>')
    yield f'<thead><tr><th scope="col">metric</th>{"".join(heads)}</tr></thead><tbody>'
    for metric in report["metrics"]:
        cells = "".join(
            f"<td>{shown(value)}{_between(between)}</td>"
            for value, between in zip(metric["values"], metric["intervals"], strict=True)
        )
        cells += "".join(_difference(metric, each) for each in metric["differences"])
        head = f"{escape(metric['name'])} {ARROWS[metric['better']]}<small>{escape(metric['about'])}</small>"
        yield f'<tr data-metric="{metric["key"]}"><th scope="row">{head}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _between(interval: Sequence[float] | None) -> str:
    return f"<small>{shown(interval[0])} to {shown(interval[1])}</small>" if interval else ""


def _difference(metric: Mapping[str, Any], each: Mapping[str, Any]) -> str:
    difference, p = each["difference"], each.get("p_corrected")
    if difference is None:
        return "<td>-</td>"
    kind = ""
    if metric["better"] and difference and p is not None and p < SURE:
        kind = " better" if (difference > 0) == (metric["better"] == "higher") else " worse"
    sign = "+" if difference >= 0 else ""
    sure = "sure" if kind else ""
    told = f"<small>{shown_p(p)}</small>" if p is not None else ""
    return f'<td class="{sure}{kind}">{sign}{shown(difference)}{_between(each["interval"])}{told}</td>'


def _plots(report: ComparisonReport, names: Sequence[str]) -> Iterator[str]:
    yield '<h2>Plots</h2><div class="plots">'
    for metric in report["metrics"]:
        bars = metric_bars(metric, names) if metric["key"] in PLOTTED else ""
        if bars:
            name, about = f"{escape(metric['name'])} {ARROWS[metric['better']]}", escape(metric["about"])
            yield f'<figure><figcaption>{name} <span class="dim">{about}</span></figcaption>{bars}</figure>'
    lengths = {
        f"answers of {name}": [len(row["answers"][at]["text"]) for row in report["rows"]]
        for at, name in enumerate(names)
    }
    colours = [colour(at) for at in range(len(names))]
    wanted = [len(row["wanted"]) for row in report["rows"] if row["wanted"] is not None]
    if wanted:
        lengths["wanted"] = wanted
        colours.append("var(--wanted)")
    keys = "".join(legend(list(lengths), colours))
    yield f"<figure><figcaption>How long the texts are: {keys}</figcaption>{length_lines(lengths, colours)}</figure>"
    for at, model in enumerate(report["models"]):
        if model["curve"]:
            about = "line: training, points: validation rows"
            yield f"<figure><figcaption>Loss of the run {escape(model['name'])}, {about}</figcaption>"
            yield f"{loss_curve(model['curve'], at)}</figure>"
    yield "</div>"


def _rows_part(report: ComparisonReport, names: Sequence[str]) -> Iterator[str]:
    known = [
        metric for metric in report["metrics"] if metric["key"] in report["rows"][0]["answers"][0]["scores"]
    ]
    first = next((metric["key"] for metric in known if metric["key"] in ("rougel", "loss")), "tokens")
    first = next((metric["key"] for metric in known if metric["key"] == "chrf"), first)
    several = len(names) > 1
    yield '<h2 id="rows-heading">Rows</h2>'
    yield '<div class="controls" role="search" aria-label="Sort, filter and search rows">'
    yield _select(
        "metric", "metric", [(each["key"], each["name"]) for each in known if each["key"] != "unended"], first
    )
    orders = ("most gained first", "most lost first") if several else ("best first", "worst first")
    yield _select(
        "order", "order", [("data", "as in the data"), ("gain", orders[0]), ("loss", orders[1])], "data"
    )
    if len(names) > 2:
        choices = [(str(at), name) for at, name in enumerate(names)]
        yield _select("from", "gain from", choices, "0")
        yield _select("to", "to", choices, "1")
    filters = [("all", "all rows")]
    if several:
        filters += [
            ("gained", "gained"),
            ("lost", "lost"),
            ("different", "different answers"),
            ("same", "equal answers"),
        ]
    filters += [("right", "exactly right")] if any(each["key"] == "exact" for each in known) else []
    filters += [("cut", "cut off"), ("unwanted", "no wanted answer")]
    yield _select("filter", "show", filters, "all")
    has_wanted = any(row["wanted"] is not None for row in report["rows"])
    marks = [("wanted", "from wanted")] if has_wanted else []
    marks += [("first", f"from {names[0]}")] if several else []
    yield _select(
        "marks", "mark what differs", [*marks, ("none", "nothing")], marks[0][0] if marks else "none"
    )
    yield '<label>search<input id="search" type="search" autocomplete="off"></label></div>'
    yield '<p id="count" class="dim" role="status" aria-live="polite"></p>'
    yield "<noscript><p>A script draws the rows, and is off here; report.json beside this page has them.</p></noscript>"
    yield '<ol id="rows" aria-labelledby="rows-heading"></ol><button id="more" type="button" hidden>Show more</button>'


def _select(name: str, label: str, choices: Sequence[tuple[str, str]], chosen: str) -> str:
    options = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(text)}</option>'
        for value, text in choices
    )
    return f'<label>{escape(label)}<select id="{name}">{options}</select></label>'


def _about(report: ComparisonReport) -> Iterator[str]:
    yield "<h2>How this was made</h2><ul>"
    for said in about_numbers(report):
        yield f"<li>{escape(said)}</li>"
    yield "</ul><dl>"
    for model in report["models"]:
        with_adapter = f", adapter {model['adapter']}" if model["adapter"] else ""
        yield f"<dt><b>{escape(model['name'])}</b></dt><dd>{escape(model['base'])}{escape(with_adapter)}; "
        yield f"template: {escape(model['template_of'])}"
        yield f"<details><summary>template</summary><pre>{escape(model['template'])}</pre></details></dd>"
    asked = ", ".join(f"{name} {value}" for name, value in report["answers"].items())
    yield f"<dt><b>answers</b></dt><dd>{escape(asked)}</dd>"
    yield f"<dt><b>data</b></dt><dd>{escape(report['data']['name'])}, SHA-256 {report['data']['sha256']}</dd></dl>"
