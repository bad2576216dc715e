"""The program that shows rows as tokens: it tokenises a data set once, and then makes pages of its rows as HTML.

It is a process of its own, because tokenizers and their libraries take seconds to import and hundreds of megabytes that
the studio's own process does not need. It reads requests as lines of JSON from standard input and ends with it; answers
go to the descriptor that its command line names, so that nothing that a library prints is taken for one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.config.parse import read_config
from yeonma.config.settings import GROUPS, InspectConfig, InspectSettings, RunConfig
from yeonma.data.rows import Row, Rows
from yeonma.errors import UserError
from yeonma.inspect.inspect_page import legend_html, view_html
from yeonma.inspect.row_views import RowSelection, views_of
from yeonma.messages import counted, tr
from yeonma.model import load
from yeonma.tokenization.dataset import Dataset, prepare_dataset
from yeonma.tokenization.new_tokens import add_new_tokens
from yeonma.tokenization.store import TokenStore
from yeonma.train.preflight import check_folders, preflight, task_of

PAGES_AHEAD = 50
"""Of rows in another order than the file's, so many pages are read at once."""

Send = Callable[[Mapping[str, Any]], None]


def main() -> None:
    """The arguments are the descriptor for answers and the words of `yeonma inspect`."""
    descriptor, *words = sys.argv[1:]
    with os.fdopen(int(descriptor), "w", encoding="utf-8") as answers:

        def send(answer: Mapping[str, Any]) -> None:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

        try:
            dataset, tokenizer = prepared(words, lambda line: send({"log": line}))
        except UserError as error:
            send({"problem": str(error)})
            return
        sought = SoughtRows(dataset.sets[0].train.rows)
        send({"ready": about(dataset), "legend": legend_html()})
        for line in sys.stdin:
            request = json.loads(line)
            try:
                send(rows_page(dataset, tokenizer, sought, request["show"], request["page"], request["size"]))
            except UserError as error:  # the data file has changed meanwhile
                send({"problem": str(error)})


def prepared(words: Sequence[str], log: Callable[[str], None]) -> tuple[Dataset, Any]:
    """The tokenised rows and the tokenizer, by the checks and functions of a training run. Raises UserError."""
    groups = (InspectSettings, *GROUPS["dpo"])
    config = read_config(
        InspectConfig, words, verb="inspect", groups=groups, not_required=("output_dir",)
    ).config
    training: RunConfig = config.training
    if config.inspect.objective == "sft":
        training = replace(training, preference=None)
    preflight(training)
    source, continued = check_folders(training.model, training.run)
    load.load_config(source)
    tokenizer = load.load_tokenizer(source)
    add_new_tokens(tokenizer, training.lora.new_tokens or ())
    dataset = prepare_dataset(
        training.data,
        training.tokens,
        tokenizer,
        training.step.seed,
        log,
        lambda rows: log(tr("tokenised {rows}", rows=counted(rows, "row"))),
        task_of(training),
        continued,
    )
    return dataset, tokenizer


def about(dataset: Dataset) -> list[tuple[str, str]]:
    """(subject, text) of what was tokenised."""
    counts = dataset.train.store.counts
    lengths = dataset.train.store.lengths
    lines = [
        (tr("template"), dataset.template.name),
        (tr("rows"), f"{counts.rows:,}"),
        (
            tr("tokens"),
            tr(
                "{tokens:,}, {trained:,} of them trained", tokens=counts.tokens, trained=counts.trained_tokens
            ),
        ),
    ]
    if len(lengths):
        lines.append(
            (
                tr("length"),
                tr(
                    "{median:,} tokens in the median, {longest:,} at most",
                    median=round(float(np.median(lengths))),
                    longest=int(lengths.max()),
                ),
            )
        )
    lines.append((tr("shortened"), counted(counts.shortened, "example")))
    lines.append((tr("left out"), counted(counts.left_out, "row")))
    return lines


def numbers_to_show(store: TokenStore, show: str) -> NDArray[np.int64]:
    """Row numbers in the order of their pages: `shortened`, `left_out`, `longest`, or all rows."""
    if show == "left_out":
        return np.unique(np.array([left.row for left in store.left_out], np.int64))
    if show == "shortened":
        return np.unique(store.row_numbers[(store.cut_characters > 0) | (store.dropped_turns > 0)])
    if show == "longest":
        rows = store.row_numbers[np.argsort(-store.lengths.astype(np.int64), kind="stable")]
        _, first = np.unique(rows, return_index=True)
        return rows[np.sort(first)]
    return np.arange(1, store.counts.rows + 1)


@dataclass
class SoughtRows:
    """Rows by their numbers from a source that can only be read from its beginning.

    Reading goes on where it stood if it can, and what is asked for ahead is kept on the way, so that paging through a
    long file does not read it anew for every page.
    """

    rows: Rows
    _reading: Iterator[Row] = field(default_factory=lambda: iter(()))
    _at: int = 0
    """The number of the row that was read last."""
    _kept: dict[int, Row] = field(default_factory=dict)

    def of(self, numbers: Sequence[int], ahead: Sequence[int] = ()) -> list[Row]:
        """In their own order. `ahead`: numbers that will be asked for next."""
        missing = [number for number in numbers if number not in self._kept]
        if missing:
            if self._at == 0 or min(missing) <= self._at:
                self._reading, self._at = iter(self.rows), 0
            wanted = {*numbers, *ahead}
            last = max(wanted)
            self._kept = {number: row for number, row in self._kept.items() if number in wanted}
            for row in self._reading:
                self._at = row.number
                if row.number in wanted:
                    self._kept[row.number] = row
                if row.number >= last:
                    break
        return [self._kept[number] for number in sorted(numbers) if number in self._kept]


def rows_page(
    dataset: Dataset, tokenizer: Any, sought: SoughtRows, show: str, page: int, size: int
) -> dict[str, Any]:
    """One page, counted from 1, with the number of rows that there are to show."""
    one = dataset.sets[0]
    numbers = numbers_to_show(one.train.store, show)
    start = (page - 1) * size
    chosen = numbers[start : start + size].tolist()
    # rows in their order need no more than reading on
    ahead = [] if show == "all" else numbers[start + size : start + size * PAGES_AHEAD].tolist()
    rows = sought.of(chosen, ahead)
    part = replace(one.train, rows=replace(one.train.rows, read=lambda: iter(rows)))
    few = replace(dataset, sets=(replace(one, train=part),))
    views = list(views_of(few, tokenizer, RowSelection(frozenset(chosen))))
    if show == "longest":
        views.sort(key=lambda view: chosen.index(view.row))
    return {"rows": len(numbers), "html": "\n".join(map(view_html, views))}


if __name__ == "__main__":
    main()
