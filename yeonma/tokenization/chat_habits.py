"""What a chat template does with messages, as far as reading it tells; `chat_template.py` tells the rest by running
it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from yeonma.bounded.child import OverBounds, Refused
from yeonma.bounded.template_text import names_in
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.tokenization.reasoning import ThinkTags, tags_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Habits:
    """What a chat template does with messages, found by reading and running it."""

    variables: frozenset[str]
    """The arguments that it reads, such as `tools` and `enable_thinking`."""
    names: frozenset[str]
    """The names of keys and attributes that it reads, such as `tool_calls`."""
    assigned: frozenset[str] = frozenset()
    """The variables that it also sets itself, often only those."""
    trailer: str | None = None
    """The text after an assistant's content, if known."""
    tags: ThinkTags | None = None
    """The tags around reasoning that it mentions, or None."""
    reasoning_key: str | None = None
    """The key of a message whose text it writes as reasoning in the last turn, or None."""
    keeps_block: bool = True
    """Whether it writes an assistant's content verbatim, with a block of reasoning at its beginning."""
    takes_null: bool = True
    """Whether it takes a tool call whose content is null. Others get an empty text."""
    marks: frozenset[str] = frozenset()
    """Special tokens that it writes within an assistant's turn, such as `<think>`."""


def habits_in(tokenizer: PreTrainedTokenizerBase) -> Habits:
    """The habits that reading the chat template shows. Raises UserError if reading it takes too much."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return _habits_of("\n".join(map(str, texts)))


@lru_cache(maxsize=16)
def _habits_of(source: str) -> Habits:
    try:
        found = names_in(source) if source else (frozenset[str](),) * 3
    except (OverBounds, Refused) as error:
        problem = (
            tr("the model's chat template {error}", error=error.args[0])
            if isinstance(error, OverBounds)
            else tr("the model's chat template cannot be read: {error}", error=error)
        )
        cure = tr("use a template without turns, or the model's original files")
        raise UserError(problem, place=tr("chat template"), cure=cure) from None
    if found is None:  # rendering reports it
        return Habits(frozenset(re.findall(r"\w+", source)), frozenset(re.findall(r"\w+", source)))
    variables, names, assigned = found
    return Habits(variables, names, assigned, tags=tags_in(source))
