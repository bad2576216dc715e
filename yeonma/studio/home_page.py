"""The first page: what the machine has left, ways to begin, and the runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlencode

from starlette.responses import Response

from yeonma.language import language
from yeonma.messages import counted, tr
from yeonma.shown import html
from yeonma.studio.charts import sparkline
from yeonma.studio.curves import read_curves
from yeonma.studio.found_runs import STATES, FoundRun, signature
from yeonma.studio.machine import machine_lines
from yeonma.studio.roots import Roots
from yeonma.studio.studio_page import DATA_PATH, HOME_PATH, copied_text, document

SHOWN_RUNS = 30
"""Runs on the page, the latest first."""
SPARK_PLACES = 60
"""At how many places a long run is read for its small curve."""


@dataclass(frozen=True)
class StartTile:
    """A way to begin: what it is called and about, and the choices with which the page of data opens."""

    name: str
    about: str
    choices: dict[str, str]


def start_tiles() -> list[StartTile]:
    news = f"sample:news_{language()}"
    title = "title" if language() == "ko" else "sample:title_en"
    return [
        StartTile(
            tr("Titles"),
            tr("A text in, a title out. Opens with the bundled news articles."),
            {"data_path": news, "template": title},
        ),
        StartTile(
            tr("Classifier"),
            tr("A text in, one of a few labels out. Needs your file with the columns prompt and completion."),
            {"template": "prompt-completion"},
        ),
        StartTile(
            tr("Chatbot"),
            tr("Conversations with the model's own chat template. Needs your file with the column messages."),
            {"template": "chat"},
        ),
        StartTile(
            tr("Preferences"),
            tr("Two answers to a prompt, of which one is better. Opens with the bundled pairs."),
            {"data_path": "sample:pairs_en", "template": "sample:title_en"},
        ),
    ]


def home_page(roots: Roots, runs: Sequence[FoundRun], *, is_whole: bool) -> Response:
    """is_whole: whether all folders were looked into."""
    body = [f'<section aria-labelledby="runs-heading"><h2 id="runs-heading">{html(tr("Runs"))}</h2>']
    body += _runs(roots, runs, is_whole=is_whole)
    body.append(f'</section><section aria-labelledby="start"><h2 id="start">{html(tr("Begin"))}</h2>')
    body += _tiles()
    body.append(
        f'</section><section aria-labelledby="machine"><h2 id="machine">{html(tr("This machine"))}</h2><dl>'
    )
    body += (f"<dt>{html(name)}</dt><dd>{html(text)}</dd>" for name, text in machine_lines(roots))
    body.append("</dl></section>")
    return document(tr("Studio"), "".join(body), here=HOME_PATH)


def _runs(roots: Roots, runs: Sequence[FoundRun], *, is_whole: bool) -> Iterator[str]:
    if not runs:
        folders = ", ".join(map(str, roots.folders))
        yield f"<p>{html(tr('There is no run in {folders} yet.', folders=folders))}</p>"
    else:
        yield '<ul class="cards">'
        for run in sorted(runs, key=lambda run: (-run.changed, run.folder))[:SHOWN_RUNS]:
            yield _run_card(roots, run)
        yield "</ul>"
    if len(runs) > SHOWN_RUNS:
        more = tr("The latest {shown} of {runs} are shown.", shown=SHOWN_RUNS, runs=counted(len(runs), "run"))
        yield f'<p class="dim">{html(more)}</p>'
    if not is_whole:
        few = tr(
            "Not all folders were looked into: start the studio with --root and a folder nearer to the runs."
        )
        yield f'<p class="dim">{html(few)}</p>'


def _run_card(roots: Roots, run: FoundRun) -> str:
    spark, last_step = _spark(run.folder, signature(run.folder))
    facts = [when_changed(run)]
    if last_step:
        facts.insert(0, step_text(last_step, run.total_steps))
    message = f'<p class="alert">{html(run.message.splitlines()[-1])}</p>' if run.message else ""
    return (
        f'<li><a href="/run/{run.key}">{html(roots.name_of(run.folder))}</a> {state_text(run)}'
        f'{spark}{message}<p class="dim">{html(", ".join(facts))}</p></li>'
    )


@lru_cache(maxsize=500)
def _spark(folder: Path, seen: object) -> tuple[str, int]:
    """The small curve of a run and its last step. seen: the signature of the files that it is made of."""
    curves = read_curves(folder, SPARK_PLACES, evaluations=False)
    return sparkline(curves), curves.last_step


def state_text(run: FoundRun) -> str:
    return f'<span class="state {run.state}">{html(tr(STATES[run.state]))}</span>'


def step_text(step: int, total: int | None) -> str:
    return (
        tr("step {step:,} of {total:,}", step=step, total=total)
        if total is not None
        else tr("step {step:,}", step=step)
    )


def when_changed(run: FoundRun) -> str:
    return f"{datetime.fromtimestamp(run.changed):%Y-%m-%d %H:%M}"


def _tiles() -> Iterator[str]:
    yield '<ul class="cards">'
    for tile in start_tiles():
        address = f"{DATA_PATH}?{urlencode(tile.choices)}"
        yield f'<li><a href="{html(address)}">{html(tile.name)}</a><p class="dim">{html(tile.about)}</p></li>'
    about = tr("A small model learns titles from bundled articles, in a few minutes. In a terminal:")
    command = copied_text("demo", "yeonma demo", tr("command"))
    yield f'<li><b>{html(tr("Demo"))}</b><p class="dim">{html(about)}</p>{command}</li></ul>'
