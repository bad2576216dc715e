"""`yeonma chat`: talk to an adapter, on a terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder
from yeonma.config.settings import AnswerSettings, ChatConfig
from yeonma.data.rows import Row
from yeonma.errors import UserError
from yeonma.policy import Policy, load_policy
from yeonma.serve.stream_buffer import StreamBuffer
from yeonma.shown import GrowingText, one_line
from yeonma.streams import log_line, say

ChatTurn = dict[str, str]


class _Quit(Exception):
    pass


class _New(Exception):
    pass


def run(config: ChatConfig) -> int:
    """Read messages and write answers until the end of the input or /quit.

    A template with turn lists makes a conversation, with one message per line. With any other template the user fills
    the fields one by one, as in training: every question stands alone, and an empty line ends a field. Without a
    terminal, only answers go to standard output, and the first error ends the program.
    """
    adapter, answer = config.adapter, config.answer
    builder = open_prompt_builder(
        adapter.adapter_dir,
        base_model=adapter.base_model,
        trust_remote_code=adapter.trust_remote_code,
        data_set=adapter.data_set,
    )
    builder = builder.by_field_names()
    builder.prompts([], max_new_tokens=answer.max_new_tokens)
    policy = load_policy(
        builder,
        device=adapter.device,
        dtype=adapter.dtype,
        quantization=adapter.quantization,
        adapter_weights=adapter.adapter_weights,
        log=log_line,
    )
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 (gives `input` editing and history)
    chat = _ChatSession(policy, builder, answer, on_terminal)
    chat.print_on_terminal(_welcome(builder))
    try:
        chat.converse() if builder.adapter.template.takes_turns else chat.ask_fields()
    except (_Quit, EOFError):
        chat.print_on_terminal("")
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not {error.encoding}", cure="set the terminal to UTF-8") from error
    return 0


@dataclass(frozen=True)
class _ChatSession:
    policy: Policy
    builder: PromptBuilder
    settings: AnswerSettings
    on_terminal: bool

    def ask_fields(self) -> None:
        """Independent questions: reads a text for every field of the prompt, and answers."""
        variants = [variant.prompt_fields for variant in self.builder.adapter.template.variants]
        while True:
            try:
                row = _read_row(variants, self.on_terminal)
            except _New:
                continue
            if any(row.values()):
                self.answer(row)

    def converse(self) -> None:
        """A conversation: answers every message together with the turns before it."""
        template = self.builder.adapter.template
        turns: list[ChatTurn] = []
        while True:
            try:
                text = _read_line("> " if self.on_terminal else "", command=True)
            except _New:
                turns = []
                continue
            if not text.strip():
                continue
            with_question = [*turns, {"role": "user", "content": text}]
            answer = self.answer(template.row_of_turns(with_question))
            if answer:
                turns = [*with_question, {"role": "assistant", "content": answer}]

    def answer(self, row: Mapping[str, object]) -> str | None:
        """Write the answer as it is generated, and return it. On a terminal an error or Ctrl-C only ends the answer,
        and the result is None."""
        try:
            (prompt,) = self.builder.prompts(
                [Row(1, row, "this question")], max_new_tokens=self.settings.max_new_tokens
            )
            if prompt.shortened:
                log_line(f"shortened to fit {self.builder.limit}")
            shown = _AnswerText(StreamBuffer(prompt), self.on_terminal)
            (answer,) = self.policy.answers([prompt], self.settings, on_text=shown)
            shown.finish()
            return answer.content
        except UserError as error:
            if not self.on_terminal:
                raise
            for line in str(error).split("\n"):
                log_line(line)
        except KeyboardInterrupt:
            if not self.on_terminal:
                raise
            _write("\n")
        return None

    def print_on_terminal(self, text: str) -> None:
        if self.on_terminal:
            say(text)


def _read_row(variants: Sequence[Sequence[str]], on_terminal: bool) -> dict[str, str]:
    """Read the fields of the first variant, then of further variants until one has all of its fields.

    Fields that are missing at the end of the input stay empty.
    """
    row: dict[str, str] = {}
    for fields in variants:
        for name in fields:
            if name in row:
                continue
            try:
                row[name] = _read_field(f"{name}: " if on_terminal else "", len(fields) > 1)
            except EOFError:
                if any(row.values()):
                    return row
                raise
        if any(all(row.get(name) for name in variant) for variant in variants):
            break
    return row


def _read_field(label: str, may_be_empty: bool) -> str:
    """Read lines up to an empty one or the end of the input."""
    lines: list[str] = []
    while True:
        try:
            line = _read_line(label if not lines else "", command=not lines)
        except EOFError:
            if not lines:
                raise
            return "\n".join(lines)
        if line.strip():
            lines.append(line)
        elif lines or may_be_empty:
            return "\n".join(lines)


def _read_line(label: str, *, command: bool) -> str:
    line = input(one_line(label))
    if command and line.strip() == "/quit":
        raise _Quit
    if command and line.strip() == "/new":
        raise _New
    return line


@dataclass
class _AnswerText:
    """Writes an answer as it grows: reasoning dimmed and only on a terminal, then the answer alone."""

    growing: StreamBuffer
    on_terminal: bool
    text: str = ""
    screen: GrowingText = field(default_factory=GrowingText)
    has_reasoning: bool = False
    has_content: bool = False

    def __call__(self, piece: str) -> None:
        self.text += piece
        reasoning = self.growing.new_reasoning(self.text)
        if self.on_terminal and reasoning:
            _write(_dimmed(self.screen.shown(reasoning)))
            self.has_reasoning = True
        self._show(self.growing.new_text(self.text))

    def finish(self) -> None:
        """Ends the answer, which is complete."""
        self._show(self.growing.remaining_text(self.text))
        _write(self.screen.rest() + "\n")

    def _show(self, content: str) -> None:
        if content and self.has_reasoning and not self.has_content:
            _write("\n\n")
        self.has_content = self.has_content or bool(content)
        _write(self.screen.shown(content) if self.on_terminal else content)


def _dimmed(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m"


def _write(text: str) -> None:
    """Writes text that is escaped already where it has to be."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _welcome(builder: PromptBuilder) -> str:
    adapter = builder.adapter
    entering = "" if adapter.template.takes_turns else " An empty line ends a field."
    return f"{adapter.path} on {adapter.base.name}.{entering} /new starts over, /quit or Ctrl-D ends."
