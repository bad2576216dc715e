"""Reasoning before an answer: the texts that open and close it, found in a text or in a chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass

_KNOWN = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
"""The pairs of tags that published chat templates use, the most common first."""


@dataclass(frozen=True)
class ThinkTags:
    """The texts around reasoning. `after_open` and `before_close`, `after_close` are the white space between tag and
    text, as the chat template writes it."""

    open: str
    close: str
    after_open: str = "\n"
    before_close: str = "\n"
    after_close: str = "\n\n"

    @property
    def closing(self) -> str:
        """The text between reasoning and content."""
        return self.before_close + self.close + self.after_close

    @property
    def empty_block(self) -> str:
        """A block without reasoning, as Qwen3 writes it."""
        return self.open + self.after_open + self.closing

    def is_open(self, prompt: str) -> bool:
        """Whether a prompt ends within a block: reasoning comes next."""
        return prompt.rstrip().endswith(self.open)

    def is_closed(self, prompt: str) -> bool:
        """Whether a prompt ends with a closed block: an answer without reasoning comes next."""
        return prompt.rstrip().endswith(self.close)

    def is_unclosed(self, text: str) -> bool:
        """Whether a text begins with a block that it never closes."""
        return text.lstrip().startswith(self.open) and self.close not in text

    def header(self, prompt: str) -> str:
        """The prompt without a block at its end, open or closed."""
        if self.is_closed(prompt):
            inner = prompt.rstrip().removesuffix(self.close).rstrip()
            return inner.removesuffix(self.open)
        return prompt.rstrip().removesuffix(self.open) if self.is_open(prompt) else prompt

    def closing_after(self, prompt: str) -> str:
        """The text between reasoning and content after this prompt, which opens the block. A template that writes no
        line break after the tag writes none before the closing one."""
        return self.closing if prompt.endswith("\n") or self.after_open != "\n" else self.close

    def split(self, text: str, *, is_open: bool = False) -> tuple[str | None, str]:
        """(reasoning, content) of a text that begins with a block, or with reasoning if `is_open`.

        Reasoning is None without a block, and empty for an empty one. Line breaks beside the tags belong to the block.
        """
        start = text.lstrip()
        has_open = start.startswith(self.open)
        if has_open:
            start = start[len(self.open) :]
        elif not is_open:
            return None, text
        reasoning, close, content = start.partition(self.close)
        if not close or (self.open in reasoning and not has_open):
            return None, text
        return reasoning.strip("\n"), content.lstrip("\n")

    def without_block(self, text: str) -> str:
        """The text without a block at its beginning, or without the end of one that the prompt opened, or without the
        tag of one that the chat template opens and never closes."""
        start = text.lstrip()
        if start.startswith(self.close):
            return start[len(self.close) :].lstrip("\n")
        if start.startswith(self.open) and self.close not in start:
            return start[len(self.open) :].lstrip("\n")
        return self.split(text)[1]


DEFAULT_TAGS = ThinkTags(*_KNOWN[0])


def tags_in(template: str) -> ThinkTags | None:
    """The tags that a chat template mentions, or None."""
    for opening, closing in _KNOWN:
        if opening in template or closing in template:
            return ThinkTags(opening, closing)
    return None


def tags_between(text: str, tags: ThinkTags, reasoning: str, content: str) -> ThinkTags:
    """The tags with the white space that a chat template writes around them in `text`, which has both texts."""
    before = re.escape(tags.open) + r"(\s*)" + re.escape(reasoning)
    after = r"(\s*)" + re.escape(tags.close) + r"(\s*)" + re.escape(content)
    found = re.search(before + after, text)
    if found is None:
        return tags
    return ThinkTags(tags.open, tags.close, *found.groups())


def tags_of_empty(text: str, tags: ThinkTags, content: str) -> ThinkTags:
    """The tags with the white space of an empty block that a chat template writes before the content in `text`, if it
    writes none within the block: then it writes none around reasoning."""
    found = re.search(re.escape(tags.open + tags.close) + r"(\s*)" + re.escape(content), text)
    return tags if found is None else ThinkTags(tags.open, tags.close, "", "", found[1])


@dataclass(frozen=True)
class AnswerParts:
    """A generated text in parts. `reasoning` is None without a block of reasoning."""

    reasoning: str | None
    content: str


@dataclass(frozen=True)
class AnswerShape:
    """How a chat template surrounds an answer: what the model generates around reasoning and content. The texts are
    exact: blanks and line ends beyond them belong to the answer."""

    tags: ThinkTags | None = None
    lead: str = ""
    """The text before the content of an answer without reasoning."""
    reasoning_lead: str = ""
    """The text before reasoning, if it is not a tag."""
    between: str = ""
    """The text between reasoning and content."""
    trail: str = ""
    """The text after the content, such as a blank before the end token."""
    marks: tuple[str, ...] = ()
    """Special tokens within an answer, such as those around tool calls."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts in which special tokens must stay visible, so that the parts are found."""
        tags = () if self.tags is None else (self.tags.open, self.tags.close)
        return (*tags, self.lead, self.reasoning_lead, self.between, *self.marks)

    def opens(self, prompt: str) -> bool:
        """Whether a prompt ends within a block of reasoning."""
        return self.tags is not None and self.tags.is_open(prompt)

    def parts(self, text: str, *, is_open: bool = False, growing: bool = False) -> AnswerParts:
        """The parts of a generated text. `is_open`: the prompt opened a block of reasoning.

        `growing`: more text may follow; then both parts leave out what may turn out to be part of a tag or lead.
        """
        if self.tags is not None:
            return self._tagged(text, self.tags, is_open, growing)
        start = text.lstrip()
        if self.reasoning_lead and start.startswith(self.reasoning_lead.lstrip()):
            inner = start[len(self.reasoning_lead.lstrip()) :]
            reasoning, border, content = inner.partition(self.between)
            if not border and growing:
                reasoning = _without_overlap(reasoning, self.between)
            return AnswerParts(reasoning, content)
        leads = [lead.lstrip() for lead in (self.lead, self.reasoning_lead) if lead]
        if growing and any(lead.startswith(start) for lead in leads):
            return AnswerParts(None, "")
        return AnswerParts(None, _without_lead(text, self.lead))

    def _tagged(self, text: str, tags: ThinkTags, is_open: bool, growing: bool) -> AnswerParts:
        start = text.lstrip()
        if start.startswith(tags.open):
            inner = start[len(tags.open) :]
        elif growing and tags.open.startswith(start):
            return AnswerParts(None, "")
        elif is_open:
            inner = text
        else:
            lead = "" if tags.close in self.lead else self.lead
            return AnswerParts(None, _without_lead(text, lead))
        reasoning, close, content = inner.partition(tags.close)
        if not close and growing:
            reasoning = _without_overlap(reasoning, tags.close).rstrip("\n")
        reasoning = reasoning.strip("\n")
        around = self.between if reasoning else self.lead
        after = around.partition(tags.close)[2] if tags.close in around else tags.after_close
        return AnswerParts(reasoning, _without_beginning(content, after))


PLAIN = AnswerShape()
"""The shape of answers in plain text."""


def _without_lead(text: str, lead: str) -> str:
    """The text without the lead, before which a model may write other blanks than the chat template does."""
    if text.startswith(lead):
        return text[len(lead) :]
    start, plain = text.lstrip(), lead.lstrip()
    return start[len(plain) :] if plain and start.startswith(plain) else text


def _without_beginning(text: str, blanks: str) -> str:
    """The text without as much of `blanks` as it begins with."""
    size = next((size for size in range(len(blanks), 0, -1) if text.startswith(blanks[:size])), 0)
    return text[size:]


def _without_overlap(text: str, following: str) -> str:
    """The text without an end that may be the beginning of `following`."""
    size = next((n for n in range(len(following) - 1, 0, -1) if text.endswith(following[:n])), 0)
    return text[: len(text) - size]
