"""A client of servers with OpenAI's API: `yeonma serve`, vLLM, SGLang, llama.cpp's server, Ollama and others.

What a server tells beside OpenAI's API is asked of those that have it: prompt ids (vLLM's `return_token_ids`,
llama.cpp's `/apply-template` and `/tokenize`), log-probabilities of given tokens (`echo`, llama.cpp's `n_probs`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from yeonma.config.settings import VerifySettings
from yeonma.errors import Problem, UserError, did_you_mean
from yeonma.messages import tr

ServerKind = Literal["yeonma", "vllm", "llamacpp", "other"]
NAMES: Mapping[str, str] = {
    "yeonma": "yeonma serve",
    "vllm": "vLLM",
    "llamacpp": "llama.cpp",
    "sglang": "SGLang",
    "library": "Ollama",
}
"""`owned_by` of a server's models -> the server."""
BASE = "base"
"""The base's name in `yeonma serve`."""
KEY = "OPENAI_API_KEY"
"""The environment variable with the server's key, as OpenAI's own client reads it."""
SECONDS = 300.0
"""For one answer: a large model on a CPU may take minutes."""
FIRST_SECONDS = 10.0
"""For the list of models."""
MOST_BYTES = 64 << 20
"""Of a response."""
ALTERNATIVES = 200
"""Most likely tokens that llama.cpp's server is asked for at each place."""
_TOO_LONG = re.compile(r"context|too long|maximum.*length|exceed", re.IGNORECASE)


class ServerFailed(Exception):
    """A request that was refused, or whose response cannot be read."""

    def __init__(self, text: str, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.status = status
        """0 if there was no response, or none that can be read."""
        self.retry_after = retry_after
        """Seconds after which the server wants to be asked again; None if it does not say."""

    @property
    def is_too_long(self) -> bool:
        """Whether the server says that the prompt is longer than its context."""
        return 400 <= self.status < 500 and _TOO_LONG.search(str(self)) is not None


@dataclass(frozen=True)
class ServedAnswer:
    text: str
    finish: str
    """`stop`, `length`, or what else the server says."""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    prompt_ids: list[int] | None = None
    token_ids: list[int] | None = None
    """Without the token that ended it."""


class ServedScore(NamedTuple):
    """How likely a server finds a token."""

    logprob: float
    is_upper_bound: bool = False
    """Whether the token is not among those that the server listed, of which this is the least likely one."""


@dataclass(frozen=True)
class Server:
    """A server, and the model that is asked there."""

    root: str
    """The address without `/v1`."""
    owner: str
    """What the server says of its models' owner, by which it is known."""
    models: Mapping[str, Mapping[str, Any]]
    """Name -> entry of `/v1/models`."""
    model: str = ""

    @property
    def kind(self) -> ServerKind:
        known: dict[str, ServerKind] = {"yeonma": "yeonma", "vllm": "vllm", "llamacpp": "llamacpp"}
        return known.get(self.owner, "other")

    @property
    def name(self) -> str:
        """The server's name for people."""
        return NAMES.get(self.owner, tr("a server with OpenAI's API"))

    def get(self, path: str, seconds: float = FIRST_SECONDS) -> Any:
        """Raises ServerFailed."""
        return exchange(f"{self.root}{path}", None, seconds)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Raises ServerFailed."""
        return exchange(f"{self.root}{path}", body, SECONDS)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        most_tokens: int,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> ServedAnswer:
        """The greedy answer to messages, as an ordinary client asks for it. `arguments`: of the chat template. `more`:
        further parameters. Raises ServerFailed."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": most_tokens,
            **(more or {}),
        }
        if tools:
            body["tools"] = list(tools)
        if arguments:
            body["chat_template_kwargs"] = dict(arguments)
        if self.kind in ("yeonma", "vllm"):
            body["return_token_ids"] = True
        response = self.post("/v1/chat/completions", body)
        choice = first_choice(response)
        message = choice.get("message")
        content = message.get("content") if isinstance(message, Mapping) else None
        prompt_ids = _ids(response.get("prompt_token_ids"))
        if self.kind == "llamacpp":
            prompt_ids = self._templated(messages, tools, arguments)
        return _answer(response, choice, content or "", prompt_ids)

    def _templated(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any] | None,
    ) -> list[int] | None:
        """What llama.cpp's server makes of messages; None if it does not tell."""
        body: dict[str, Any] = {"messages": list(messages)}
        if tools:
            body["tools"] = list(tools)
        if arguments:
            body["chat_template_kwargs"] = dict(arguments)
        try:
            text = self.post("/apply-template", body)["prompt"]
            asked = {"content": text, "add_special": True, "parse_special": True}
            return _ids(self.post("/tokenize", asked)["tokens"])
        except (ServerFailed, KeyError, TypeError):
            return None

    def complete(
        self, prompt_ids: Sequence[int], most_tokens: int, more: Mapping[str, Any] | None = None
    ) -> ServedAnswer:
        """The greedy answer to a prompt of token ids. Raises ServerFailed, also if the server takes no ids."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt_ids),
            "temperature": 0,
            "max_tokens": most_tokens,
            **(more or {}),
        }
        if self.kind in ("yeonma", "vllm"):
            body["return_token_ids"] = True
        response = self.post("/v1/completions", body)
        choice = first_choice(response)
        answer = _answer(
            response, choice, str(choice.get("text") or ""), _ids(choice.get("prompt_token_ids"))
        )
        if answer.prompt_tokens not in (None, len(prompt_ids)):
            raise ServerFailed("the prompt of token ids was read as something else")
        return answer

    def scores(
        self, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> Sequence[ServedScore | None] | None:
        """The log-probability of each token of an answer behind a prompt, None for one that is not told; None if the
        server tells nothing. Raises ServerFailed."""
        if not answer_ids:
            return []
        if self.kind == "llamacpp":
            return self._scores_one_by_one(prompt_ids, answer_ids)
        ids = [*prompt_ids, *answer_ids]
        generated = 0 if self.kind == "yeonma" else 1
        body = {
            "model": self.model,
            "prompt": ids,
            "temperature": 0,
            "max_tokens": generated,
            "echo": True,
            "logprobs": 1,
        }
        try:
            logprobs = first_choice(self.post("/v1/completions", body)).get("logprobs")
        except ServerFailed as failed:
            if failed.status in (400, 404, 405, 422, 501) and not failed.is_too_long:
                return None
            raise
        numbers = logprobs.get("token_logprobs") if isinstance(logprobs, Mapping) else None
        if not isinstance(numbers, list) or len(numbers) not in (len(ids), len(ids) + generated):
            return None
        found = numbers[len(prompt_ids) : len(ids)]
        if not all(_is_number(number) for number in found):
            return None
        return [ServedScore(float(number)) for number in found]

    def _scores_one_by_one(
        self, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> Sequence[ServedScore | None]:
        found: list[ServedScore | None] = []
        for place, token in enumerate(answer_ids):
            body: dict[str, Any] = {
                "prompt": [*prompt_ids, *answer_ids[:place]],
                "n_predict": 1,
                "n_probs": ALTERNATIVES,
                "temperature": 0.0,
                "cache_prompt": True,
            }
            response = self.post("/completion", body)
            try:
                (entry,) = response["completion_probabilities"][:1]
                likely = {one["id"]: float(one["logprob"]) for one in entry["top_logprobs"]}
            except (KeyError, TypeError, ValueError):
                likely = {}
            if not likely:  # it holds back what is only a part of a character
                found.append(None)
                continue
            is_listed = token in likely
            found.append(ServedScore(likely[token] if is_listed else min(likely.values()), not is_listed))
        return found

    def context(self) -> int | None:
        """The most tokens of prompt and answer together, if the server tells."""
        asked = self.base() or self  # vLLM tells the base's alone
        number = asked.models[asked.model].get("max_model_len")
        if self.kind == "llamacpp":
            try:
                number = self.get("/props")["default_generation_settings"]["n_ctx"]
            except (ServerFailed, KeyError, TypeError):
                number = None
        return number if type(number) is int and number > 0 else None

    def base(self) -> Server | None:
        """The same server with the base of its model as the model; None if it does not serve the base by itself.

        llama.cpp's server can leave an adapter out of a request. It is not asked to: it goes on from what it cached of
        that prompt in later requests, which are answered wrongly then (seen with b11549).
        """
        parent = self.models[self.model].get("parent") if self.kind == "vllm" else BASE
        is_there = self.kind in ("yeonma", "vllm") and parent in self.models and parent != self.model
        return replace(self, model=str(parent)) if is_there else None


def check_server_settings(settings: VerifySettings) -> None:
    """Raises UserError for settings that go only with the check of a folder, or only with that of a server."""
    if settings.served is None:
        if settings.model is not None:
            cure = tr("give the server's address with --served, or leave it out")
            raise UserError(tr("it names a model of a server"), place=f"--model {settings.model}", cure=cure)
        return
    given = {"base_model": settings.base_model, "data_path": settings.data_path}
    problems = [
        Problem(
            tr("it is for the check of the folder, and --served asks a server"),
            f"--{name} {value}",
            tr("leave it out, or run `yeonma verify` once more without --served"),
        )
        for name, value in given.items()
        if value is not None
    ]
    if problems:
        raise UserError(problems)


def server_of(settings: VerifySettings) -> Server:
    """The server at `served`, an address with or without `/v1`, and the model to ask there: `model`, by default the one
    with the name of the folder, or the only one.

    Raises UserError if no server with OpenAI's API answers there, and if it is not clear whom to ask.
    """
    address, model = settings.served or "", settings.model
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        cure = tr("give an address such as http://127.0.0.1:8000")
        raise UserError(tr("not the address of a server"), place=f"--served {address}", cure=cure)
    root = re.sub(r"/v1/?$", "", address.rstrip("/"))
    try:
        listed = exchange(f"{root}/v1/models", None, FIRST_SECONDS)
        entries = {str(entry["id"]): entry for entry in listed["data"]}
    except ServerFailed as failed:
        cure = tr("start the server, or give another address")
        if failed.status in (401, 403):
            cure = tr("put the server's key into the environment variable {name}", name=KEY)
        raise UserError(str(failed), place=f"--served {address}", cure=cure) from None
    except (KeyError, TypeError):
        cure = tr("give the address of a server that has /v1/chat/completions")
        raise UserError(tr("it has no list of models at /v1/models"), place=root, cure=cure) from None
    named = model or Path(settings.adapter_dir).resolve().name
    if named not in entries and model is None and len(entries) == 1:
        named = next(iter(entries))
    if named not in entries:
        names = ", ".join(entries)
        cure = did_you_mean(named, list(entries)) or tr(
            "name one of these with --model: {names}", names=names
        )
        what = tr('the server has no model "{name}"', name=named)
        raise UserError(what, place="--model" if model else f"--served {address}", cure=cure)
    owner = str(entries[named].get("owned_by", ""))
    return Server(root, owner, entries, named)


class _NoRedirects(HTTPRedirectHandler):
    """A request that is sent on would lose its content, and would give the key to another server."""

    def redirect_request(self, *_: object) -> None:
        return None


def exchange(address: str, body: Mapping[str, Any] | None, seconds: float, key: str | None = None) -> Any:
    """The JSON that a server answers: to GET, or to POST of `body`. `key`: by default the one in $OPENAI_API_KEY.

    Raises ServerFailed.
    """
    headers = {"Accept": "application/json"}
    if key := key or os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    data = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        data = json.dumps(body).encode()
    try:
        with build_opener(_NoRedirects).open(Request(address, data, headers), timeout=seconds) as response:
            content = response.read(MOST_BYTES + 1)
    except HTTPError as error:
        with error:
            raise ServerFailed(_reason(error), error.code, _retry_after(error)) from None
    except (URLError, HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ServerFailed(tr("no answer from the server ({reason})", reason=reason)) from None
    if len(content) > MOST_BYTES:
        raise ServerFailed(tr("the server's response is longer than {size} MB", size=MOST_BYTES >> 20))
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ServerFailed(tr("the server's response is no JSON")) from None


def _retry_after(error: HTTPError) -> float | None:
    """The seconds of the header Retry-After; None without it, and for a date."""
    text = (error.headers.get("Retry-After") or "").strip()
    return float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text) else None


def _reason(error: HTTPError) -> str:
    """What the server says, within its JSON or as text."""
    text = error.read(4096).decode("utf-8", "replace")
    try:
        content = json.loads(text)
        inner = content.get("error", content)
        said = inner.get("message") if isinstance(inner, Mapping) else inner
    except (ValueError, AttributeError, RecursionError):
        said = text
    return tr("the server says {status}: {text:.300}", status=error.code, text=str(said or error.reason))


def first_choice(response: Any) -> Mapping[str, Any]:
    """Raises ServerFailed if there is none."""
    try:
        choice = response["choices"][0]
    except (KeyError, TypeError, IndexError):
        choice = None
    if not isinstance(choice, Mapping):
        raise ServerFailed(tr("the server's response has no choices"))
    return choice


def _answer(
    response: Mapping[str, Any], choice: Mapping[str, Any], text: str, prompt_ids: list[int] | None
) -> ServedAnswer:
    usage = response.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    return ServedAnswer(
        text,
        str(choice.get("finish_reason") or ""),
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
        prompt_ids,
        _ids(choice.get("token_ids")),
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _ids(value: object) -> list[int] | None:
    return value if isinstance(value, list) and all(type(number) is int for number in value) else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
