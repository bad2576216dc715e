"""Kinds of data, one answer a row, two to choose between, or one with a label: how a row becomes text and tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from yeonma.text.formats import Recognised, recognise
from yeonma.text.notes import Notes, notes_of
from yeonma.text.pairs import (
    notes_of_pair,
    recognise_labelled,
    recognise_pairs,
    render_label,
    render_pair,
)
from yeonma.text.rows import Row, Rows
from yeonma.text.template import Rendered, Template
from yeonma.tokens.desk import encode
from yeonma.tokens.example import Example, LeftOut, TokenRules, Unit
from yeonma.tokens.labels import encode_labelled
from yeonma.tokens.pairs import encode_pairs

Columns = Mapping[str, str] | None
Found = Example | Unit | LeftOut
Encode = Callable[[Sequence[Any], Sequence[Row], PreTrainedTokenizerBase, TokenRules], Sequence[Found]]


@dataclass(frozen=True)
class Kind:
    """The steps from a row to its tokens; what `render` gives is what the others take."""

    name: str
    """Also part of the key that tokens are kept under."""
    units: str
    """What a step counts, in words."""
    recognise: Callable[[Rows, Columns], Recognised]
    render: Callable[[Template, Row, Columns], Any]
    notes: Callable[[Any], Notes]
    encode: Encode
    wanted: Callable[[Any], Rendered]
    """The row with the answer that is wanted, or none where its only one is not."""


def _itself(rendered: Rendered) -> Rendered:
    return rendered


ANSWERS = Kind(
    name="answers",
    units="examples",
    recognise=lambda rows, columns: recognise(rows.columns, columns),
    render=Template.render,
    notes=notes_of,
    encode=encode,
    wanted=_itself,
)
PAIRS = Kind(
    name="pairs",
    units="pairs",
    recognise=recognise_pairs,
    render=render_pair,
    notes=notes_of_pair,
    encode=encode_pairs,
    wanted=lambda pair: pair.chosen,
)
LABELLED = Kind(
    name="labelled answers",
    units="labelled answers",
    recognise=recognise_labelled,
    render=render_label,
    notes=lambda label: notes_of(label.rendered),
    encode=encode_labelled,
    wanted=lambda label: label.rendered if label.desirable else replace(label.rendered, answer=()),
)
