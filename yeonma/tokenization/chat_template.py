"""The model's chat template: the prompt and answer that it renders, its end token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from yeonma.bounded.child import OverBounds, Refused
from yeonma.bounded.template_text import TextsAhead
from yeonma.data.template import Rendered, RenderedTurn
from yeonma.data.turns import REASONING_KEYS, ToolCall
from yeonma.errors import UserError, did_you_mean
from yeonma.messages import tr
from yeonma.tokenization.chat_habits import Habits, habits_in
from yeonma.tokenization.conversation import ChatMessage, Conversation, as_messages, call_message, request_of
from yeonma.tokenization.reasoning import DEFAULT_TAGS, ThinkTags, tags_between, tags_of_empty
from yeonma.tokenization.text_encoder import Span, TextEncoder

Thinking = Literal["auto", "keep", "drop", "empty"]
"""How reasoning is trained: see the setting `thinking`."""

_GIVEN = {
    "messages",
    "tools",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "raise_exception",
    "strftime_now",
}
"""What a chat template reads besides arguments of its own."""

_THINKING_ARGUMENTS = ("enable_thinking", "thinking")
"""Arguments with which published chat templates switch reasoning on and off."""

PROBE = "Zq{number}qZ"
"""Text that no chat template writes by itself."""
_PROBES = re.compile(r"Zq\d+qZ")


@dataclass(frozen=True)
class ChatAnswer:
    """The assistant's text after a prompt as the chat template renders it, including the end token."""

    text: str
    content: Span
    """The span of the message's content in `text`."""
    ended: bool
    """Whether the text ends with a special token of the chat template."""
    reasoning: Span = (0, 0)
    """The span of the reasoning in `text`; empty without reasoning."""
    calls: Span = (0, 0)
    """The span of the tool calls in `text`, with the marks around them; empty without calls."""
    trimmed: bool = False
    """Whether the template left out blanks or line ends at the edges of the content."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template, and the settings for it."""

    encoder: TextEncoder
    habits: Habits
    thinking: Thinking = "auto"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    ahead: TextsAhead = field(default_factory=TextsAhead)

    @property
    def tags(self) -> ThinkTags | None:
        """The tags around reasoning; the usual ones where a setting asks for them and the template has none."""
        return self.habits.tags or (
            None if self.thinking == "auto" or self.habits.reasoning_key else DEFAULT_TAGS
        )

    def conversation(self, rendered: Rendered, place: str, *, with_answer: bool = False) -> Conversation:
        """The row's turns as the chat template takes them. `with_answer` adds the answer that is not a turn.

        Raises UserError with `place` for tools and arguments that the chat template does not read.
        """
        turns = rendered.turns
        if with_answer and rendered.answer:
            turns = (*turns, RenderedTurn("assistant", rendered.answer, rendered.answer_turn))
        kwargs = {**self.kwargs, **rendered.chat_kwargs}
        self._check_arguments(rendered, kwargs, place)
        messages = as_messages(turns, self.habits.reasoning_key or REASONING_KEYS[0])
        return Conversation([self._message(message) for message in messages], rendered.tools, kwargs)

    def prompt(self, conversation: Conversation, place: str) -> str:
        """The text up to the next assistant turn, from which generation starts. Raises UserError with `place`."""
        return self.render(conversation, place, generate=True)

    def answer(self, conversation: Conversation, prompt: str, place: str) -> ChatAnswer:
        """The last message, an assistant's, as a continuation of `prompt`. Raises UserError with `place`.

        It is what the chat template writes after the prompt. Where the template does not write the message so that it
        continues the prompt (it drops reasoning, or the prompt opens a think block), the block is written here.
        """
        message = conversation.messages[-1]
        reasoning, content = self.parts(message, prompt)
        if self.tags is not None and reasoning is None and self.tags.is_unclosed(content):
            problem = tr(
                "an assistant's turn begins with {open} and has no {close}",
                open=self.tags.open,
                close=self.tags.close,
            )
            cure = tr("close the block, or take the tag out of the text")
            raise UserError(problem, place=place, cure=cure)
        thinking = self.thinking
        if reasoning == "" or (reasoning and thinking == "drop"):
            conversation = conversation.with_last(self._without_reasoning(message, content))
            thinking = thinking if thinking == "drop" else "empty"  # an empty block is what the row says
            reasoning = None
        if reasoning or message.get("tool_calls"):
            return self._full_answer(conversation, prompt, reasoning, content, place)
        return self._with_thinking(self._plain_answer(conversation, prompt, place), prompt, thinking)

    def _plain_answer(self, conversation: Conversation, prompt: str, place: str) -> ChatAnswer:
        """An answer without reasoning and tool calls."""
        whole = self.render(conversation, place)
        content = conversation.messages[-1]["content"]
        trailer, body = self._split(conversation, whole, content, place)
        end = self._end_of(trailer)
        continues = whole.startswith(prompt)
        first, trimmed = len(prompt) if continues else 0, False
        data_start = body.rfind(content.strip(), first)
        if content != content.strip():
            before, _ = self.around_last(conversation, place)
            data_start = len(before) if body.startswith(before) else data_start
            trimmed = body != before + content
        start = first if continues else data_start
        if data_start < 0:  # the template rewrites the content: use the original and the template's end
            lead = self._lead(conversation, prompt, place)
            text = lead + content + trailer[:end]
            answer = ChatAnswer(text, (len(lead), len(lead) + len(content)), end > 0)
        else:
            text = body[start:] + trailer[:end]
            span = (max(data_start - start, 0), len(body) - start)
            answer = ChatAnswer(text, span, end > 0, trimmed=trimmed)
        tags = self.tags
        if tags is not None and tags.is_open(prompt) and tags.close not in answer.text[: answer.content[0]]:
            return _after(tags.closing_after(prompt), answer)
        return answer

    def _lead(self, conversation: Conversation, prompt: str, place: str) -> str:
        """What the chat template writes between a prompt and the content of the last message."""
        before, _ = self.around_last(conversation, place)
        return before[len(prompt) :] if before.startswith(prompt) else ""

    def _with_thinking(self, answer: ChatAnswer, prompt: str, thinking: Thinking) -> ChatAnswer:
        """The answer, which has no reasoning, without or with an empty think block, as `thinking` says."""
        tags = self.tags
        if tags is None or tags.is_open(prompt):
            return answer
        start = answer.content[0]
        written = tags.split(answer.text[:start])[0] is not None
        if thinking == "keep" and written:
            content = (0, answer.content[1] - start)
            return replace(answer, text=answer.text[start:], content=content)
        if thinking == "empty" and not written and not tags.is_closed(prompt):
            return _after(tags.empty_block, answer)
        return answer

    def _full_answer(
        self, conversation: Conversation, prompt: str, reasoning: str | None, content: str, place: str
    ) -> ChatAnswer:
        """An answer with reasoning, tool calls or both."""
        message = conversation.messages[-1]
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        tags = self.tags
        whole = self.render(conversation, place)
        if whole.startswith(prompt):
            answer = self._located(whole[len(prompt) :], reasoning, content, calls)
            if answer is not None:
                self._check_end(answer, place)
                return answer
        if reasoning and tags is None:
            raise UserError(
                tr("a turn has reasoning, and the model's chat template does not write it"),
                place=place,
                cure=tr(
                    "--thinking drop leaves reasoning out; --thinking keep writes it as <think>...</think>"
                ),
            )
        if reasoning and tags is not None and tags.is_closed(prompt):
            raise UserError(
                tr(
                    "a turn has reasoning, and the model's chat template closes the think block in the prompt"
                ),
                place=place,
                cure=self._cure_of_closed(conversation, tags),
            )
        header = prompt if tags is None else tags.header(prompt)
        without = conversation.with_last(self._without_reasoning(message, content))
        whole = self.render(without, place)
        if whole.startswith(header):
            written = whole[len(header) :]
            written = written if tags is None else tags.without_block(written)
        elif not calls:
            trailer, _ = self._split(without, whole, content, place)
            written = content + trailer
        else:
            written = ""
        block = ""
        if tags is not None and tags.is_open(prompt):
            block = (reasoning or "") + tags.closing_after(prompt)
        elif tags is not None and reasoning:
            block = tags.open + tags.after_open + reasoning + tags.closing
        answer = self._located(block + written, reasoning, content, calls)
        if answer is None:
            problem = (
                tr("the model's chat template does not write tool calls")
                if calls
                else tr("the model's chat template does not write the text of a turn with reasoning")
            )
            raise UserError(
                problem,
                place=place,
                cure=tr("use a model whose chat template does, or write it as the turn's text"),
            )
        self._check_end(answer, place)
        return answer

    def _check_end(self, answer: ChatAnswer, place: str) -> None:
        """Raises UserError if reasoning ends with the token that ends the answer: generation would stop there."""
        if self.encoder.control is None or not answer.ended or answer.reasoning == (0, 0):
            return
        end = self.encoder.control.findall(answer.text)[-1]
        if end in answer.text[answer.reasoning[1] : answer.content[0]]:
            raise UserError(
                tr(
                    "the model's chat template ends reasoning with {end}, which also ends an answer: "
                    "generation would stop before the answer",
                    end=end,
                ),
                place=place,
                cure=tr("leave reasoning out with --thinking drop"),
            )

    def _cure_of_closed(self, conversation: Conversation, tags: ThinkTags) -> str:
        """How the chat template leaves the think block open in the prompt, by trial of the usual arguments."""
        before = conversation.before_last
        for name in (name for name in _THINKING_ARGUMENTS if name in self.habits.variables):
            kwargs = {**before.kwargs, name: True}
            with suppress(UserError):
                if not tags.is_closed(self.prompt(replace(before, kwargs=kwargs), tr("chat template"))):
                    return tr(
                        "switch thinking on with --chat_template_kwargs '{{{name}: true}}', or leave reasoning out "
                        "with --thinking drop",
                        name=name,
                    )
        return tr(
            "use a model whose chat template has a place for it, or leave reasoning out with --thinking drop"
        )

    def _located(
        self, text: str, reasoning: str | None, content: str, calls: Sequence[str]
    ) -> ChatAnswer | None:
        """The answer in what follows a prompt; None unless it has reasoning, content and calls, in this order."""
        position, spans = 0, []
        for part in ((reasoning or "").strip(), content.strip()):
            start = text.find(part, position)
            if start < 0:
                return None
            position = start + len(part)
            spans.append((start, position))
        if any(text.find(name, position) < 0 for name in calls):
            return None
        if self.tags is not None and reasoning and self.tags.open in text[spans[0][1] : spans[1][0]]:
            return None
        end = position + self._end_of(text[position:])
        ended = end > position and not text[end:].strip()
        trailer = self.habits.trailer
        text = text[:end] if ended else text.rstrip() if calls or not trailer else text.removesuffix(trailer)
        return ChatAnswer(
            text,
            spans[1],
            ended,
            spans[0],
            self._calls_span(text, position) if calls else (0, 0),
            trimmed=content not in text,
        )

    def _calls_span(self, text: str, start: int) -> Span:
        """The span of the tool calls in an answer, somewhere after `start`."""
        written = text[start:].removesuffix((self.habits.trailer or "").rstrip()).rstrip()
        if self.tags is not None:  # the block of an answer without content
            rest = self.tags.without_block(written)
            start, written = start + len(written) - len(rest), rest
        blank = len(written) - len(written.lstrip())
        return start + blank, start + len(written)

    def parts(self, message: ChatMessage, prompt: str) -> tuple[str | None, str]:
        """(reasoning, content) of an assistant's message: from its own key, or from a block in its content."""
        content = message["content"] or ""
        key = self.habits.reasoning_key or REASONING_KEYS[0]
        if message.get(key):
            return message[key].strip("\n"), content
        if self.tags is None:
            return None, content
        reasoning, rest = self.tags.split(content, is_open=self.tags.is_open(prompt))
        return (reasoning, rest) if reasoning is not None else (None, content)

    def _without_reasoning(self, message: ChatMessage, content: str) -> ChatMessage:
        key = self.habits.reasoning_key or REASONING_KEYS[0]
        rest = {name: value for name, value in message.items() if name != key}
        return {**rest, "content": None if message["content"] is None else content}

    def _message(self, message: ChatMessage) -> ChatMessage:
        """The message with reasoning that stands in its content moved to a key of its own, unless the chat template
        writes contents verbatim; without reasoning if `thinking` is "drop"."""
        if message["role"] != "assistant":
            return message
        if message["content"] is None:
            message = message if self.habits.takes_null else {**message, "content": ""}
            return self._without_reasoning(message, "") if self.thinking == "drop" else message
        tags = self.tags
        reasoning, content = (None, message["content"]) if tags is None else tags.split(message["content"])
        if self.thinking == "drop":
            return self._without_reasoning(message, content)
        key = self.habits.reasoning_key or REASONING_KEYS[0]
        if self.habits.keeps_block or reasoning is None or message.get(key):
            return message
        return {**message, "content": content, **({key: reasoning} if reasoning else {})}

    def _check_arguments(self, rendered: Rendered, kwargs: Mapping[str, Any], place: str) -> None:
        if self.encoder.tokenizer.chat_template is None:  # rendering reports it
            return
        if rendered.tools and "tools" not in self.habits.variables:
            raise UserError(
                tr("the row offers tools, and the model's chat template does not write them"),
                place=place,
                cure=tr("use a model whose chat template does, or describe them in a system turn"),
            )
        for name in kwargs:
            if name not in self.habits.variables:
                arguments = self.habits.variables - self.habits.assigned - _GIVEN
                listed = ", ".join(sorted(arguments)) or tr("none")
                cure = did_you_mean(name, arguments) or tr("its arguments: {listed}", listed=listed)
                problem = tr('the model\'s chat template has no argument "{name}"', name=name)
                raise UserError(problem, place="chat_template_kwargs", cure=cure)

    def content_spans(self, conversation: Conversation, prompt: str, place: str) -> list[Span | None]:
        """The span of each message's content in the text of their prompt; None where it is not found."""
        frames = self._frames(conversation, place)
        contents = [message["content"] or "" for message in conversation.messages]
        spans = frames and _between(frames, [text for text in contents if text], prompt)
        if spans:
            found = iter(spans)
            return [next(found) if text else None for text in contents]
        return _in_order(contents, prompt)

    def data_spans(self, conversation: Conversation, prompt: str, place: str) -> list[Span]:
        """The spans of the prompt's data: contents, and reasoning that the chat template keeps. Of contents that it
        changes, the lines with special-token text."""
        contents = self.content_spans(conversation, prompt, place)
        spans: list[Span] = []
        position = 0
        for message, span in zip(conversation.messages, contents, strict=True):
            limit = len(prompt) if span is None else span[0]
            reasoning = str(message.get(self.habits.reasoning_key or REASONING_KEYS[0]) or "").strip()
            start = prompt.find(reasoning, position, limit) if reasoning else -1
            if start >= 0:
                spans += self.without_marks(prompt, (start, start + len(reasoning)))
            if span is not None:
                is_answer = message["role"] == "assistant"
                spans += self.without_marks(prompt, span) if is_answer else [span]
                position = span[1]
        changed = [
            message["content"] or ""
            for message, span in zip(conversation.messages, contents, strict=True)
            if span is None or span[1] - span[0] < len((message["content"] or "").strip())
        ]
        for span in _special_lines(changed, prompt, self.encoder):
            spans += self.without_marks(prompt, span)
        return sorted(spans)

    def without_marks(self, text: str, span: Span) -> list[Span]:
        """The parts of an assistant's `span` between texts that the chat template itself writes there as special
        tokens: those stay these tokens."""
        if not self.habits.marks:
            return [span]
        pattern = "|".join(map(re.escape, sorted(self.habits.marks, key=len, reverse=True)))
        spans, start = [], span[0]
        for mark in re.finditer(pattern, text[span[0] : span[1]]):
            spans.append((start, span[0] + mark.start()))
            start = span[0] + mark.end()
        return [part for part in (*spans, (start, span[1])) if part[0] < part[1]]

    def has_special(self, conversation: Conversation, place: str) -> bool:
        """Whether data of the conversation contains a special token's text. Raises UserError with `place` if it stands
        in tools or tool calls, where it cannot be told from the chat template's own."""
        for message in conversation.messages:
            calls = message.get("tool_calls")
            if calls and self.encoder.has_special(json.dumps(calls, ensure_ascii=False)):
                raise UserError(
                    tr("a tool call contains special-token text"), place=place, cure=tr("remove it")
                )
        if conversation.tools and self.encoder.has_special(
            json.dumps(conversation.tools, ensure_ascii=False)
        ):
            raise UserError(
                tr("a tool's description contains special-token text"), place=place, cure=tr("remove it")
            )
        key = self.habits.reasoning_key or REASONING_KEYS[0]
        return any(
            self.encoder.has_special(text)
            for message in conversation.messages
            for text in (message["content"], message.get(key))
            if isinstance(text, str)
        )

    def end_id(self) -> int | None:
        """The token with which the chat template ends an assistant turn, or None."""
        if self.habits.trailer is None or self.encoder.control is None:
            return None
        tokens = self.encoder.control.findall(self.habits.trailer)
        return self.encoder.token_id(tokens[-1]) if tokens else None

    def _split(self, conversation: Conversation, whole: str, content: str, place: str) -> tuple[str, str]:
        """(trailer, text before it) of a rendered conversation. The text ends with the content if the template keeps
        it."""
        trailer = self.habits.trailer
        if trailer is None or not whole.removesuffix(trailer).rstrip().endswith(content.strip()):
            trailer = self.around_last(conversation, place)[1]
        if not whole.endswith(trailer):
            raise UserError(
                tr("the model's chat template does not write the assistant's text at the end"),
                place=place,
                cure=tr("use a template without turns, or a model with another chat template"),
            )
        return trailer, whole[: len(whole) - len(trailer)]

    def _end_of(self, trailer: str) -> int:
        """The position after the last special token in `trailer`, or 0."""
        if self.encoder.control is None:
            return 0
        return max((mark.end() for mark in self.encoder.control.finditer(trailer)), default=0)

    def around_last(self, conversation: Conversation, place: str) -> tuple[str, str]:
        """The text that the chat template writes before and after the content of the last message, an assistant's."""
        probe = PROBE.format(number=0)
        text = self.render(conversation.with_last({"role": "assistant", "content": probe}), place)
        if probe not in text:
            raise UserError(
                tr("the model's chat template does not write the assistant's text"),
                place=place,
                cure=tr("use a template without turns, or a model with another chat template"),
            )
        before, _, after = text.rpartition(probe)
        return before, after

    def _frames(self, conversation: Conversation, place: str) -> list[str] | None:
        """The prompt's text before, between and after the contents that are not empty; None if the template changes
        contents."""
        probes: list[str] = []
        probing: list[ChatMessage] = []
        for number, message in enumerate(conversation.messages):
            if message["content"]:
                probes.append(PROBE.format(number=number))
                message = {**message, "content": probes[-1]}
            probing.append(message)
        text = self.render(replace(conversation, messages=probing), place, generate=True)
        return _PROBES.split(text) if _PROBES.findall(text) == probes else None

    def render(self, conversation: Conversation, place: str, *, generate: bool = False) -> str:
        """The conversation as the chat template writes it. Raises UserError with `place`."""
        tokenizer = self.encoder.tokenizer
        if tokenizer.chat_template is None:
            raise UserError(
                tr("the model's tokenizer has no chat template, which templates with turns need"),
                place="--base_model",
                cure=tr("use a template without turns, or the model's instruction-tuned version"),
            )
        try:
            return self.ahead.text_of(request_of(tokenizer, conversation, generate))
        except OverBounds as error:
            problem = tr("the model's chat template {error}", error=error.args[0])
            raise _BatchEnded(
                UserError(problem, place=place, cure=tr("use a template without turns"))
            ) from None
        except (Refused, ValueError) as error:  # the model's template may raise anything
            problem = tr(
                "the model's chat template refuses this row: {error}",
                error=error.args[0] if error.args else error,
            )
            cure = tr("change the row's turns, or use a template without turns")
            raise UserError(problem, place=place, cure=cure) from error

    def render_ahead(self, wanted: Iterable[tuple[Conversation, bool]]) -> None:
        """Renders conversations that will probably be asked for, each with or without the prompt for generation."""
        tokenizer = self.encoder.tokenizer
        if tokenizer.chat_template is None:
            return
        requests = []
        for conversation, generate in wanted:
            with suppress(Refused, ValueError):
                requests.append(request_of(tokenizer, conversation, generate))
        self.ahead.prepare(requests)


class _BatchEnded(BaseException):
    """Stops a whole batch of rows: the next row would take as long. Not an Exception, so that no row catches it."""

    def __init__(self, error: UserError) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def chat_of(
    encoder: TextEncoder, thinking: Thinking = "auto", kwargs: Mapping[str, Any] | None = None
) -> Iterator[Chat]:
    """The tokenizer's chat template, for use within the block. `kwargs`: its arguments for all rows.

    Raises UserError, with the place of the row, if rendering it takes more than `CHAT_TEMPLATE` allows.
    """
    try:
        yield _with_known_habits(Chat(encoder, habits_in(encoder.tokenizer), thinking, kwargs or {}))
    except _BatchEnded as stopped:
        raise stopped.error from None


_KNOWN: dict[tuple[str, str, str], Habits] = {}
_MOST_KNOWN = 32


def _with_known_habits(chat: Chat) -> Chat:
    """`chat` with its habits, which are found once for a chat template, its arguments and the special tokens."""
    tokenizer = chat.encoder.tokenizer
    special = chat.encoder.special.pattern if chat.encoder.special is not None else ""
    key = (repr(tokenizer.chat_template), json.dumps(chat.kwargs, sort_keys=True, default=str), special)
    if key not in _KNOWN:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = _with_habits(chat).habits
    return replace(chat, habits=_KNOWN[key])


def _with_habits(chat: Chat) -> Chat:
    """`chat` with the habits that short conversations show. A template that refuses them is probed row by row."""
    if chat.encoder.tokenizer.chat_template is None:
        return chat
    place = tr("chat template")
    user = {"role": "user", "content": "x"}
    short = Conversation([user, {"role": "assistant", "content": "x"}], kwargs=chat.kwargs)
    habits = chat.habits
    try:
        habits = replace(habits, trailer=chat.around_last(short, place)[1])
    except UserError:
        return chat
    reasoning, content = PROBE.format(number=1), PROBE.format(number=2)
    for key in REASONING_KEYS:
        if key not in habits.names:
            continue
        message = {"role": "assistant", "content": content, key: reasoning}
        try:
            text = chat.render(short.with_last(message), place)
        except UserError:
            continue
        if reasoning in text and content in text[text.find(reasoning) :]:
            tags = habits.tags and tags_between(text, habits.tags, reasoning, content)
            habits = replace(habits, reasoning_key=key, tags=tags, keeps_block=False)
            break
    if habits.tags is not None and habits.keeps_block:
        tags = habits.tags
        block = tags.open + reasoning + tags.closing + content
        try:
            text = chat.render(short.with_last({"role": "assistant", "content": block}), place)
            bare = chat.render(short.with_last({"role": "assistant", "content": content}), place)
        except UserError:
            pass
        else:  # a block of the template's own stands before the content: two would be one too many
            has_own = tags.open in bare.rpartition(content)[0][-len(block) :]
            habits = replace(habits, keeps_block=reasoning in text and not has_own)
            habits = replace(habits, tags=tags_of_empty(bare, tags, content))
    habits = replace(habits, takes_null=_takes_null(replace(chat, habits=habits), short))
    return replace(chat, habits=replace(habits, marks=_marks(replace(chat, habits=habits), short)))


def _takes_null(chat: Chat, short: Conversation) -> bool:
    """Whether the chat template takes a tool call whose content is null, at the end and before other turns."""
    if "tool_calls" not in chat.habits.names:  # it would write the null as a text
        return False
    call = call_message(ToolCall("name", '{"argument": 1}', "call00001"))
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "content": "x", "name": "name", "tool_call_id": "call00001"}
    messages = [short.messages[0], message, result]
    try:
        chat.render(replace(short, messages=messages[:2]), tr("chat template"))
        chat.prompt(replace(short, messages=messages), tr("chat template"))
    except UserError:
        return False
    return True


def _marks(chat: Chat, short: Conversation) -> frozenset[str]:
    """Special tokens that the chat template writes within an assistant's turn with reasoning and a tool call."""
    tags, special = chat.habits.tags, chat.encoder.special
    if special is None:
        return frozenset()
    marks = (
        {text for text in (tags.open, tags.close) if special.fullmatch(text)} if tags is not None else set()
    )
    call = call_message(ToolCall("name", '{"argument": 1}', "call00001"))
    message = {"role": "assistant", "content": "x", "tool_calls": [call]}
    if "tool_calls" in chat.habits.names:
        try:
            prompt = chat.prompt(short.before_last, tr("chat template"))
            text = chat.render(short.with_last(message), tr("chat template"))
        except UserError:
            return frozenset(marks)
        if text.startswith(prompt):
            found = special.findall(text[len(prompt) :])
            marks |= {
                mark for mark in found if mark not in (chat.habits.trailer or "") and mark not in prompt
            }
    return frozenset(marks)


def _after(text: str, answer: ChatAnswer) -> ChatAnswer:
    """The answer after some text."""
    size = len(text)
    start, end = answer.content
    return replace(answer, text=text + answer.text, content=(start + size, end + size))


def _between(frames: Sequence[str], contents: Sequence[str], text: str) -> list[Span] | None:
    """The spans of the contents in `text` if the frames surround them, else None."""
    spans, position = [], len(frames[0])
    if not text.startswith(frames[0]):
        return None
    for content, frame in zip(contents, frames[1:], strict=True):
        forms = [content, content.strip(), content.rstrip(), content.lstrip()]
        form = next((form for form in forms if text.startswith(form + frame, position)), None)
        if form is None:
            return None
        spans.append((position, position + len(form)))
        position += len(form) + len(frame)
    return spans if position == len(text) else None


def _in_order(contents: Sequence[str], text: str) -> list[Span | None]:
    """The spans of the contents in `text`, by search: for templates that change contents.

    A content that is not found whole, say because the template drops its beginning, is searched from its last line on
    backwards. None if not even its last line is found.
    """
    spans: list[Span | None] = []
    position = 0
    for content in contents:
        lines = content.strip().split("\n")
        forms = ("\n".join(lines[first:]).strip() for first in range(len(lines)))
        found = next(
            ((start, form) for form in forms if form and (start := text.find(form, position)) >= 0), None
        )
        spans.append(None if found is None else (found[0], found[0] + len(found[1])))
        position = position if found is None else found[0] + len(found[1])
    return spans


def _special_lines(contents: Sequence[str], text: str, encoder: TextEncoder) -> list[Span]:
    """The spans of lines with special-token text, by search."""
    spans, position = [], 0
    for line in [line.strip() for content in contents for line in content.split("\n")]:
        start = text.find(line, position) if line and encoder.has_special(line) else -1
        if start >= 0:
            position = start + len(line)
            spans.append((start, position))
    return spans
