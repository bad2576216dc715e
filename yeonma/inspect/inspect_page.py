"""Rows, audit and forecast as one self-contained web page, for light and dark themes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from io import StringIO

from rich.console import Console

from yeonma.inspect.audit import Audit, Lengths, PartAudit
from yeonma.inspect.fit_verdict import VERDICT
from yeonma.inspect.terminal import (
    SHOWN_IN_LEGEND,
    WORDS,
    heading_of,
    print_audit,
    printable,
    shown_names,
    weight_text,
)
from yeonma.language import language
from yeonma.messages import tr
from yeonma.page_style import COLOURS, SPANS
from yeonma.shown import html
from yeonma.tokenization.explain import TextSpan, View

STYLE = (
    COLOURS
    + """\
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 60rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; } .left-out { color: var(--cut); }
"""
    + SPANS
    + """\
table { border-collapse: collapse; display: inline-table; margin: .5rem 2rem .5rem 0; vertical-align: top; }
caption { text-align: left; color: var(--dim); } td { padding: 0 .5rem 0 0; text-align: right; }
td.bar { text-align: left; width: 10rem; } td.bar i { display: block; height: .8em; background: var(--bar); }
.note { color: var(--note); } .verdict { font-weight: bold; }
"""
)
SCRIPT = """
document.getElementById("borders").addEventListener("change", event =>
  document.body.classList.toggle("tokens", event.target.checked));
"""


def page(
    title: str,
    views: Sequence[View],
    audit: Audit,
    forecast: Sequence[tuple[str, str]],
    remarks: Sequence[str] = (),
) -> str:
    """The page as HTML. Hovering over a token shows its id; a checkbox shows token borders.

    `forecast`: (name, text) lines. `remarks`: sentences about the base model.
    """
    lines = [
        "<!doctype html>",
        f'<html lang="{language()}"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html(title)}</h1>",
        *[f'<p class="verdict">{html(text)}</p>' for name, text in forecast if name == VERDICT],
        f'<p class="legend">{legend_html()}</p>',
    ]
    lines += map(view_html, views)
    lines += [f"<h1>{tr('The data set')}</h1>", f"<pre>{escape(_audit_text(audit))}</pre>"]
    lines += [f"<p>{tr('model')}: {html(remark)}</p>" for remark in remarks]
    trained, validation = tr("trained"), tr("validation")
    parts = [(trained, audit.train), (validation, audit.validation)]
    for one in audit.sets:
        parts += [(f"{one.name}, {trained}", one.train), (f"{one.name}, {validation}", one.validation)]
    for name, part in parts:
        if part is not None:
            lines += _histograms(name, part)
    if forecast:
        rows = "".join(
            f'<tr><td style="text-align:left">{html(name)}</td><td style="text-align:left">{html(text)}</td></tr>'
            for name, text in shown_names(forecast)
        )
        lines += [f"<h1>{tr('Forecast')}</h1>", f"<table>{rows}</table>"]
    lines += [f"<script>{SCRIPT}</script>", "</body></html>", ""]
    return "\n".join(lines)


def view_html(view: View) -> str:
    """A row's heading and its text in colours, with the id of each token as its title. For `SPANS`."""
    kind = ' class="left-out"' if view.left_out is not None else ""
    return f"<h2{kind}>{html(heading_of(view))}</h2>\n<pre>{''.join(_spans(view))}</pre>"


def legend_html() -> str:
    """What the colours mean, and the checkbox `borders`, for which a page's script sets the class `tokens`."""
    borders = tr("token borders; hover over a token for its id")
    return f'{"".join(_legend())}<label><input type="checkbox" id="borders"> {borders}</label>'


def _spans(view: View) -> Iterator[str]:
    """The spans, split at token borders, so that every token has its id."""
    tokens = iter([(token, len(token.text)) for token in view.tokens if token.text])
    token, left = next(tokens, (None, 0))
    weight = 1.0
    for span in view.text_spans:
        trained = _trained_class(span)
        if span.weight not in (weight, 1):
            yield f'<span class="weight">{weight_text(span.weight)}</span>'
        weight = span.weight
        if span.kind == "cut":
            title = tr("cut: {count:,} characters", count=len(span.text))
            yield f'<span class="cut" title="{title}">{_escaped(span.text)}</span>'
            continue
        start = 0
        while start < len(span.text):
            size = len(span.text) - start
            if token is not None:
                size = min(left, size)
            text = _escaped(span.text[start : start + size])
            title = f' title="{token.id} {escape(printable(token.name))}"' if token is not None else ""
            yield f'<span class="t {span.kind}{trained}"{title}>{text}</span>'
            start, left = start + size, left - size
            if left == 0:
                token, left = next(tokens, (None, 0))


def _trained_class(span: TextSpan) -> str:
    return " trained" if span.trained and span.kind not in ("answer", "end") else ""


def _legend() -> Iterator[str]:
    for kind in SHOWN_IN_LEGEND:
        yield f'<span class="{kind}">{WORDS[kind]}</span>'
    yield f'<span><span class="weight">×0.5</span>{tr("weight in the loss")}</span>'


def _escaped(text: str) -> str:
    return escape(printable(text))


def _audit_text(audit: Audit) -> str:
    out = StringIO()
    print_audit(
        Console(file=out, width=100, color_system=None, highlight=False, markup=False, force_jupyter=False),
        audit,
        bars=False,
    )
    return out.getvalue()


def _histograms(name: str, part: PartAudit) -> Iterator[str]:
    prompts, answers = tr("prompt tokens, examples"), tr("answer tokens, examples")
    for label, lengths in ((prompts, part.prompt_tokens), (answers, part.answer_tokens)):
        yield f"<table><caption>{html(name)}: {label}</caption>{_bars(lengths)}</table>"


def _bars(lengths: Lengths) -> str:
    largest = max(bin_.count for bin_ in lengths.bins)
    return "".join(
        f"<tr><td>{bin_.least:,}-{bin_.most:,}</td>"
        f'<td class="bar"><i style="width:{bin_.count / largest:.1%}"></i></td><td>{bin_.count:,}</td></tr>'
        for bin_ in lengths.bins
    )
