"""A report as one web page that needs no network, for light and dark themes, desktops and phones.

Metrics are HTML, plots SVG whose colours are CSS variables of the page. The rows are embedded as JSON; the script
renders them as text, never as HTML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from yeonma import svg
from yeonma.data.classification import confusion_table, f1_of, label_name
from yeonma.evaluate.judge_report import judge_caption, judge_heads, judge_lines
from yeonma.evaluate.report import (
    ARROWS,
    ComparisonReport,
    explain_numbers,
)
from yeonma.evaluate.verdict import SIGNIFICANT_P, format_number, format_p, reference_heading
from yeonma.evaluate.vote_part import vote_part, vote_words
from yeonma.inspect.inspect_page import COLOURS
from yeonma.language import language
from yeonma.messages import counted, tr
from yeonma.shown import html, html_lines, json_text, many_lines

PARTS = Path(__file__).parent / "page_parts"
PLOTTED = (
    "accuracy",
    "macro_f1",
    "loss",
    "chrf",
    "bleu",
    "rouge1",
    "rouge2",
    "rougel",
    "exact",
    "tokens",
    "repetition",
    "unended",
)
PLOT_WIDTH = 320
MODEL_COLOURS = 6  # --m0 to --m5 in report.css
BINS = 16


def page(report: ComparisonReport) -> str:
    """The report as HTML."""
    names = [model["name"] for model in report["models"]]
    title = (
        tr(" and ").join(names)
        if len(names) < 3
        else tr("{name} and {count} more", name=names[0], count=len(names) - 1)
    )
    style = COLOURS + (PARTS / "report.css").read_text("utf-8")
    script = "".join((PARTS / name).read_text("utf-8") for name in ("report.js", "votes.js"))
    data = report["data"]
    subtitle = tr(
        "{rows} of {data}, {made}, Yeonma {version}",
        rows=counted(data["rows"], "row"),
        data=data["name"],
        made=report["made"],
        version=report["yeonma"],
    )
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="{language()}"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'\">",
            f"<title>{html(title)}</title><style>{style}</style></head><body>",
            f'<header><h1>{html(title)}</h1><p class="dim">{html(subtitle)}</p></header>',
            "<main>",
            *(f'<p class="verdict">{html(sentence)}</p>' for sentence in report["verdict"]),
            *_notes(report["notes"]),
            *vote_part(names),
            "<section>",
            *_rows_part(report, names),
            "</section>",
            *_table(report, names),
            *_judge_table(report, names),
            *_label_tables(report, names),
            *_plots(report, names),
            *_about(report),
            "</main>",
            f'<script type="application/json" id="data">{embedded(_for_script(report))}</script>',
            f"<script>{script}</script>",
            "</body></html>",
            "",
        ]
    )


def embedded(value: Any) -> str:
    """JSON for a script element, without end tags or JavaScript's line ends."""
    text = json_text(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _for_script(report: ComparisonReport) -> dict[str, Any]:
    content = [report["models"], report["rows"]]
    return {
        "id": sha256(json_text(content).encode()).hexdigest()[:16],
        "models": [{"name": model["name"]} for model in report["models"]],
        "metrics": [
            {"key": metric["key"], "name": tr(metric["name"]), "better": metric["better"]}
            for metric in report["metrics"]
        ],
        "rows": [_row_for_script(row) for row in report["rows"]],
        "words": {**_script_words(), **vote_words()},
    }


def _script_words() -> dict[str, str]:
    """What the script says itself. It puts values at `%1` and `%2`."""
    return {
        "empty": tr("(empty)"),
        "row": tr("Row {number}", number="%1"),
        "better": tr("better"),
        "worse": tr("worse"),
        "change": tr("change"),
        "no_change": tr("no change"),
        "prompt": tr("prompt"),
        "reference": reference_heading(),
        "cut_off": tr("cut off at max_new_tokens"),
        "prompt_of": tr("prompt of {name}", name="%1"),
        "more": tr("Show more ({left} left)", left="%1"),
        "count": tr("{found} of {all} rows", found="%1", all="%2"),
        "judge_wins": tr("judge: {model} is better", model="%1"),
        "judge_tie": tr("judge: a tie, or different verdicts in the two orders"),
        "judge_equal": tr("judge: not asked, the answers are equal"),
        "judge_none": tr("judge: no result"),
        "judge_pair": tr("{model} against {other}", model="%2", other="%1"),
        "judge_reasons": tr("its reasons, one for each order"),
    }


def _row_for_script(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its texts as people should see them, and with what votes export: the prompt's columns, and the answers
    that differ from what is shown (`raw`)."""
    shown = {key: _readable(value) for key, value in row.items() if key != "columns"}
    for answer, own in zip(shown["answers"], row["answers"], strict=True):
        if answer["text"] != own["text"]:
            answer["raw"] = own["text"]
    return {**shown, "columns": row["columns"]}


def _readable(value: Any) -> Any:
    """A row with the texts in it as people should see them."""
    if isinstance(value, str):
        return many_lines(value)
    if isinstance(value, list):
        return [_readable(part) for part in value]
    return {key: _readable(part) for key, part in value.items()} if isinstance(value, dict) else value


def _notes(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield f"<ul>{''.join(f'<li>{html(note)}</li>' for note in notes)}</ul>"


def _table(report: ComparisonReport, names: Sequence[str]) -> Iterator[str]:
    yield '<h2 id="numbers">' + html(tr("Metrics")) + "</h2>"
    yield '<div class="wide" tabindex="0" role="region" aria-labelledby="numbers"><table id="metrics">'
    caption = tr("Over all rows, with 95% confidence intervals. ↑ higher is better, ↓ lower is better.")
    yield f"<caption>{html(caption)}</caption>"
    heads = [
        f'<th scope="col"><i class="key" style="background:{_model_colour(model)}"></i>{html(name)}</th>'
        for model, name in enumerate(names)
    ]
    pairs = [test["models"] for test in report["metrics"][0]["differences"]]
    for a, b in pairs:
        head = tr("change") if len(pairs) == 1 else f"{names[b]} - {names[a]}"
        heads.append(f'<th scope="col">{html(head)}</th>')
    yield f'<thead><tr><th scope="col">{html(tr("metric"))}</th>{"".join(heads)}</tr></thead><tbody>'
    for metric in report["metrics"]:
        cells = "".join(
            f"<td>{format_number(value)}{_interval(ends)}</td>"
            for value, ends in zip(metric["values"], metric["intervals"], strict=True)
        )
        cells += "".join(_difference(metric, test) for test in metric["differences"])
        name, about = html(tr(metric["name"])), html(metric["about"])
        head = f"{name} {ARROWS[metric['better']]}<small>{about}</small>"
        yield f'<tr data-metric="{metric["key"]}"><th scope="row">{head}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _judge_table(report: ComparisonReport, names: Sequence[str]) -> Iterator[str]:
    """What a judge says of each two models, if there is one."""
    judge = report["judge"]
    if judge is None:
        return
    yield '<h2 id="judge">' + html(tr("Judge")) + "</h2>"
    yield '<div class="wide" tabindex="0" role="region" aria-labelledby="judge"><table>'
    heads = "".join(f'<th scope="col">{html(head)}</th>' for head in judge_heads(judge, names))
    yield f"<caption>{html(judge_caption(judge))}</caption><thead><tr><td></td>{heads}</tr></thead><tbody>"
    for name, cells in judge_lines(judge):
        numbers = "".join(f"<td>{html(cell)}</td>" for cell in cells)
        yield f'<tr><th scope="row">{html(name)}</th>{numbers}</tr>'
    yield "</tbody></table></div>"
    rubric = html_lines(judge["rubric_text"])
    yield f"<details><summary>{html(tr('rubric'))}</summary><pre>{rubric}</pre></details>"


def _label_tables(report: ComparisonReport, names: Sequence[str]) -> Iterator[str]:
    """A confusion table for each model, if the reference answers are labels."""
    if report["labels"] is None:
        return
    yield '<h2 id="labels">' + html(tr("Labels")) + "</h2>"
    labels = list(report["labels"]["counts"])
    for model, confusion in enumerate(report["labels"]["confusions"]):
        columns, rows = confusion_table(confusion, labels)
        yield '<div class="wide" tabindex="0" role="region" aria-labelledby="labels"><table class="confusion">'
        key = f'<i class="key" style="background:{_model_colour(model)}"></i>'
        caption = tr("{model}: rows of a label, by the label that was answered", model=names[model])
        yield f"<caption>{key}{html(caption)}</caption>"
        heads = "".join(f'<th scope="col">{html(label_name(column))}</th>' for column in columns)
        yield f'<thead><tr><th scope="col">{html(tr("label"))}</th>{heads}<th scope="col">F1</th></tr></thead><tbody>'
        for own, counts in rows:
            cells = "".join(
                f'<td class="{"right" if column == own else ""}">{count:,}</td>'
                for column, count in zip(columns, counts, strict=True)
            )
            name, score = html(label_name(own)), format_number(f1_of(confusion, own))
            yield f'<tr><th scope="row">{name}</th>{cells}<td>{score}</td></tr>'
        yield "</tbody></table></div>"


def _interval(ends: Sequence[float] | None) -> str:
    if not ends:
        return ""
    return f"<small>{html(_range(ends))}</small>"


def _range(ends: Sequence[float]) -> str:
    return tr("{low} to {high}", low=format_number(ends[0]), high=format_number(ends[1]))


def _difference(metric: Mapping[str, Any], test: Mapping[str, Any]) -> str:
    difference, p = test["difference"], test.get("p_corrected")
    if difference is None:
        return "<td>-</td>"
    classes = ""
    if metric["better"] and difference and p is not None and p < SIGNIFICANT_P:
        better = (difference > 0) == (metric["better"] == "higher")
        classes = "sure better" if better else "sure worse"
    sign = "+" if difference >= 0 else ""
    p_text = f"<small>{format_p(p)}</small>" if p is not None else ""
    return (
        f'<td class="{classes}">{sign}{format_number(difference)}{_interval(test["interval"])}{p_text}</td>'
    )


def _plots(report: ComparisonReport, names: Sequence[str]) -> Iterator[str]:
    yield f'<h2>{html(tr("Plots"))}</h2><div class="plots">'
    for metric in report["metrics"]:
        bars = _metric_bars(metric, names) if metric["key"] in PLOTTED else ""
        if bars:
            name, about = f"{html(tr(metric['name']))} {ARROWS[metric['better']]}", html(metric["about"])
            yield f'<figure><figcaption>{name} <span class="dim">{about}</span></figcaption>{bars}</figure>'
    lengths = {
        tr("answers of {name}", name=name): [len(row["answers"][model]["text"]) for row in report["rows"]]
        for model, name in enumerate(names)
    }
    colours = [_model_colour(model) for model in range(len(names))]
    references = [len(row["wanted"]) for row in report["rows"] if row["wanted"] is not None]
    if references:
        lengths[tr("reference answers")] = references
        colours.append("var(--reference)")
    keys = "".join(_legend(list(lengths), colours))
    histograms = _length_histograms(lengths, colours)
    caption = html(tr("Length of the texts:"))
    yield f"<figure><figcaption>{caption} {keys}</figcaption>{histograms}</figure>"
    for model, entry in enumerate(report["models"]):
        if entry["curve"]:
            caption = tr("Loss of the run {name}; line: training, points: validation", name=entry["name"])
            yield f"<figure><figcaption>{html(caption)}</figcaption>"
            yield f"{_loss_curve(entry['curve'], model)}</figure>"
    yield "</div>"


def _model_colour(model: int) -> str:
    return f"var(--m{model % MODEL_COLOURS})"


def _legend(names: Sequence[str], colours: Sequence[str]) -> Iterator[str]:
    for name, colour in zip(names, colours, strict=True):
        key = f'<i class="key" style="background:{colour}"></i>'
        yield f'<span style="white-space:nowrap">{key}{html(name)}</span> '


def _metric_bars(metric: Mapping[str, Any], names: Sequence[str]) -> str:
    """A bar for each model, with the 95% interval as a whisker. Empty if no value is known."""
    values, intervals = metric["values"], metric["intervals"]
    numbers = [value for value in values if value is not None]
    numbers += [end for interval in intervals if interval for end in interval]
    if not numbers:
        return ""
    x_range = (min(0.0, *numbers), max(0.0, *numbers) or 1.0)
    axes = svg.Axes(4, 4, PLOT_WIDTH - 70, 40 * len(names), x_range, (0, 1))
    elements, descriptions = [], []
    for model, (name, value, interval) in enumerate(zip(names, values, intervals, strict=True)):
        top = axes.top + model * 40
        elements.append(svg.text(4, top + 11, name if len(name) <= 40 else f"...{name[-37:]}"))
        if value is None:
            elements.append(svg.text(4, top + 29, "-"))
            continue
        left, right = sorted((axes.x(0), axes.x(value)))
        bar = {"x": left, "y": top + 16, "width": max(right - left, 0.5), "height": 18}
        elements.append(svg.element("rect", **bar, fill=_model_colour(model)))
        label, description = right, f"{name} {format_number(value)}"
        if interval:
            a, b = (axes.x(end) for end in interval)
            ends = f"M{svg.number(a)} {top + 20}v10M{svg.number(b)} {top + 20}v10"
            path = f"{ends}M{svg.number(a)} {top + 25}H{svg.number(b)}"
            elements.append(svg.element("path", class_="whisker", d=path))
            label = max(label, b)
            description += f" ({_range(interval)})"
        elements.append(svg.text(label + 5, top + 29, format_number(value)))
        descriptions.append(description)
    description = f"{tr(metric['name'])}: {', '.join(descriptions)}"
    return svg.drawing(PLOT_WIDTH, 8 + 40 * len(names), description, elements)


def _length_histograms(lengths: Mapping[str, Sequence[int]], colours: Sequence[str]) -> str:
    """For each name, a stepped line: how many texts have which length."""
    longest = max((max(numbers, default=0) for numbers in lengths.values()), default=0)
    edges = np.linspace(0, max(longest, 1), BINS + 1)
    counts = [np.histogram(numbers, edges)[0].tolist() for numbers in lengths.values()]
    highest = max(1, *(max(bins) for bins in counts))
    axes = _axes((0, max(longest, 1)), (0, highest))
    elements = [*_frame(axes, tr("characters"))]
    descriptions = []
    for index, (name, bins) in enumerate(zip(lengths, counts, strict=True)):
        corners: list[svg.Point] = [(0, 0)]
        for count, (left, right) in zip(bins, pairwise(edges.tolist()), strict=True):
            corners += [(left, count), (right, count)]
        look = {"stroke_dasharray": f"{3 * index} 3"} if index else {}
        places = axes.places([*corners, (corners[-1][0], 0)])
        elements.append(svg.line(places, stroke=colours[index], stroke_width=2, **look))
        median = float(np.median(lengths[name])) if len(lengths[name]) else 0.0
        descriptions.append(tr("{name} median {median:.0f}", name=name, median=median))
    description = tr("Lengths in characters: {descriptions}", descriptions=", ".join(descriptions))
    return svg.drawing(PLOT_WIDTH, 164, description, elements)


def _loss_curve(curve: Mapping[str, Sequence[svg.Point]], model: int) -> str:
    """Training loss over the steps as a line, validation loss as points."""
    training, validation = curve["training"], curve["validation"]
    points = [*training, *validation]
    last_step = max(step for step, _ in points) or 1
    axes = _axes((0, last_step), svg.padded([loss for _, loss in points]))
    elements = [*_frame(axes, tr("step"))]
    if training:
        places = axes.places(training)
        elements.append(svg.line(places, stroke=_model_colour(model), stroke_width=1.5))
    elements.append(svg.dots(axes.places(validation), 8, stroke="var(--reference)"))
    words = {"training": tr("training"), "validation": tr("validation")}
    descriptions = [
        f"{words[name]} {_range((part[0][1], part[-1][1]))}" for name, part in curve.items() if part
    ]
    return svg.drawing(
        PLOT_WIDTH, 164, tr("Loss of the run: {descriptions}", descriptions=", ".join(descriptions)), elements
    )


def _axes(x_range: tuple[float, float], y_range: tuple[float, float]) -> svg.Axes:
    return svg.Axes(48, 10, PLOT_WIDTH - 66, 112, x_range, y_range)


def _frame(axes: svg.Axes, x_label: str) -> Iterator[str]:
    yield from axes.frame(
        svg.round_ticks(*axes.x_range, 5, whole=True),
        svg.round_ticks(*axes.y_range, 4, whole=axes.y_range[0] == 0),
    )
    yield svg.text(axes.left + axes.width / 2, axes.top + axes.height + 34, x_label, "middle")


def _rows_part(report: ComparisonReport, names: Sequence[str]) -> Iterator[str]:
    row_scores = report["rows"][0]["answers"][0]["scores"]
    metrics = {
        metric["key"]: tr(metric["name"]) for metric in report["metrics"] if metric["key"] in row_scores
    }
    first_metric = next(key for key in ("accuracy", "chrf", "loss", "rougel", "tokens") if key in metrics)
    several = len(names) > 1
    yield '<h2 id="rows-heading">' + html(tr("Answers")) + "</h2>"
    about = html(tr("Sort, filter and search rows"))
    yield f'<div class="controls" role="search" aria-label="{about}">'
    yield _select(
        "metric",
        tr("metric"),
        [(key, name) for key, name in metrics.items() if key != "unended"],
        first_metric,
    )
    orders = [("data", tr("order of the data"))]
    if several:
        orders += [("gain", tr("best change first")), ("loss", tr("worst change first"))]
    else:
        orders += [("gain", tr("best first")), ("loss", tr("worst first"))]
    yield _select("order", tr("sort by"), orders, "data")
    if len(names) > 2:
        choices = [(str(model), name) for model, name in enumerate(names)]
        yield _select("from", tr("change from"), choices, "0")
        yield _select("to", tr("to"), choices, "1")
    filters = [("all", tr("all rows"))]
    if several:
        filters += [
            ("gained", tr("better")),
            ("lost", tr("worse")),
            ("different", tr("different answers")),
            ("same", tr("identical answers")),
        ]
    if report["judge"] is not None:
        filters += [
            ("judged_for", tr("better by the judge")),
            ("judged_against", tr("worse by the judge")),
            ("unjudged", tr("without a result of the judge")),
        ]
    filters += [("right", tr("exact match"))] if "exact" in metrics else []
    filters += [("cut", tr("cut off")), ("unwanted", tr("no reference answer"))]
    yield _select("filter", tr("show"), filters, "all")
    has_reference = any(row["wanted"] is not None for row in report["rows"])
    marks = [("wanted", tr("from the reference"))] if has_reference else []
    marks += [("first", tr("from {name}", name=names[0]))] if several else []
    default_marks = marks[0][0] if marks else "none"
    yield _select("marks", tr("highlight differences"), [*marks, ("none", tr("none"))], default_marks)
    yield f'<label>{html(tr("search"))}<input id="search" type="search" autocomplete="off"></label></div>'
    yield '<p id="count" class="dim" role="status" aria-live="polite"></p>'
    without_script = tr("The list of rows needs JavaScript. report.json has the same rows.")
    yield f"<noscript><p>{html(without_script)}</p></noscript>"
    more = html(tr("Show more"))
    yield f'<ol id="rows" aria-labelledby="rows-heading"></ol><button id="more" type="button" hidden>{more}</button>'


def _select(name: str, label: str, choices: Sequence[tuple[str, str]], selected: str) -> str:
    options = "".join(
        f'<option value="{html(value)}"{" selected" if value == selected else ""}>{html(text)}</option>'
        for value, text in choices
    )
    return f'<label>{html(label)}<select id="{name}">{options}</select></label>'


def _about(report: ComparisonReport) -> Iterator[str]:
    yield f"<h2>{html(tr('Method'))}</h2><ul>"
    for sentence in explain_numbers(report):
        yield f"<li>{html(sentence)}</li>"
    yield "</ul><dl>"
    for model in report["models"]:
        base, template = model["base"], tr("template: {source}", source=model["template_of"])
        if model["adapter"]:
            base = tr("{base}, adapter {adapter}", base=base, adapter=model["adapter"])
        yield f"<dt><b>{html(model['name'])}</b></dt><dd>{html(base)}; {html(template)}"
        text, summary = escape(many_lines(model["template"])), html(tr("template"))
        yield f"<details><summary>{summary}</summary><pre>{text}</pre></details></dd>"
    options = ", ".join(f"{name} {value}" for name, value in report["answers"].items())
    yield f"<dt><b>{html(tr('generation'))}</b></dt><dd>{html(options)}</dd>"
    data = report["data"]
    yield f"<dt><b>{html(tr('data'))}</b></dt><dd>{html(data['name'])}, SHA-256 {data['sha256']}</dd></dl>"
