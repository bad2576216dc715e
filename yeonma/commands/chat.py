"""`yeonma chat`: ask an adapter by hand, on a terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from yeonma.adapter.prompt_builder import PromptBuilder, open_folder
from yeonma.config.settings import AnswerSettings, ChatConfig
from yeonma.data.rows import Row
from yeonma.errors import UserError
from yeonma.policy import Policy, load_policy

ChatTurn = dict[str, str]


class _Quit(Exception):
    pass


class _New(Exception):
    pass


def run(config: ChatConfig) -> int:
    """Ask and answer until the input ends or /quit.

    A template of turn lists makes a conversation, a message a line. Any other template is asked field by field, as
    it was trained: each question stands alone, and an empty line ends a field. Without a terminal nothing but the
    answers is written to standard output, and the first error ends it.
    """
    folder, how = config.adapter, config.answer
    asker = open_folder(
        folder.adapter_dir, base_model=folder.base_model, trust_remote_code=folder.trust_remote_code
    )
    asker = asker.by_field_names()
    asker.questions([], max_new_tokens=how.max_new_tokens)
    loaded = load_policy(
        asker,
        device=folder.device,
        dtype=folder.dtype,
        quantization=folder.quantization,
        adapter_weights=folder.adapter_weights,
    )
    live = sys.stdin.isatty() and sys.stdout.isatty()
    if live:
        with suppress(ImportError):
            import readline  # noqa: F401 (gives `input` editing and history)
    _say(live, _welcome(asker))
    try:
        _converse(loaded, how, live) if asker.adapter.template.is_chat else _ask_fields(loaded, how, live)
    except (_Quit, EOFError):
        _say(live, "")
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not {error.encoding}", cure="set the terminal to UTF-8") from error
    return 0


def _ask_fields(loaded: Policy, how: AnswerSettings, live: bool) -> None:
    variants = [variant.prompt_fields for variant in loaded.asker.adapter.template.variants]
    while True:
        try:
            row = _read_row(variants, live)
        except _New:
            continue
        if any(row.values()):
            _answer(loaded, row, how, live)


def _read_row(variants: Sequence[Sequence[str]], live: bool) -> dict[str, str]:
    """A text for each field of the first variant, and of further ones until one has all of its fields.

    What the end of the input leaves out is empty.
    """
    row: dict[str, str] = {}
    for fields in variants:
        for name in fields:
            if name in row:
                continue
            try:
                row[name] = _read_field(f"{name}: " if live else "", len(fields) > 1)
            except EOFError:
                if any(row.values()):
                    return row
                raise
        if any(all(row.get(name) for name in each) for each in variants):
            break
    return row


def _read_field(label: str, may_be_empty: bool) -> str:
    """The lines up to an empty one, or to the end of the input where there are some."""
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


def _converse(loaded: Policy, how: AnswerSettings, live: bool) -> None:
    column = loaded.asker.adapter.template.answer_field
    turns: list[ChatTurn] = []
    while True:
        try:
            text = _read_line("> " if live else "", command=True)
        except _New:
            turns = []
            continue
        if not text.strip():
            continue
        asked = [*turns, {"role": "user", "content": text}]
        answer = _answer(loaded, {column: asked}, how, live)
        if answer:
            turns = [*asked, {"role": "assistant", "content": answer}]


def _read_line(label: str, *, command: bool) -> str:
    line = input(label)
    if command and line.strip() == "/quit":
        raise _Quit
    if command and line.strip() == "/new":
        raise _New
    return line


def _answer(loaded: Policy, row: Mapping[str, object], how: AnswerSettings, live: bool) -> str | None:
    """Write the answer as it comes, and return it. On a terminal an error or Ctrl-C ends the answer alone: None."""
    try:
        asked = Row(1, row, "this question")
        (question,) = loaded.asker.questions([asked], max_new_tokens=how.max_new_tokens)
        if question.shortened:
            limit = loaded.asker.adapter.rules.cutoff_len
            print(f"yeonma: shortened to fit cutoff_len {limit}", file=sys.stderr, flush=True)
        show = _Show(_write, lstrip=question.is_turn)
        (answer,) = loaded.answers([question], how, on_text=show)
        _write("\n")
        return answer
    except UserError as error:
        if not live:
            raise
        print("\n".join(f"yeonma: {line}" for line in str(error).splitlines()), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if not live:
            raise
        _write("\n")
    return None


@dataclass
class _Show:
    """Passes text on, without the blanks it begins with."""

    write: Callable[[str], None]
    lstrip: bool

    def __call__(self, text: str) -> None:
        text = text.lstrip() if self.lstrip else text
        if text:
            self.lstrip = False
            self.write(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(live: bool, text: str) -> None:
    if live:
        print(text, flush=True)


def _welcome(asker: PromptBuilder) -> str:
    adapter = asker.adapter
    entering = "" if adapter.template.is_chat else " An empty line ends a field."
    return f"{adapter.path} on {adapter.base.name}.{entering} /new starts again, /quit or Ctrl-D ends."
