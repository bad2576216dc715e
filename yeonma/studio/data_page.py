"""The page of data: a file as it is read, before any template: its columns, its first rows, and what is odd in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from urllib.parse import urlencode

from starlette.responses import Response

from yeonma.data.columns import filled_columns, is_filled, recognise
from yeonma.data.preference_pairs import SIDES
from yeonma.data.rows import Row, Rows, glance
from yeonma.errors import UserError
from yeonma.messages import counted, tr
from yeonma.shown import has_hidden, html, html_lines, json_text
from yeonma.studio.roots import Found, Roots
from yeonma.studio.studio_page import (
    DATA_PATH,
    TOKENS_PATH,
    document,
    input_field,
    select_field,
)

SAMPLES = ("sample:news_en", "sample:news_ko", "sample:pairs_en")
ENCODINGS = ("utf-8", "cp949", "utf-16", "latin-1", "shift_jis", "gb18030")
DELIMITERS = ("", ",", ";", "tab", "|")
READ_ROWS = 1_000
"""Rows that the page is about, from the first on."""
SHOWN_ROWS = 8
SHOWN_CHARACTERS = 300
"""Of a value in the preview."""
MOST_LABELS = 20
"""A column with more values than these holds no labels."""
ROWS_PER_LABEL = 5
MOST_COLUMNS = 100


@dataclass(frozen=True)
class DataChoice:
    """What the form asks for, as it was written. `template` is passed on to the page of tokens."""

    data_path: str = ""
    encoding: str = ENCODINGS[0]
    delimiter: str = ""
    template: str = ""

    @staticmethod
    def of(query: Mapping[str, str]) -> DataChoice:
        """What is no choice of the form counts as not given."""
        encoding, delimiter = query.get("encoding", ""), query.get("delimiter", "")
        return DataChoice(
            query.get("data_path", "").strip()[:4096],
            encoding if encoding in ENCODINGS else ENCODINGS[0],
            delimiter if delimiter in DELIMITERS else "",
            query.get("template", "").strip()[:4096],
        )

    def settings(self) -> dict[str, str]:
        """How the file is read, as far as it is not read so anyway."""
        settings = {"encoding": self.encoding} if self.encoding != ENCODINGS[0] else {}
        return {**settings, **({"delimiter": self.delimiter} if self.delimiter else {})}


@dataclass
class ColumnFacts:
    """What was seen of a column in the rows that were read."""

    filled: int = 0
    hidden: int = 0
    """Values with invisible characters."""
    lengths: list[int] = field(default_factory=list)
    """In characters, of the filled values."""
    values: Counter[str] = field(default_factory=Counter)

    def add(self, value: object) -> None:
        if not is_filled(value) and not isinstance(value, int | float):
            return
        text = value if isinstance(value, str) else json_text(value, default=str)
        self.filled += 1
        self.lengths.append(len(text))
        self.hidden += has_hidden(text)
        self.values[text[:SHOWN_CHARACTERS]] += 1

    @property
    def labels(self) -> list[tuple[str, int]]:
        """Values with their counts, the most frequent first, if these look like labels."""
        is_few = 1 < len(self.values) <= min(MOST_LABELS, self.filled // ROWS_PER_LABEL)
        return sorted(self.values.items(), key=lambda item: (-item[1], item[0])) if is_few else []


def data_page(roots: Roots, found: Found, choice: DataChoice) -> Response:
    body = [_form(found, choice)]
    if choice.data_path:
        try:
            path = choice.data_path if choice.data_path in SAMPLES else str(roots.resolve(choice.data_path))
            body += _file(path, choice)
        except UserError as error:
            body.append(f'<div class="alert" role="alert"><pre>{html_lines(str(error))}</pre></div>')
    return document(tr("Data"), "".join(body), here=DATA_PATH)


def _form(found: Found, choice: DataChoice) -> str:
    data = [*SAMPLES, *map(str, found.data)]
    delimiters = [(one, one or tr("as found")) for one in DELIMITERS]
    fields = [
        input_field("data_path", tr("data file"), choice.data_path, data),
        select_field("encoding", tr("encoding"), [(one, one) for one in ENCODINGS], choice.encoding),
        select_field("delimiter", tr("separator of columns (CSV)"), delimiters, choice.delimiter),
        f'<input type="hidden" name="template" value="{html(choice.template)}">',
        f"<button>{html(tr('Look at the file'))}</button>",
    ]
    return f'<form class="choose" method="get" action="{DATA_PATH}">{"".join(fields)}</form>'


def _file(path: str, choice: DataChoice) -> Iterator[str]:
    """Raises UserError as the file is read."""
    rows = glance(
        path, encoding=choice.encoding, delimiter=choice.delimiter or None, max_rows=READ_ROWS, skip_bad=True
    )
    if rows is None:
        raise UserError(
            tr("it cannot be looked at in the browser"),
            place=path,
            cure=tr("look at it in a terminal: yeonma inspect"),
        )
    read = list(islice(rows, READ_ROWS))
    faults = [row.fault for row in read if row.fault is not None]
    good = [row for row in read if row.fault is None]
    size = counted(len(read), "row")
    is_more = len(read) == READ_ROWS
    said = tr("The first {rows}.", rows=size) if is_more else tr("{rows}, which is all.", rows=size)
    yield f"<p>{html(said)}</p>"
    yield from (f"<p>{html(note)}</p>" for note in rows.notes)
    if faults:
        bad = tr("{rows} cannot be read, first: {fault}", rows=counted(len(faults), "row"), fault=faults[0])
        yield f'<p class="alert">{html(bad)}</p>'
    if repeated := len(good) - len({json_text(dict(row.values), default=str) for row in good}):
        yield f"<p>{html(tr('{rows} repeat an earlier row.', rows=counted(repeated, 'row')))}</p>"
    yield _templates(rows, choice)
    yield from _columns(rows, good)
    yield from _preview(rows, good[:SHOWN_ROWS])


def _templates(rows: Rows, choice: DataChoice) -> str:
    """What the columns fit, and the way to the tokens."""
    template = choice.template
    if template:
        said = tr("Template: {template}", template=template)
    elif {*SIDES} <= {*rows.columns}:
        said = tr("The columns hold two answers to each prompt, chosen and rejected.")
    else:
        try:
            said = recognise(filled_columns(rows)).reason
        except UserError as error:
            said = str(error)
    links = []
    for verb, name in (("sft", tr("Tokens, as answers (sft)")), ("dpo", tr("Tokens, as preferences (dpo)"))):
        query = {"data_path": choice.data_path, "template": template, "objective": verb, **choice.settings()}
        address = f"{TOKENS_PATH}?{urlencode(query, errors='surrogateescape')}"
        links.append(f'<a class="button" href="{html(address)}">{html(name)}</a>')
    return f'<p>{html(said)}</p><p class="pages">{"".join(links)}</p>'


def _columns(rows: Rows, good: Sequence[Row]) -> Iterator[str]:
    facts = {name: ColumnFacts() for name in rows.columns[:MOST_COLUMNS]}
    for row in good:
        for name, value in row.values.items():
            if name in facts:
                facts[name].add(value)
    yield f'<h2 id="columns">{html(tr("Columns"))}</h2>'
    yield '<div class="wide" tabindex="0" role="region" aria-labelledby="columns"><table><thead><tr>'
    heads = (
        tr("column"),
        tr("filled"),
        tr("different"),
        tr("characters, median"),
        tr("at most"),
        tr("hidden characters"),
    )
    yield "".join(f'<th scope="col">{html(head)}</th>' for head in heads)
    yield "</tr></thead><tbody>"
    for name, column in facts.items():
        numbers = (
            f"{column.filled:,}",
            f"{len(column.values):,}",
            f"{median(column.lengths):,.0f}" if column.lengths else "-",
            f"{max(column.lengths):,}" if column.lengths else "-",
            f"{column.hidden:,}",
        )
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        yield f'<tr><th scope="row">{html(name)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
    for name, column in facts.items():
        if column.labels:
            counts = ", ".join(f"{label} {count:,}" for label, count in column.labels)
            said = tr("The values of {column} look like labels: {counts}", column=name, counts=counts)
            yield f"<p>{html(said)}</p>"


def _preview(rows: Rows, shown: Sequence[Row]) -> Iterator[str]:
    yield f"<h2>{html(tr('First rows'))}</h2>"
    for row in shown:
        yield f"<h3>{html(row.place)}</h3><dl>"
        for name in rows.columns[:MOST_COLUMNS]:
            value = row.values.get(name)
            text = value if isinstance(value, str) else json_text(value, default=str)
            if len(text) > SHOWN_CHARACTERS:
                text = f"{text[:SHOWN_CHARACTERS]}…"
            yield f"<dt>{html(name)}</dt><dd><pre>{html_lines(text)}</pre></dd>"
        yield "</dl>"
