"""`yeonma chat`: talk to a fine-tuned model, on a terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder
from yeonma.commands.chat_input import Command, help_lines, read_entry
from yeonma.config.settings import AnswerSettings, ChatConfig
from yeonma.data.rows import Row
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.policy import Policy, load_policy
from yeonma.serve.stream_buffer import StreamBuffer
from yeonma.shown import GrowingText
from yeonma.streams import log_line, say

ChatTurn = dict[str, str]


class _Quit(Exception):
    pass


def run(config: ChatConfig) -> int:
    """Read messages and write answers until the end of the input or /quit.

    A template with turn lists makes a conversation, in which a line is a message. With any other template each question
    stands alone, as in training: a line is the text of the template's field, or of its next field if it has several.
    Without a terminal, only answers go to standard output, and the first error ends the program.
    """
    adapter, answer = config.adapter, config.answer
    builder = open_prompt_builder(
        adapter.adapter_dir,
        base_model=adapter.base_model,
        trust_remote_code=adapter.trust_remote_code,
        data_set=adapter.data_set,
        template=adapter.template,
    )
    builder = builder.by_field_names()
    builder.prompts([], max_new_tokens=answer.max_new_tokens)
    if builder.adapter.template.is_text:
        what = tr("the template trains whole texts, so there is no prompt to ask")
        cure = tr("give a text to continue: yeonma generate FOLDER --prompt TEXT")
        raise UserError(what, place=str(builder.adapter.path), cure=cure)
    if builder.remark:
        log_line(builder.remark)
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
    if on_terminal:
        say(_welcome(builder))
    try:
        chat.converse() if builder.adapter.template.takes_turns else chat.ask_fields()
    except (EOFError, _Quit):
        if on_terminal:
            say()
    except UnicodeDecodeError as error:
        raise UserError(
            tr("the input is not {encoding}", encoding=error.encoding), cure=tr("set the terminal to UTF-8")
        ) from error
    return 0


@dataclass(eq=False)
class _ChatSession:
    """`policy`: the model that answers next; `/base` changes it."""

    policy: Policy
    builder: PromptBuilder
    settings: AnswerSettings
    on_terminal: bool

    def ask_fields(self) -> None:
        """Independent questions: reads a text for every field of the prompt, and answers."""
        while True:
            row = self._read_row(
                [variant.prompt_fields for variant in self.builder.adapter.template.variants]
            )
            if any(row.values()):
                self.answer(row)

    def converse(self) -> None:
        """A conversation: answers every message together with the turns before it."""
        template = self.builder.adapter.template
        turns: list[ChatTurn] = []
        while True:
            entry = self._read(">")
            if isinstance(entry, Command):
                if entry.name == "/undo" and not turns:
                    self.tell(tr("There is nothing to undo."))
                elif entry.name == "/undo":
                    self.tell(tr("The last message and its answer are taken back."))
                else:
                    self.tell(tr("The conversation starts anew."))
                turns = turns[:-2] if entry.name == "/undo" else []
            elif entry.strip():
                with_question = [*turns, {"role": "user", "content": entry}]
                answer = self.answer(template.row_of_turns(with_question))
                if answer:
                    turns = [*with_question, {"role": "assistant", "content": answer}]

    def _read_row(self, variants: Sequence[Sequence[str]]) -> dict[str, str]:
        """Read the fields of the first variant, then of further variants until one has all of its fields.

        An empty line leaves a field empty. Fields that are missing at the end of the input stay empty.
        """
        row: dict[str, str] = {}
        while (name := _next_field(variants, row)) is not None:
            try:
                entry = self._read(f"{name}:")
            except EOFError:
                if any(row.values()):
                    return row
                raise
            if not isinstance(entry, Command):
                row[name] = entry if entry.strip() else ""
            elif entry.name == "/reset":
                row.clear()
            elif row:
                row.popitem()
            else:
                self.tell(tr("Every question stands alone, so there is nothing to undo."))
        return row

    def _read(self, label: str) -> str | Command:
        """The next text, or /reset or /undo. Obeys the other commands. Raises EOFError at the end, and
        _Quit."""
        while True:
            by_base = "" if self.policy.adapter_weights else tr("[base] ")
            try:
                entry = read_entry(f"{by_base}{label} " if self.on_terminal else "")
                match entry:
                    case Command("/quit"):
                        raise _Quit
                    case Command("/help"):
                        for line in help_lines():
                            self.tell(line)
                    case Command("/base"):
                        self._switch_model()
                    case _:
                        return entry
            except UserError as error:
                self._show_error(error)

    def _switch_model(self) -> None:
        """Raises UserError if the base cannot answer without the adapter."""
        if self.policy.adapter_weights:
            self.policy = self.policy.without_adapter()
            self.tell(
                tr("The base model {source} answers without the adapter now.", source=self.policy.source.name)
            )
        else:
            self.policy = replace(self.policy, adapter_weights=True)
            self.tell(tr("The fine-tuned model {path} answers again.", path=self.builder.adapter.path))

    def answer(self, row: Mapping[str, object]) -> str | None:
        """Write the answer as it is generated, and return it. On a terminal an error or Ctrl-C only ends the answer,
        and the result is None."""
        try:
            (prompt,) = self.builder.prompts(
                [Row(1, row, tr("this question"))], max_new_tokens=self.settings.max_new_tokens
            )
            if prompt.shortened:
                log_line(tr("shortened to fit {limit}", limit=self.builder.limit))
            shown = _AnswerText(StreamBuffer(prompt), self.on_terminal)
            (answer,) = self.policy.answers([prompt], self.settings, on_text=shown)
            shown.finish()
            return answer.content
        except UserError as error:
            self._show_error(error)
        except KeyboardInterrupt:
            if not self.on_terminal:
                raise
            _write("\n")
        return None

    def tell(self, line: str) -> None:
        """Says something that is no answer."""
        (say if self.on_terminal else log_line)(line)

    def _show_error(self, error: UserError) -> None:
        """Raises it if there is no terminal."""
        if not self.on_terminal:
            raise error
        for line in str(error).split("\n"):
            log_line(line)


def _next_field(variants: Sequence[Sequence[str]], row: Mapping[str, str]) -> str | None:
    """The first field that has not been read. None if all of a variant's have text, or if all have been read."""
    for number, fields in enumerate(variants):
        if (name := next((name for name in fields if name not in row), None)) is not None:
            return name
        if any(all(row.get(name) for name in variant) for variant in variants[: number + 1]):
            return None
    return None


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
    names = list(
        dict.fromkeys(name for variant in adapter.template.variants for name in variant.prompt_fields)
    )
    where = tr("{folder} on {base}", folder=adapter.path, base=adapter.base.name)
    if adapter.template.takes_turns:
        return tr("{where}. Each line is a message. /help lists the commands, Ctrl-D ends.", where=where)
    if len(names) == 1:
        return tr(
            "{where}. Each line is a {field}. /help lists the commands, Ctrl-D ends.",
            where=where,
            field=names[0],
        )
    return tr(
        "{where}. Each line is one field, an empty one leaves it out. /help lists the commands, Ctrl-D ends.",
        where=where,
    )
