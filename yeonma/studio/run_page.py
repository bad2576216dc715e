"""The page of one run, and the parts of it that change while it runs."""

from __future__ import annotations

from html import escape

from starlette.responses import Response

from yeonma.durations import in_two_units
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.shown import html, html_lines, many_lines, shell_word
from yeonma.studio.charts import charts
from yeonma.studio.curves import Curves, read_curves
from yeonma.studio.found_runs import FoundRun, log_tail
from yeonma.studio.home_page import state_text, step_text, when_changed
from yeonma.studio.roots import Roots
from yeonma.studio.run_control import RunControl, resume_command, settings_text
from yeonma.studio.studio_page import copied_text, document

LOG_LINES = 40


def run_page(roots: Roots, run: FoundRun, control: RunControl, *, problem: str = "") -> Response:
    """problem: why what was just asked for is not possible."""
    parts = live_parts(run, control)
    alert = f'<p class="alert" role="alert">{html(problem)}</p>' if problem else ""
    log = html(tr("What it printed"))
    body = [
        f'<p class="dim">{html(str(run.folder))}</p>{alert}',
        f'<div data-events="/run/{run.key}/events">',
        f'<div id="state" role="status">{parts["state"]}</div><div id="facts">{parts["facts"]}</div>',
        f'<div id="controls">{parts["controls"]}</div>',
        f'<h2>{html(tr("Curves"))}</h2><div id="charts">{parts["charts"]}</div>',
        f'<h2 id="log-heading">{log}</h2>',
        f'<pre id="log" tabindex="0" role="region" aria-labelledby="log-heading">{parts["log"]}</pre></div>',
        _commands(run, control),
    ]
    return document(roots.name_of(run.folder), "".join(body), status=409 if problem else 200)


def live_parts(run: FoundRun, control: RunControl) -> dict[str, str]:
    """Id of a part of the page -> its HTML."""
    curves = read_curves(run.folder)
    return {
        "state": _state(run, control),
        "facts": _facts(run, curves),
        "controls": _controls(run, control),
        "charts": _charts(curves),
        "log": html_lines("\n".join(log_tail(run.folder, LOG_LINES))),
    }


def _state(run: FoundRun, control: RunControl) -> str:
    """What a screen reader says when it changes: not the numbers of every step."""
    lines = [f"<p>{state_text(run)}</p>"]
    lines += [f'<p class="alert">{html(line)}</p>' for line in run.message.splitlines()]
    if control.is_stopping(run):
        lines.append(f"<p>{html(tr('It saves a checkpoint and stops after this step.'))}</p>")
    elif run.state != "running" and control.is_starting(run):
        lines.append(f"<p>{html(tr('It is starting, which takes some seconds.'))}</p>")
    elif (failure := control.failure(run)) is not None:
        said = html(tr("It was not resumed:"))
        lines.append(f'<p class="alert">{said}</p><pre>{html_lines(chr(10).join(failure[1]))}</pre>')
    return "".join(lines)


def _facts(run: FoundRun, curves: Curves) -> str:
    facts = []
    progress = ""
    if curves.steps:
        facts.append(step_text(curves.last_step, run.total_steps))
        if losses := curves.points("loss"):
            facts.append(tr("loss {loss:.4f}", loss=losses[-1][1]))
        if evaluated := curves.points("loss", evaluations=True):
            facts.append(tr("validation loss {loss:.4f}", loss=evaluated[-1][1]))
        if rates := curves.tokens_per_second():
            facts.append(tr("{rate} tokens/s", rate=f"{rates[-1][1]:,.0f}"))
    if run.total_steps is not None:
        label = html(tr("progress"))
        progress = (
            f'<progress max="{run.total_steps}" value="{curves.last_step}" aria-label="{label}"></progress>'
        )
        left = curves.seconds_left(run.total_steps)
        if run.state == "running" and left is not None:
            facts.append(tr("about {time} left for the steps", time=in_two_units(left)))
    facts.append(when_changed(run))
    return f"<p>{html(', '.join(facts))}</p>{progress}"


def _controls(run: FoundRun, control: RunControl) -> str:
    if run.state == "running":
        if run.process is None:
            return f'<p class="dim">{html(tr("It runs on another machine, or as another user: stop it there."))}</p>'
        if control.is_stopping(run):
            return ""
        return _button(run, "stop", tr("Stop with a checkpoint"))
    if run.state == "finished" or control.is_starting(run):
        return ""
    return _button(run, "resume", tr("Resume"))


def _button(run: FoundRun, action: str, label: str) -> str:
    return (
        f'<form class="inline" method="post" action="/run/{run.key}/{action}">'
        f'<button id="{action}">{html(label)}</button></form>'
    )


def _charts(curves: Curves) -> str:
    drawn = charts(curves)
    if not drawn:
        return f'<p class="dim">{html(tr("There are no steps yet."))}</p>'
    some = tr("The run is long: the curves are drawn from {count:,} of its steps.", count=len(curves.steps))
    note = "" if curves.is_whole else f'<p class="dim">{html(some)}</p>'
    return f'<div class="charts">{drawn}</div>{note}'


def _commands(run: FoundRun, control: RunControl) -> str:
    heading = f"<h2>{html(tr('The same in a terminal'))}</h2>"
    try:
        command = resume_command(run, allow_code=True)
    except UserError as error:
        return f'{heading}<p class="dim">{html(str(error))}</p>'
    words = " ".join(map(shell_word, command.shown))
    line = f"cd {shell_word(str(command.folder))} && {words}"
    text = copied_text("command", html(line), tr("command"))
    yaml = copied_text("settings", escape(many_lines(settings_text(run))), tr("settings"))
    summary = html(tr("Settings as YAML"))
    return f"{heading}{text}<details><summary>{summary}</summary>{yaml}</details>"
