"""What the calls return: paths and numbers, with the text of the command line as `repr`, and HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeonma import svg
from yeonma.messages import counted, tr
from yeonma.shown import html, html_lines, many_lines

if TYPE_CHECKING:
    from rich.console import Console

    from yeonma.config.settings import InspectSettings
    from yeonma.evaluate.eval_part import EvalReport
    from yeonma.evaluate.report import ComparisonReport
    from yeonma.export.merged_model import Agreement
    from yeonma.inspect.audit import Audit
    from yeonma.inspect.forecast import Forecast
    from yeonma.inspect.inspect_run import Inspection
    from yeonma.tokenization.explain import View
    from yeonma.verify.file_checks import Finding
    from yeonma.verify.verify_folder import VerifyReport

WIDTH = 100
"""Columns of a text."""
PAGE_HEIGHT = 640
"""Pixels of a page within a notebook."""
SHOWN_ANSWERS = 20
"""Rows of a table of answers; all are in `rows`."""

LOSS = tr("loss over the steps")

LossPoints = Sequence[tuple[int, float]]
"""(step, loss)."""


@dataclass(frozen=True, repr=False)
class RunResult:
    """A finished run. It stands for its folder wherever a path is expected, and `run / "README.md"` is a file in it."""

    folder: Path
    training_losses: LossPoints
    """Of each step."""
    validation_losses: LossPoints
    """Of each evaluation; that of step 0 is the loss before training."""
    loss_svg: str = field(compare=False)
    """The losses as a plot; empty if the run left none."""

    @property
    def steps(self) -> int:
        """How many steps were trained."""
        return self.training_losses[-1][0] if self.training_losses else 0

    @property
    def card(self) -> Path:
        """The model card."""
        return self.folder / "README.md"

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: steps and evaluations in their order, for a DataFrame or a plot."""
        from yeonma.run_folder.run_log import METRICS, read_metrics

        return read_metrics(self.folder / METRICS)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __repr__(self) -> str:
        return many_lines("\n".join(self._lines()))

    def _repr_html_(self) -> str:
        return _pre(repr(self)) + (svg.image(self.loss_svg, LOSS) if self.loss_svg else "")

    def _lines(self) -> Iterator[str]:
        yield tr("{folder}: finished after {steps}", folder=self.folder, steps=counted(self.steps, "step"))
        if self.validation_losses:
            best_step, best = min(self.validation_losses, key=lambda point: point[1])
            first_step, first = self.validation_losses[0]
            lowest = tr("lowest {best:.4f} after step {step:,}", best=best, step=best_step)
            if first_step == 0:
                lowest = tr("{first:.4f} before training, {lowest}", first=first, lowest=lowest)
            yield tr("  validation loss  {losses}", losses=lowest)
        if self.training_losses:
            first, last = self.training_losses[0][1], self.training_losses[-1][1]
            yield tr("  training loss    {first:.4f} to {last:.4f}", first=first, last=last)
        yield tr("  model card       {path}", path=self.card)


def run_result(folder: Path) -> RunResult:
    """The result of the run in `folder`. Raises UserError if its metrics.jsonl is damaged."""
    from yeonma.run_folder.run_log import METRICS, read_metrics

    lines = [line for line in read_metrics(folder / METRICS) if line.get("loss") is not None]
    training, validation = (
        tuple((line["step"], line["loss"]) for line in lines if bool(line.get("evaluation")) is evaluation)
        for evaluation in (False, True)
    )
    plot = folder / "loss.svg"
    return RunResult(folder, training, validation, plot.read_text("utf-8") if plot.is_file() else "")


@dataclass(frozen=True, repr=False)
class InspectResult:
    """What a run would train on."""

    inspection: Inspection
    settings: InspectSettings

    @property
    def rows(self) -> tuple[View, ...]:
        """The rows that were asked for, as the model will see them: tokens, trained or not, prompt and answer."""
        return tuple(self.inspection.views)

    @property
    def audit(self) -> Audit:
        """Counts, lengths and findings of the whole data set."""
        return self.inspection.audit

    @property
    def forecast(self) -> Forecast | None:
        """Memory and time; None if the model cannot be traced without its weights."""
        return self.inspection.forecast

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences about the base model."""
        return tuple(self.inspection.remarks)

    def __repr__(self) -> str:
        from yeonma.inspect.inspect_run import print_inspection

        console, out = text_console(soft_wrap=True)
        print_inspection(self.inspection, self.settings, console)
        return out.getvalue().rstrip("\n")

    def _repr_html_(self) -> str:
        return _page_frame(self.inspection.web_page)


@dataclass(frozen=True, repr=False)
class GenerateResult:
    """The answers to rows, in their order: `pandas.DataFrame(result.rows)` is a table of them."""

    rows: tuple[dict[str, Any], ...]
    """Of each row its number (`row`), the `answer`, and where there are any `reasoning_content` and `reference`."""

    @property
    def answers(self) -> list[str]:
        return [row["answer"] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for column in self._columns():
            table.add_column(Text(column), overflow="fold")
        for cells in self._cells():
            table.add_row(*(Text(many_lines(cell)) for cell in cells))
        console, out = text_console()
        console.print(table)
        lines = "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
        return f"{lines}\n{self._rest()}".rstrip()

    def _repr_html_(self) -> str:
        heads = "".join(f"<th>{html(column)}</th>" for column in self._columns())
        style = 'style="text-align:left;white-space:pre-wrap"'
        rows = "".join(
            "<tr>" + "".join(f"<td {style}>{html_lines(cell)}</td>" for cell in cells) + "</tr>"
            for cells in self._cells()
        )
        return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>{html(self._rest())}"

    def _columns(self) -> list[str]:
        names = ("row", "reasoning_content", "answer", "reference")
        return [name for name in names if any(name in row for row in self.rows)]

    def _cells(self) -> Iterator[list[str]]:
        for row in self.rows[:SHOWN_ANSWERS]:
            yield [str(row.get(column, "")) for column in self._columns()]

    def _rest(self) -> str:
        more = len(self.rows) - SHOWN_ANSWERS
        return counted(more, "more row is in `rows`", "more rows are in `rows`") if more > 0 else ""


@dataclass(frozen=True, repr=False)
class CompareResult:
    """A report on models that answered the same rows."""

    folder: Path
    report: ComparisonReport
    """The content of report.json."""

    @property
    def web_page(self) -> Path:
        """The report as a page that needs no network."""
        return self.folder / "report.html"

    @property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """Metric -> model -> value."""
        names = [model["name"] for model in self.report["models"]]
        return {
            metric["key"]: dict(zip(names, metric["values"], strict=True))
            for metric in self.report["metrics"]
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Each row with its prompt, its reference (`wanted`) and the answers in the order of the models."""
        return list(self.report["rows"])

    def __repr__(self) -> str:
        from yeonma.evaluate.report import print_report

        console, out = text_console()
        print_report(console, self.report)
        return tr(
            "{out}\n\n{web_page} shows all answers side by side.",
            out=out.getvalue().rstrip(),
            web_page=many_lines(str(self.web_page)),
        )

    def _repr_html_(self) -> str:
        return _pre(repr(self))


@dataclass(frozen=True, repr=False)
class EvalResult:
    """The benchmarks of a fine-tuned model and its base."""

    path: Path
    report: EvalReport
    """The content of that file: eval.json."""

    @property
    def scores(self) -> list[dict[str, Any]]:
        """Each metric of each task and group, with its values in the order of the models, and the difference."""
        return list(self.report["scores"])

    def items(self, task: str) -> list[dict[str, Any]]:
        """Each question of a task, with the scores and responses of both models."""
        return list(self.report["tasks"][task]["items"])

    def __repr__(self) -> str:
        from yeonma.evaluate.eval_part import print_eval

        console, out = text_console()
        print_eval(console, self.report)
        return out.getvalue().strip("\n")

    def _repr_html_(self) -> str:
        return _pre(repr(self))


@dataclass(frozen=True, repr=False)
class MergeResult:
    """A merged model, which gave the same answers as the adapter on its base."""

    folder: Path
    agreement: Agreement

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        agreement = self.agreement
        values = {
            "folder": self.folder,
            "same": agreement.same_answers,
            "rows": agreement.rows,
            "difference": agreement.max_difference,
            "tolerance": agreement.tolerance,
        }
        return many_lines(
            tr(
                "{folder} is a complete model; it loads without the adapter's folder\n"
                "  {same} of {rows} greedy answers are the same; largest difference of a logit "
                "{difference:.2g}, rounding explains up to {tolerance:.2g}",
                **values,
            )
        )

    def _repr_html_(self) -> str:
        return _pre(repr(self))


@dataclass(frozen=True, repr=False)
class VerifyResult:
    """The findings about a folder."""

    report: VerifyReport

    @property
    def is_well(self) -> bool:
        """Whether no check found a difference."""
        return self.report.is_well

    @property
    def findings(self) -> tuple[Finding, ...]:
        return self.report.findings

    def __repr__(self) -> str:
        from yeonma.commands.verify import lines_of

        return many_lines("\n".join(lines_of(self.report)))

    def _repr_html_(self) -> str:
        return _pre(repr(self))


@dataclass(frozen=True, repr=False)
class ExportResult:
    """The files for llama.cpp or Ollama."""

    folder: Path
    files: tuple[Path, ...]
    text: str
    """What the command prints: sizes, and what to do next."""

    def __repr__(self) -> str:
        return many_lines(self.text)

    def _repr_html_(self) -> str:
        return _pre(repr(self))


@dataclass(frozen=True, repr=False)
class PushResult:
    """What was uploaded to the hub."""

    repo: str
    files: tuple[str, ...]
    url: str | None
    """Of the commit; None if nothing was sent."""

    def __repr__(self) -> str:
        if self.url is None:
            files = counted(len(self.files), "file")
            return many_lines(
                tr("nothing was sent to {repo}; it would get {files}", repo=self.repo, files=files)
            )
        return many_lines(
            tr(
                "{uploads} uploaded and verified: {url}",
                uploads=counted(len(self.files), "file"),
                url=self.url,
            )
        )

    def _repr_html_(self) -> str:
        return _pre(repr(self))


# How they are shown


def text_console(*, soft_wrap: bool = False) -> tuple[Console, StringIO]:
    """A console that writes text into memory, also in a notebook. `soft_wrap`: long lines stay whole."""
    from rich.console import Console

    out = StringIO()
    console = Console(
        file=out,
        width=WIDTH,
        color_system=None,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=soft_wrap,
        force_terminal=False,
        force_jupyter=False,
    )
    return console, out


def _pre(text: str) -> str:
    return f'<pre style="white-space:pre-wrap">{html_lines(text)}</pre>'


def _page_frame(page: str) -> str:
    """A whole page with its own style and script, which reach nothing outside of it."""
    from html import escape

    look = f"width:100%;height:{PAGE_HEIGHT}px;border:0"
    return f'<iframe sandbox="allow-scripts" style="{look}" srcdoc="{escape(page)}"></iframe>'
