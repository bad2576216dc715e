"""The page of tokens: rows as the model will see them, in colours, for a data file, a template and a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlencode

from starlette.responses import Response

from yeonma.config.yaml_text import write_item
from yeonma.data.template import BUILT_IN
from yeonma.errors import UserError
from yeonma.hub import downloaded
from yeonma.messages import counted, tr
from yeonma.shown import html, html_lines, shell_word
from yeonma.studio.data_page import ENCODINGS, SAMPLES, DataChoice
from yeonma.studio.roots import Found, Roots
from yeonma.studio.studio_page import TOKENS_PATH, copied_text, document, input_field, select_field
from yeonma.studio.token_views import ROWS_A_PAGE, TokenPage, TokenViews

Show = Literal["all", "longest", "shortened", "left_out"]
TrainingVerb = Literal["sft", "dpo"]
SAMPLE_TEMPLATES = ("sample:title_en",)
CUTOFF = 2048
MOST_CUTOFF = 1_000_000
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_MOST_PAGE = 10**9


@dataclass(frozen=True)
class TokenChoice:
    """What the form asks for, as it was written."""

    data_path: str = ""
    template: str = ""
    base_model: str = ""
    objective: TrainingVerb = "sft"
    cutoff_len: int = CUTOFF
    show: Show = "all"
    page: int = 1
    encoding: str = ENCODINGS[0]
    delimiter: str = ""

    @staticmethod
    def of(query: Mapping[str, str]) -> TokenChoice:
        """What is no choice of the form counts as not given."""
        data = DataChoice.of(query)
        show: Show = next((one for one in get_args(Show) if one == query.get("show")), "all")
        objective: TrainingVerb = next(
            (one for one in get_args(TrainingVerb) if one == query.get("objective")), "sft"
        )
        texts = {name: query.get(name, "").strip()[:4096] for name in ("data_path", "template", "base_model")}
        return TokenChoice(
            **texts,
            objective=objective,
            cutoff_len=_number(query.get("cutoff_len", ""), CUTOFF, MOST_CUTOFF),
            show=show,
            page=_number(query.get("page", ""), 1, _MOST_PAGE),
            encoding=data.encoding,
            delimiter=data.delimiter,
        )

    def address(self, **changes: object) -> str:
        return f"{TOKENS_PATH}?{urlencode({**vars(self), **changes}, errors='surrogateescape')}"


def _number(written: str, default: int, most: int) -> int:
    is_number = written.isascii() and written.isdecimal() and len(written) < 12
    return min(int(written), most) if is_number and int(written) else default


def settings_of_choice(choice: TokenChoice, roots: Roots) -> dict[str, str]:
    """The settings of a run, with paths that lie within the roots. Raises UserError for one that does not."""
    data = choice.data_path if choice.data_path in SAMPLES else str(roots.resolve(choice.data_path))
    settings = {"base_model": _model(choice.base_model, roots), "data_path": data}
    settings |= DataChoice(encoding=choice.encoding, delimiter=choice.delimiter).settings()
    if choice.template in (*BUILT_IN, *SAMPLE_TEMPLATES):
        settings["template"] = choice.template
    elif choice.template:
        path = roots.resolve(choice.template)
        if not path.is_file():
            raise UserError(
                tr("it is no template file"), place=choice.template, cure=tr("choose one that is listed")
            )
        settings["template"] = str(path)
    if choice.cutoff_len != CUTOFF:
        settings["cutoff_len"] = str(choice.cutoff_len)
    return settings


def _model(written: str, roots: Roots) -> str:
    """A folder within the roots, or else a name on the hub."""
    try:
        return str(roots.resolve(written))
    except UserError:
        # a name that is a folder of the working directory would be read there
        if HUB_NAME.fullmatch(written) and written in downloaded("model"):
            return written
        raise


def inspect_words(choice: TokenChoice, settings: Mapping[str, str]) -> list[str]:
    """The words of `yeonma inspect` for a choice."""
    words = ["--objective", "dpo"] if choice.objective == "dpo" else []
    return words + [word for name, value in settings.items() for word in (f"--{name}", value)]


def tokens_page(roots: Roots, found: Found, choice: TokenChoice, views: TokenViews) -> Response:
    models = [*map(str, found.models), *downloaded("model")]
    body = [_form(roots, found, models, choice)]
    refresh = 0
    if choice.data_path and choice.base_model:
        try:
            settings = settings_of_choice(choice, roots)
        except UserError as error:
            body.append(f'<div class="alert" role="alert">{_sentences(str(error))}</div>')
        else:
            shown = views.look(inspect_words(choice, settings), choice.show, choice.page)
            refresh = 2 if shown.waiting else 0
            body += _result(choice, shown)
            body.append(_commands(choice, settings))
    elif choice.data_path or choice.template:
        body.append(f"<p>{html(tr('Choose a data file and a model.'))}</p>")
    return document(tr("Tokens"), "".join(body), here=TOKENS_PATH, refresh=refresh)


def _sentences(text: str) -> str:
    return f"<pre>{html_lines(text)}</pre>"


def _form(roots: Roots, found: Found, models: list[str], choice: TokenChoice) -> str:
    data = [*SAMPLES, *map(str, found.data)]
    templates = [
        ("", tr("by the columns")),
        *((name, name) for name in (*BUILT_IN, *SAMPLE_TEMPLATES)),
        *((str(path), roots.name_of(path)) for path in found.templates),
    ]
    if choice.template and choice.template not in [value for value, _ in templates]:
        templates.append((choice.template, choice.template))
    model = choice.base_model or (models[0] if models else "")
    objectives = [("sft", tr("answers (sft)")), ("dpo", tr("preferences (dpo)"))]
    shows = [
        ("all", tr("all rows")),
        ("longest", tr("longest first")),
        ("shortened", tr("shortened rows")),
        ("left_out", tr("rows left out")),
    ]
    fields = [
        input_field("data_path", tr("data file"), choice.data_path, data),
        select_field("template", tr("template"), templates, choice.template),
        input_field("base_model", tr("model"), model, models),
        select_field("objective", tr("training"), objectives, choice.objective),
        f'<label>{html(tr("most tokens of an example"))}<input name="cutoff_len" type="number" min="1" '
        f'max="{MOST_CUTOFF}" value="{choice.cutoff_len}"></label>',
        select_field("show", tr("show"), shows, choice.show),
        f'<input type="hidden" name="encoding" value="{html(choice.encoding)}">',
        f'<input type="hidden" name="delimiter" value="{html(choice.delimiter)}">',
        f"<button>{html(tr('Show the rows'))}</button>",
    ]
    return f'<form class="choose" method="get" action="{TOKENS_PATH}">{"".join(fields)}</form>'


def _result(choice: TokenChoice, shown: TokenPage) -> Iterator[str]:
    if shown.problem:
        yield f'<div class="alert" role="alert">{_sentences(shown.problem)}</div>'
        return
    if shown.waiting:
        waiting = html(
            tr("The rows are being tokenised ({what}). This page asks again by itself.", what=shown.waiting)
        )
        yield f'<p role="status">{waiting}</p>'
        return
    yield f"<h2>{html(tr('The data set'))}</h2><dl>"
    yield from (f"<dt>{html(name)}</dt><dd>{html(text)}</dd>" for name, text in shown.about)
    yield "</dl>"
    if not shown.rows:
        yield f"<p>{html(tr('There are no such rows.'))}</p>"
        return
    yield _pages(choice, shown.rows)
    yield f'<p class="legend">{shown.legend}</p>{shown.html}'
    yield _pages(choice, shown.rows)


def _pages(choice: TokenChoice, rows: int) -> str:
    last = -(-rows // ROWS_A_PAGE)
    said = tr(
        "page {page:,} of {last:,}, {rows}", page=min(choice.page, last), last=last, rows=counted(rows, "row")
    )
    links = []
    for page, name in ((choice.page - 1, tr("previous")), (choice.page + 1, tr("next"))):
        if 1 <= page <= last:
            links.append(f'<a href="{html(choice.address(page=page))}">{html(name)}</a>')
    return f'<nav class="pages" aria-label="{html(tr("pages of rows"))}">{"".join(links)} {html(said)}</nav>'


def _commands(choice: TokenChoice, settings: Mapping[str, str]) -> str:
    inspect = " ".join(map(shell_word, ["yeonma", "inspect", *inspect_words(choice, settings)]))
    output = "out"
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    train = " ".join(map(shell_word, ["yeonma", choice.objective, *words, "--output_dir", output]))
    yaml = "".join(write_item(name, value) for name, value in {**settings, "output_dir": output}.items())
    return (
        f"<h2>{html(tr('The same in a terminal'))}</h2>{copied_text('command', html(inspect), tr('command'))}"
        f"<h2>{html(tr('To train on it'))}</h2>{copied_text('train', html(train), tr('command'))}"
        f"<details><summary>{html(tr('Settings as YAML'))}</summary>"
        f"{copied_text('settings', html_lines(yaml), tr('settings'))}</details>"
    )
