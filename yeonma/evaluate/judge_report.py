"""What a judge said, for the report: its entries, its sentences, and its tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from yeonma.evaluate.judge import Judged
from yeonma.evaluate.judge_verdicts import judged_pairs
from yeonma.evaluate.verdict import SIGNIFICANT_P, format_number, format_p
from yeonma.messages import counted, later, tr
from yeonma.shown import one_line

PREFERS = later(
    "The judge {judge} prefers {model} to {other}: {model} wins {rate}% of {rows} ({interval}), a tie "
    "counting one half."
)
NO_PREFERENCE = later(
    "The judge {judge} shows no difference between {model} and {other}: {model} wins {rate}% of {rows} ({interval}), a "
    "tie counting one half."
)
GREAT_BIAS = 0.4
"""The share of rows that the order decides, from which on the judge is doubted. One that guesses has 1/2."""
JudgeEntry = Mapping[str, Any]
"""The entry `judge` of report.json."""


def judge_entry(judged: Judged, seed: int) -> dict[str, Any]:
    """The numbers, without the address of the server, which may be private."""
    numbers = judged_pairs(judged.rows, seed)
    return {
        "model": judged.judge.model,
        "rubric": judged.rubric.name,
        "rubric_text": judged.rubric.text,
        "with_reference": judged.with_reference,
        "refused": judged.refused,
        "unreadable": judged.unreadable,
        "first_place": judged.first / judged.decided if judged.decided else None,
        "pairs": [
            {"models": list(models), **_listed(asdict(pair))}
            for models, pair in zip(judged.pairs, numbers, strict=True)
        ],
    }


def _listed(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """With lists in the place of tuples, as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()}


def row_entries(judged: Judged, row: int) -> list[dict[str, Any]]:
    """Of one row, for each pair: who wins, and both verdicts by model with their reasons."""
    return [
        {
            "models": list(models),
            "result": rows[row].result,
            "verdicts": list(rows[row].by_model),
            "reasons": list(rows[row].reasons),
        }
        for models, rows in zip(judged.pairs, judged.rows, strict=True)
    ]


def judge_sentences(entry: JudgeEntry, names: Sequence[str]) -> Iterator[str]:
    """What the judge says of each model against the first one."""
    for pair in entry["pairs"]:
        first, second = pair["models"]
        if first != 0:
            continue
        rows = pair["wins"][0] + pair["wins"][1] + pair["ties"] + pair["equal"]
        if pair["win_rate"] is None or pair["win_interval"] is None or pair["p_corrected"] is None:
            yield tr(
                "The judge {judge} gave too few verdicts on {model} and {other}: {rows} with a result.",
                judge=entry["model"],
                model=names[second],
                other=names[first],
                rows=counted(rows, "row"),
            )
            continue
        is_shown = pair["p_corrected"] < SIGNIFICANT_P and pair["win_rate"] != 0.5
        is_better = pair["win_rate"] > 0.5 or not is_shown
        model, other = (second, first) if is_better else (first, second)
        rate = pair["win_rate"] if is_better else 1 - pair["win_rate"]
        ends = pair["win_interval"] if is_better else [1 - end for end in reversed(pair["win_interval"])]
        low, high = (format_number(100 * end) for end in ends)
        yield tr(
            PREFERS if is_shown else NO_PREFERENCE,
            judge=entry["model"],
            model=names[model],
            other=names[other],
            rate=format_number(100 * rate),
            rows=counted(rows, "row"),
            interval=tr(
                "95% interval {low} to {high}, {p}", low=low, high=high, p=format_p(pair["p_corrected"])
            ),
        )


def judge_notes(entry: JudgeEntry, names: Sequence[str]) -> Iterator[str]:
    """What a reader of the numbers should know."""
    for pair in entry["pairs"]:
        if (share := pair["place_bias"]) is not None and share >= GREAT_BIAS:
            first, second = pair["models"]
            yield tr(
                "The judge chose by the order of the answers, not by the answers, in {share}% of the rows of {model} "
                "and {other}: trust it little.",
                share=format_number(100 * share),
                model=names[second],
                other=names[first],
            )
    if entry["unreadable"]:
        yield tr(
            "{verdicts} of the judge cannot be read: their rows have no result. judge.jsonl has what it wrote.",
            verdicts=counted(entry["unreadable"], "verdict"),
        )
    if entry["refused"]:
        yield tr(
            "The judge's server refused {requests}: their rows have no result. The same command asks them again.",
            requests=counted(entry["refused"], "request"),
        )


def judge_lines(entry: JudgeEntry) -> list[tuple[str, list[str]]]:
    """The lines of a table with a column for each pair: what it is, and the cells."""
    pairs = entry["pairs"]
    lines = [(tr("win rate, %"), [_rate(pair) for pair in pairs])]
    lines += [
        (tr("rows won"), [f"{pair['wins'][1]:,}" for pair in pairs]),
        (tr("rows lost"), [f"{pair['wins'][0]:,}" for pair in pairs]),
        (tr("ties"), [f"{pair['ties']:,}" for pair in pairs]),
        (tr("the same answer"), [f"{pair['equal']:,}" for pair in pairs]),
        (tr("without a result"), [f"{pair['unjudged']:,}" for pair in pairs]),
        (tr("both orders agree, %"), [_percent(pair["agreement"]) for pair in pairs]),
        (tr("decided by the order, %"), [_percent(pair["place_bias"]) for pair in pairs]),
    ]
    return lines


def judge_heads(entry: JudgeEntry, names: Sequence[str]) -> list[str]:
    """Above the columns of `judge_lines`."""
    return [
        tr("{model} against {other}", model=names[pair["models"][1]], other=names[pair["models"][0]])
        for pair in entry["pairs"]
    ]


def judge_caption(entry: JudgeEntry) -> str:
    """Who judged, and by what."""
    return tr("Judged by {model}, rubric {rubric}", model=entry["model"], rubric=entry["rubric"])


def explain_judge(entry: JudgeEntry) -> list[str]:
    """How the judge's numbers are computed and what they do not show, as sentences."""
    sentences = [
        tr(
            "The judge saw each two answers twice, in both orders. A model wins a row if both verdicts are for it; two "
            "different verdicts are a tie. Equal answers are a tie that nobody was asked about. Rows without two "
            "readable verdicts count nowhere. The interval is from a bootstrap over the rows, p from a paired "
            "randomisation test, corrected for the number of pairs (Holm 1979)."
        ),
        tr(
            "A judge is a model with preferences of its own: for long answers, for answers like its own, for a place. "
            "Judge some rows yourself and see how often you agree."
        ),
    ]
    if entry["first_place"] is not None:
        share = format_number(100 * entry["first_place"])
        sentences.append(
            tr(
                "Of its verdicts for one of two answers, {share}% are for the one that stood first.",
                share=share,
            )
        )
    return sentences


def judge_table(entry: JudgeEntry, names: Sequence[str]) -> Table:
    """For a terminal."""
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for head in judge_heads(entry, names):
        table.add_column(Text(one_line(head)), justify="right", overflow="fold")
    for name, cells in judge_lines(entry):
        table.add_row(Text(name), *map(Text, cells))
    return table


def _rate(pair: Mapping[str, Any]) -> str:
    if pair["win_rate"] is None:
        return "-"
    ends = pair["win_interval"]
    shown = f" [{_percent(ends[0])}, {_percent(ends[1])}]" if ends else ""
    return f"{_percent(pair['win_rate'])}{shown} {format_p(pair['p_corrected'])}".rstrip()


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
