"""How rows become examples: one record per task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yeonma.data.preference_pairs import RenderedLabel, RenderedPair
from yeonma.data.rows import Row
from yeonma.data.task import ANSWERS, LABELLED, PAIRS
from yeonma.data.template import Rendered
from yeonma.messages import later
from yeonma.tokenization.example import Example, LeftOut, TokenRules, Unit
from yeonma.tokenization.example_encoder import EncodeResult, ExampleEncoder, encode
from yeonma.tokenization.preference_encoder import encode_labelled, encode_pair_results, encode_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedAnswer:
    """One answer of a row, to be shown."""

    rendered: Rendered
    """The row before shortening."""
    role: str | None
    """The role of the answer in preference data, such as `chosen`; None elsewhere."""
    result: EncodeResult


@dataclass(frozen=True)
class TaskEncoder:
    """The tokenization of a task's rows. They are passed as what `Task.render` returns."""

    encode: Callable[
        [Sequence[Any], Sequence[Row], PreTrainedTokenizerBase, TokenRules],
        Sequence[Example | Unit | LeftOut],
    ]
    """The rows' examples or units, or why they are left out."""
    answers: Callable[[ExampleEncoder, Sequence[Any], Sequence[Row]], Iterator[EncodedAnswer]]
    """The same, answer by answer and with texts."""
    none_left: str = later("no row is left of {rows}: each is over cutoff_len {cutoff_len}")
    """The message when all rows are left out."""
    none_left_or_bad: str = later(
        "no row is left of {rows}: each is over cutoff_len {cutoff_len} or is bad: {shown}"
    )
    """The same, when some of them are bad."""


def _answers(
    encoder: ExampleEncoder, texts: Sequence[Rendered], rows: Sequence[Row]
) -> Iterator[EncodedAnswer]:
    rendered = {row.number: text for text, row in zip(texts, rows, strict=True)}
    for result in encoder.encode(texts, rows):
        yield EncodedAnswer(rendered[result.text.row.number], None, result)


def _pairs(
    encoder: ExampleEncoder, pairs: Sequence[Sequence[RenderedPair]], rows: Sequence[Row]
) -> Iterator[EncodedAnswer]:
    flat = (pair for of_row in pairs for pair in of_row)
    for pair, result in zip(flat, encode_pair_results(encoder, pairs, rows), strict=True):
        sides = ((pair.chosen, "chosen"), (pair.rejected, "rejected"))
        for index, (rendered, role) in enumerate(sides):
            unit = result.outcome
            outcome = unit if isinstance(unit, LeftOut) else unit.members[index][1]
            yield EncodedAnswer(rendered, role, EncodeResult(result.texts[index], outcome))


def _labelled(
    encoder: ExampleEncoder, labelled: Sequence[RenderedLabel], rows: Sequence[Row]
) -> Iterator[EncodedAnswer]:
    roles = {
        row.number: "desirable" if label.desirable else "undesirable"
        for label, row in zip(labelled, rows, strict=True)
    }
    for answer in _answers(encoder, [label.rendered for label in labelled], rows):
        yield EncodedAnswer(answer.rendered, roles[answer.result.text.row.number], answer.result)


TASK_ENCODERS: Mapping[str, TaskEncoder] = {
    ANSWERS.name: TaskEncoder(encode, _answers),
    PAIRS.name: TaskEncoder(
        encode_pairs,
        _pairs,
        later("no row is left of {rows}: each is over cutoff_len {cutoff_len} or has two equal answers"),
        later(
            "no row is left of {rows}: each is over cutoff_len {cutoff_len} or has two equal answers or is bad: {shown}"
        ),
    ),
    LABELLED.name: TaskEncoder(encode_labelled, _labelled),
}
"""By the name of the task."""
