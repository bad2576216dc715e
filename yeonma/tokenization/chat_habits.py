"""What a chat template does with messages, as far as reading it tells; `chat_template.py` tells the rest by running
it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from transformers import PreTrainedTokenizerBase

from yeonma.tokenization.reasoning import ThinkTags, tags_in


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
    """The habits that reading the chat template shows."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return _habits_of("\n".join(map(str, texts)))


@lru_cache(maxsize=16)
def _habits_of(source: str) -> Habits:
    variables: set[str] = set()
    names: set[str] = set()
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_generation(source))
    except TemplateSyntaxError:  # transformers reports it
        return Habits(frozenset(re.findall(r"\w+", source)), frozenset(re.findall(r"\w+", source)))
    variables |= meta.find_undeclared_variables(tree)
    for attribute in tree.find_all(nodes.Getattr):
        names.add(attribute.attr)
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            names.add(constant.value)
    assigned = frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "store")
    return Habits(frozenset(variables), frozenset(names), assigned, tags=tags_in(source))


def _without_generation(source: str) -> str:
    """The template without transformers' own `{% generation %}` tags, which Jinja does not know."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
