"""A chat template as an Ollama template over `.Messages`: what it writes before each role, found by running it.

The template is rendered with probe texts as contents, and what stands between two of them is the frame before a role
after another. Go writes these frames; where the chat template does more, there is no such template, and the reason is
said. Reference: https://docs.ollama.com/template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from yeonma.data.rows import Row
from yeonma.data.template import Template
from yeonma.errors import UserError
from yeonma.export.go_template import execute, literal, quoted
from yeonma.messages import tr
from yeonma.tokenization.chat_template import PROBE, Chat, chat_of
from yeonma.tokenization.chat_template_export import full_prompt_ids
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.tokenization.trained_turns import prompt_part

START, SYSTEM, USER, ASSISTANT, END = "", "system", "user", "assistant", "end"
"""Roles of messages, and what stands before the first and after the last."""
MOST_TURNS = 7
"""Turns in the longest conversation that is tried."""
CONTENTS = (
    "x",
    "서울의 아침, -3 °C.",
    "A storm\n\nclosed \"it\" {x} {{y}} {% z %} 'n'",
    "\\n é 😀\u3000tab\tend",
    '"""quotes""" <b>&amp;</b>',
    "{{ .Content }} $role `raw`",
)
WITH_BLANKS = ("  two before and after  ", "\nlines around\n\n", "\u3000wide\u3000", "\ttab ")
"""Texts that a template is tried with; those with blanks at their ends apart, because many chat templates cut them."""

_REASONING = "<think>\na\n</think>\n\nb"

RoleMessage = Mapping[str, str]
TrialPrompt = tuple[str, list[int]]
"""What TEMPLATE writes, and the ids that the prompt had in training."""


@dataclass(frozen=True)
class MessagesTemplate:
    """A template in Go over `.Messages` that gives the texts and token ids of training in all trials; or None, and why
    there is none."""

    text: str | None
    why: str = ""
    takes_system: bool = True
    keeps_reasoning: bool = False
    """Whether it writes reasoning in earlier answers that training leaves out."""
    trials: Sequence[TrialPrompt] = ()
    """The conversations that were compared."""


def messages_template(
    template: Template, encoder: TextEncoder, rules: TokenRules, added: str
) -> MessagesTemplate:
    """The chat template of training as one for Ollama. `template` takes turns. `added`: see `without_added`."""
    try:
        with chat_of(encoder, rules.thinking, rules.chat_template_kwargs) as chat:
            return _Training(template, encoder, rules, chat, added).in_go()
    except UserError as error:
        return MessagesTemplate(None, error.problems[0].what)


def without_added(text: str, encoder: TextEncoder, added: str) -> str:
    """A prompt of training as Ollama sends it. `text`: with or without the start tokens; `added`: what llama.cpp itself
    puts before every prompt. Raises UserError if training does not have that."""
    start = "".join(encoder.special_text.get(number, "") for number in encoder.start_ids)
    whole = start + text.removeprefix(start)
    if not whole.startswith(added):
        raise UserError(tr("llama.cpp puts {added} before every prompt, and training did not", added=added))
    return whole.removeprefix(added)


def ids_in_ollama(text: str, encoder: TextEncoder, added: str) -> list[int]:
    """The ids of what TEMPLATE writes, after what llama.cpp puts before it."""
    start = "".join(encoder.special_text.get(number, "") for number in encoder.start_ids)
    return encoder.batch([text])[0] if added == start else encoder.batch_without_start([added + text])[0]


def render_messages(text: str, messages: Sequence[RoleMessage]) -> str:
    """What Ollama makes of the messages, of which no two of a role follow each other: it joins those. Raises
    GoTemplateError if the template refuses them."""
    shown = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == SYSTEM)
    return execute(text, {"Messages": shown, "System": system, "Response": ""})


@dataclass(frozen=True)
class _Training:
    """How prompts of conversations are written in training."""

    template: Template
    encoder: TextEncoder
    rules: TokenRules
    chat: Chat
    added: str

    def in_go(self) -> MessagesTemplate:
        frames: dict[tuple[str, str], str] = {}
        for roles in _conversations(with_system=False):
            why = self._probe(roles, frames)
            if why:
                return MessagesTemplate(None, why)
        with_system = dict(frames)
        takes_system = not any(self._probe(roles, with_system) for roles in _conversations(with_system=True))
        if takes_system:
            frames = with_system
        opening = dict(frames)
        if not self._probe((ASSISTANT, USER), opening):
            frames = opening
        text = _go(frames)
        why, trials = self._try(text, takes_system, opens=frames is opening)
        if why:
            return MessagesTemplate(None, why)
        return MessagesTemplate(text, "", takes_system, self._keeps_reasoning(text), trials)

    def prompt(self, messages: Sequence[RoleMessage]) -> str:
        """What TEMPLATE must write for these messages."""
        row = self._row(messages)
        rendered = self.template.render(row, None, with_answer=False)
        text = self.chat.prompt(self.chat.conversation(prompt_part(rendered), row.place), row.place)
        return without_added(text, self.encoder, self.added)

    def ids(self, messages: Sequence[RoleMessage]) -> list[int]:
        row = self._row(messages)
        rendered = self.template.render(row, None, with_answer=False)
        return full_prompt_ids(rendered, row, self.encoder.tokenizer, self.rules)

    def _row(self, messages: Sequence[RoleMessage]) -> Row:
        return Row(1, self.template.row_of_turns(messages), "TEMPLATE")

    def _probe(self, roles: Sequence[str], frames: dict[tuple[str, str], str]) -> str:
        """Adds the frames that a conversation of these roles shows; or returns why there are none."""
        probes = [PROBE.format(number=number) for number in range(len(roles))]
        try:
            text = self.prompt([_message(role, probe) for role, probe in zip(roles, probes, strict=True)])
        except UserError as error:
            return error.problems[0].what
        for role, before, probe in zip(roles, (START, *roles), probes, strict=False):
            frame, found, text = text.partition(probe)
            if not found:
                return tr("the chat template leaves out a turn, or writes the turns in another order")
            if frames.setdefault((before, role), frame) != frame:
                return tr("the chat template writes something else before a turn, by its place")
        if any(probe in text for probe in probes):
            return tr("the chat template writes a turn twice")
        if frames.setdefault((roles[-1], END), text) != text:
            return tr("the chat template ends short and long conversations differently")
        return ""

    def _try(self, go: str, takes_system: bool, opens: bool) -> tuple[str, list[TrialPrompt]]:
        """Why the template is not that of training, or nothing; and the conversations that were compared."""
        trials: list[TrialPrompt] = []
        for messages in _trials(takes_system, opens, CONTENTS):
            prompt = self._prompt_or_none(messages)
            if prompt is None:
                continue
            if render_messages(go, messages) != prompt:
                return tr("the chat template rewrites the texts of turns"), trials
            ids = self.ids(messages)
            if ids_in_ollama(prompt, self.encoder, self.added) != ids:
                return tr("its text would get other token ids than in training"), trials
            trials.append((prompt, ids))
        for messages in _trials(takes_system, opens, WITH_BLANKS):
            prompt = self._prompt_or_none(messages)
            if prompt is not None and render_messages(go, messages) != prompt:
                return tr("the chat template cuts blanks off the texts of turns"), trials
        return ("" if trials else tr("the base model's chat template refuses every trial")), trials

    def _keeps_reasoning(self, go: str) -> bool:
        messages = [_message(USER, "x"), _message(ASSISTANT, _REASONING), _message(USER, "y")]
        return self._prompt_or_none(messages) != render_messages(go, messages)

    def _prompt_or_none(self, messages: Sequence[RoleMessage]) -> str | None:
        """None where training refuses the conversation, too."""
        try:
            return self.prompt(messages)
        except UserError:
            return None


def _message(role: str, content: str) -> RoleMessage:
    return {"role": role, "content": content}


def _conversations(with_system: bool) -> Iterator[tuple[str, ...]]:
    """The roles of conversations of 1 to `MOST_TURNS` turns that end with a user's."""
    for turns in range(1, MOST_TURNS + 1, 2):
        roles = (USER, ASSISTANT) * MOST_TURNS
        yield ((SYSTEM,) if with_system else ()) + roles[:turns]


def _trials(takes_system: bool, opens: bool, contents: Sequence[str]) -> Iterator[list[RoleMessage]]:
    """`opens`: whether an assistant's turn may be the first."""
    conversations = [*_conversations(with_system=False)]
    conversations += _conversations(with_system=True) if takes_system else ()
    conversations += [(ASSISTANT, *roles) for roles in _conversations(with_system=False)] if opens else ()
    for roles, first in product(conversations, range(len(contents))):
        yield [
            _message(role, contents[(first + number) % len(contents)]) for number, role in enumerate(roles)
        ]


def _go(frames: Mapping[tuple[str, str], str]) -> str:
    """The template: by role and the role before, the frame and the content. It refuses what training does not have."""
    unfinished = frames[USER, END]
    # training takes a blank system message for none, and refuses other blank messages
    branches = [
        _action('if and (eq .Content "") (eq .Role "system") (eq $before "")'),
        _action('else if eq .Content ""') + _refusal("a message is empty"),
    ]
    for role in (SYSTEM, USER, ASSISTANT):
        befores: dict[str, list[str]] = {}
        for (before, after), frame in frames.items():
            if after == role:
                befores.setdefault(frame, []).append(before)
        for frame, roles in befores.items():
            among = " ".join(map(quoted, roles))
            branches += [
                _action(f"else if and (eq .Role {quoted(role)}) (eq $before {among})"),
                # an answer that the client began goes on after the prompt
                _last_or(unfinished, frame) if role == ASSISTANT and roles == [USER] else literal(frame),
                _action(".Content") + _action("$before = .Role"),
            ]
    return "".join(
        (
            _action('$before := ""') + _action("range $number, $message := .Messages"),
            *branches,
            _action("else") + _refusal("this model was not trained on a message of this role in this place"),
            _action("end") + _action("end"),
            _action('if eq $before "user"') + literal(unfinished),
            _action('else if eq $before "assistant"'),
            _action("else") + _refusal("the last message must be of the user") + _action("end"),
        )
    )


def _last_or(last: str, other: str) -> str:
    """The frame before the last message, and that before another."""
    if last == other:
        return literal(last)
    condition = _action("if eq (len (slice $.Messages $number)) 1")
    return condition + literal(last) + _action("else") + literal(other) + _action("end")


def _action(words: str) -> str:
    return "{{ " + words + " }}"


def _refusal(text: str) -> str:
    """Go cannot call a text, so that Ollama answers with an error that has it."""
    return _action(f"call {quoted(text)}")
