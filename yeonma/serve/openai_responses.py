"""Responses of OpenAI's completions API, whole and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from yeonma.data.turns import ToolCall
from yeonma.generation.token_scores import ScoredToken
from yeonma.serve.openai_api import ChatRequest, TextRequest
from yeonma.serve.token_names import OffsetCounter, TokenNames

NO_PROMPTS: Mapping[int, ScoredPrompt] = MappingProxyType({})


@dataclass(frozen=True)
class ReasoningText:
    """A piece of the reasoning before an answer, for a stream."""

    text: str


@dataclass(frozen=True)
class Reply:
    """The text of an answer, and how it ended."""

    text: str
    token_ids: tuple[int, ...]
    """Without the stop token."""
    stopped: bool
    """Whether a stop token or a stop text ended it, rather than its length."""
    reasoning: str | None = None
    """The reasoning before the answer, if the model wrote some."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The tool calls of the answer, which are not part of its text."""
    scores: tuple[ScoredToken, ...] = ()
    """The tokens with their log-probabilities, the stop token included, if the request asked for them."""

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.tool_calls else "stop" if self.stopped else "length"

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message."""
        reasoning = {} if self.reasoning is None else {"reasoning_content": self.reasoning}
        if not self.tool_calls:
            return {"role": "assistant", "content": self.text, **reasoning}
        return {"role": "assistant", "content": self.text or None, **reasoning, "tool_calls": self._calls}

    @property
    def _calls(self) -> list[dict[str, Any]]:
        return [
            {
                "id": call.id or f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in self.tool_calls
        ]

    @property
    def last_delta(self) -> dict[str, Any]:
        """The last piece of a streamed message."""
        if not self.tool_calls:
            return {}
        return {"tool_calls": [{"index": index, **call} for index, call in enumerate(self._calls)]}


@dataclass(frozen=True)
class ScoredPrompt:
    """The tokens of a prompt with their log-probabilities."""

    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class SentPrompt:
    """A prompt as the client sent it, or as its token ids read, and its ids."""

    text: str
    token_ids: Sequence[int]


@dataclass(frozen=True)
class ResponseWriter:
    """Writes the responses to one request, with the same id and time. Every prompt has `n` choices, one after the
    other."""

    request: ChatRequest | TextRequest
    prompts: Sequence[SentPrompt]
    names: TokenNames
    id: str
    created: int
    counters: dict[int, OffsetCounter] = field(default_factory=dict)
    """Where the tokens of a streamed choice begin."""
    sent: dict[int, int] = field(default_factory=dict)
    """How many of a choice's scored tokens were streamed."""

    @staticmethod
    def of(
        request: ChatRequest | TextRequest, prompts: Sequence[SentPrompt], names: TokenNames
    ) -> ResponseWriter:
        prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
        return ResponseWriter(request, prompts, names, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    @property
    def echoes(self) -> bool:
        return isinstance(self.request, TextRequest) and self.request.echo

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def complete(
        self, replies: Sequence[Reply], scored_prompts: Mapping[int, ScoredPrompt] = NO_PROMPTS
    ) -> dict[str, Any]:
        """The complete response. `scored_prompts`: by their indices, if the request asked for them."""
        choices = []
        for index, reply in enumerate(replies):
            choice: dict[str, Any] = {"index": index}
            prompt = self.prompts[index // self.request.n]
            before = prompt.text if self.echoes else ""
            if self.is_chat:
                choice["message"] = reply.message
            else:
                choice["text"] = before + reply.text
            if self.request.return_token_ids:
                choice["token_ids"] = list(reply.token_ids)
                if not self.is_chat:
                    choice["prompt_token_ids"] = list(prompt.token_ids)
            scored = scored_prompts.get(index // self.request.n)
            logprobs = self._logprobs((*(scored.tokens if scored else ()), *self._own(reply)), before, index)
            choices.append({**choice, "logprobs": logprobs, "finish_reason": reply.finish_reason})
        usage = usage_of(self.prompt_tokens, sum(len(reply.token_ids) for reply in replies))
        returns_ids = self.is_chat and self.request.return_token_ids
        ids = {"prompt_token_ids": list(self.prompts[0].token_ids)} if returns_ids else {}
        return {**self._head(""), "choices": choices, "usage": usage, **ids}

    def stream_start(self) -> list[dict[str, Any]]:
        """The chunks at the start of a stream."""
        if self.is_chat:
            role = {"delta": {"role": "assistant", "content": ""}}
            return [self._chunk(role, index) for index in range(self.request.n)]
        is_scored = self.request.scored_tokens is not None
        if not self.echoes or is_scored:
            return []
        return [chunk for index in range(len(self.prompts)) for chunk in self.stream_prompt(index)]

    def stream_prompt(self, prompt_index: int, scored: ScoredPrompt | None = None) -> list[dict[str, Any]]:
        """The chunks with a prompt, for each of its choices."""
        first, text = prompt_index * self.request.n, self.prompts[prompt_index].text
        tokens = () if scored is None else scored.tokens
        return [
            self._chunk({"text": text}, index, logprobs=self._logprobs(tokens, text, index))
            for index in range(first, first + self.request.n)
        ]

    def stream_text(self, text: str, index: int = 0, tokens: Sequence[ScoredToken] = ()) -> dict[str, Any]:
        """A chunk with text. `tokens`: the scored tokens since the last one; text that may still change is held back,
        its tokens are not."""
        self.sent[index] = self.sent.get(index, 0) + len(tokens)
        piece = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return self._chunk(piece, index, logprobs=self._logprobs(tokens, "", index))

    def stream_reasoning(self, piece: ReasoningText, index: int = 0) -> dict[str, Any]:
        """A chunk with reasoning, under the key that vLLM, SGLang and DeepSeek's API use."""
        return self._chunk({"delta": {"reasoning_content": piece.text}}, index)

    def stream_end(self, reply: Reply, index: int = 0) -> dict[str, Any]:
        last = {"delta": reply.last_delta} if self.is_chat else {"text": ""}
        rest = self._own(reply)[self.sent.get(index, 0) :]
        logprobs = self._logprobs(rest, "", index) if rest else None
        return self._chunk(last, index, reply.finish_reason, logprobs)

    def stream_usage(self, tokens: int) -> list[dict[str, Any]]:
        """The chunks at the end of a stream: the usage, if the request asked for it."""
        if not self.request.stream_options.include_usage:
            return []
        return [{**self._head(".chunk"), "choices": [], "usage": usage_of(self.prompt_tokens, tokens)}]

    def _chunk(
        self,
        content: dict[str, Any],
        index: int = 0,
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head(".chunk"), "choices": [choice]}

    def _own(self, reply: Reply) -> tuple[ScoredToken, ...]:
        """The scored tokens of an answer: with its stop token in completions, without in a chat, as OpenAI has it."""
        return reply.scores[: len(reply.token_ids)] if self.is_chat else reply.scores

    def _logprobs(self, tokens: Sequence[ScoredToken], text: str, index: int) -> dict[str, Any] | None:
        """The log-probabilities of a choice's next tokens. `text`: the prompt that begins the choice's text."""
        if self.request.scored_tokens is None:
            return None
        if self.is_chat:
            return {"content": self.names.chat_content(tokens), "refusal": None}
        counter = self.counters.setdefault(index, OffsetCounter(self.names))
        return self.names.completion(tokens, counter.offsets(tokens, text))

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}


def usage_of(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    models = [{"id": name, "object": "model", "created": created, "owned_by": "yeonma"} for name in names]
    return {"object": "list", "data": models}
