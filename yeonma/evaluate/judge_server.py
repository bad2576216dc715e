"""A model on a server with OpenAI's API, asked which of two answers is better: many requests at once, with retries.

No torch here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import urlsplit

from yeonma.config.settings import JudgeSettings
from yeonma.errors import Log, Problem, UserError, did_you_mean
from yeonma.evaluate.judge_verdicts import SCHEMA, verdict_in
from yeonma.messages import tr
from yeonma.verify.server_client import (
    FIRST_SECONDS,
    SECONDS,
    ServerFailed,
    exchange,
    first_choice,
)

JUDGE_KEY = "YEONMA_JUDGE_KEY"
"""The environment variable with the key of the judge's server. Without it, $OPENAI_API_KEY is sent."""
TRIES = 6
FIRST_WAIT_SECONDS = 1.0
"""Before the second try; doubled before each further one."""
LONGEST_WAIT_SECONDS = 60.0
"""Also where the server asks for more by Retry-After."""
_REFUSED_ROW = (400, 413, 422)
"""What servers answer to one request among good ones: too long, or against their rules of content."""
_AGAIN = (0, 408, 409, 425, 429)
"""And everything from 500 on. 0: no response."""


@dataclass(frozen=True)
class Accepted:
    """Which parameters a server takes beside model and messages. Not all servers, and not all models, take all."""

    schema: bool = True
    """`response_format` with a JSON schema."""
    seed: bool = True
    temperature: bool = True
    tokens: str = "max_tokens"
    """The name of the most tokens to generate: newer models of OpenAI take `max_completion_tokens`."""

    def without(self, message: str) -> Accepted | None:
        """What to try after a refusal with this message: without the parameter that it names, else without the next
        one; None if there is nothing left to leave out."""
        if "max_completion_tokens" in message and self.tokens == "max_tokens":
            return replace(self, tokens="max_completion_tokens")
        named = [name for name in ("temperature", "seed") if getattr(self, name) and name in message]
        for name in (*named, "schema", "seed"):
            if getattr(self, name):
                left_out: dict[str, Any] = {name: False}
                return replace(self, **left_out)
        return None


@dataclass(frozen=True)
class JudgeReply:
    text: str
    finish: str
    prompt_tokens: int | None
    answer_tokens: int | None


@dataclass(frozen=True)
class Judge:
    """A model on a server, and how it is asked."""

    api: str
    """The address before `/chat/completions`."""
    model: str
    most_tokens: int
    requests: int
    """At once."""
    seed: int
    accepted: Accepted = field(default_factory=Accepted)

    @property
    def host(self) -> str:
        return urlsplit(self.api).netloc

    def body(self, prompt: str) -> dict[str, Any]:
        """The content of a request, which decides the verdict."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            self.accepted.tokens: self.most_tokens,
        }
        if self.accepted.temperature:
            body["temperature"] = 0
        if self.accepted.seed:
            body["seed"] = self.seed
        if self.accepted.schema:
            schema = {"name": "verdict", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def reply(self, body: Mapping[str, Any]) -> JudgeReply:
        """One request. Raises ServerFailed."""
        response = exchange(f"{self.api}/chat/completions", body, SECONDS, os.environ.get(JUDGE_KEY))
        choice = first_choice(response)
        message = choice.get("message")
        content = message.get("content") if isinstance(message, Mapping) else None
        usage = response.get("usage")
        counts = usage if isinstance(usage, Mapping) else {}
        prompt, answer = (counts.get(name) for name in ("prompt_tokens", "completion_tokens"))
        return JudgeReply(
            content if isinstance(content, str) else "",
            str(choice.get("finish_reason") or ""),
            prompt if type(prompt) is int else None,
            answer if type(answer) is int else None,
        )


def check_judge_settings(settings: JudgeSettings) -> None:
    """Raises UserError for an address that is none, a missing name, and settings that only go with `judge`."""
    if settings.judge is None:
        problems = [
            Problem(
                tr("it is for a judge, and there is none"),
                f"--{one.name}",
                tr("give the address of its server with --judge, or leave it out"),
            )
            for one in fields(settings)
            if getattr(settings, one.name) != one.default
        ]
        if problems:
            raise UserError(problems)
        return
    parts = urlsplit(settings.judge)
    place = "--judge"
    if "@" in parts.netloc:
        cure = tr("put the key into the environment variable {name}", name=JUDGE_KEY)
        raise UserError(tr("an address with a name or a password"), place=place, cure=cure)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        cure = tr("give an address such as http://127.0.0.1:8000")
        raise UserError(tr("not the address of a server"), place=f"--judge {settings.judge}", cure=cure)
    if not settings.judge_model:
        raise UserError(
            tr("a judge needs a name"),
            place="--judge_model",
            cure=tr("give the name of the model on the judge's server"),
        )


def judge_of(settings: JudgeSettings, seed: int) -> Judge | None:
    """The judge of the settings; None if there is none. Raises UserError as `check_judge_settings`."""
    check_judge_settings(settings)
    if settings.judge is None or settings.judge_model is None:
        return None
    address = re.sub(r"(/chat/completions)?/*$", "", settings.judge)
    api = address if urlsplit(address).path else f"{address}/v1"
    return Judge(api, settings.judge_model, settings.judge_tokens, settings.judge_requests, seed)


def tried(judge: Judge, prompt: str, log: Log) -> tuple[Judge, JudgeReply]:
    """Asks once, without the parameters that the server refuses. Returns the judge with those that it takes, and what
    it answered. `log` gets what it does not take. Raises UserError if it gives no answer."""
    while True:
        try:
            reply = _with_retries(judge, judge.body(prompt), Event())
            break
        except ServerFailed as failed:
            accepted = judge.accepted.without(str(failed)) if failed.status in _REFUSED_ROW else None
            if accepted is None:
                raise _no_judge(judge, failed) from None
            judge = replace(judge, accepted=accepted)
    if not judge.accepted.temperature:
        log(tr("the judge takes no temperature: it may answer the same question differently"))
    if not judge.accepted.seed:
        log(tr("the judge takes no seed"))
    if verdict_in(reply.text, cut=reply.finish == "length") is None:
        log(
            tr(
                'warning: the judge\'s answer to a trial is no verdict: "{text:.200}". Answers like this one are '
                "counted, not guessed",
                text=reply.text,
            )
        )
    return judge, reply


def ask_all(
    judge: Judge, prompts: Sequence[str], on_reply: Callable[[int, JudgeReply | ServerFailed], None]
) -> None:
    """Asks all prompts, several at once. `on_reply` gets each one's place with its reply, or with the refusal of this
    one alone, in the order in which they come; it runs in the calling thread.

    Raises UserError if the judge does not answer any more. What it was still writing then, or at an interrupt, is lost.
    """
    places, lock, stop = iter(range(len(prompts))), Lock(), Event()
    outcomes: SimpleQueue[tuple[int, JudgeReply | BaseException]] = SimpleQueue()

    def work() -> None:
        for place in _shared(places, lock):
            if stop.is_set():
                return
            outcome: JudgeReply | BaseException
            try:
                outcome = _with_retries(judge, judge.body(prompts[place]), stop)
            except BaseException as error:  # for the calling thread to raise
                outcome = error
            if _ends_all(outcome):
                stop.set()
            outcomes.put((place, outcome))

    for _ in range(min(judge.requests, len(prompts))):
        Thread(target=work, daemon=True).start()
    try:
        for _ in prompts:
            place, outcome = outcomes.get()
            if isinstance(outcome, ServerFailed) and _ends_all(outcome):
                raise _no_judge(judge, outcome)
            if not isinstance(outcome, (JudgeReply, ServerFailed)):
                raise outcome
            on_reply(place, outcome)
    finally:
        stop.set()


def _ends_all(outcome: JudgeReply | BaseException) -> bool:
    """Whether no further request makes sense."""
    if isinstance(outcome, ServerFailed):
        return outcome.status not in _REFUSED_ROW
    return isinstance(outcome, BaseException)


def _shared(places: Iterator[int], lock: Lock) -> Iterator[int]:
    """Each place goes to one of the threads."""
    while True:
        with lock:
            place = next(places, None)
        if place is None:
            return
        yield place


def _with_retries(judge: Judge, body: Mapping[str, Any], stop: Event) -> JudgeReply:
    """Asks again, after growing waits, where the server is busy or does not answer. Raises ServerFailed."""
    for number in range(TRIES - 1):
        try:
            return judge.reply(body)
        except ServerFailed as failed:
            if failed.status not in _AGAIN and failed.status < 500:
                raise
            wait = FIRST_WAIT_SECONDS * 2**number if failed.retry_after is None else failed.retry_after
            if stop.wait(min(wait, LONGEST_WAIT_SECONDS)):
                raise
    return judge.reply(body)


def _no_judge(judge: Judge, failed: ServerFailed) -> UserError:
    cure = tr("start its server, or give another address; verdicts so far stay, and the same command goes on")
    if failed.status in (401, 403):
        cure = tr("put the key of the judge's server into the environment variable {name}", name=JUDGE_KEY)
    elif failed.status in (402, 429):
        cure = tr(
            "wait, or raise the limit of the account; verdicts so far stay, and the same command goes on"
        )
    elif failed.status == 404 or "model" in str(failed):
        names = _models(judge)
        cure = did_you_mean(judge.model, names) or (
            tr("name one of these with --judge_model: {names}", names=", ".join(names)) if names else cure
        )
    place = tr("judge {model} at {host}", model=judge.model, host=judge.host)
    return UserError(str(failed), place=place, cure=cure)


def _models(judge: Judge) -> list[str]:
    """The names that the server lists; empty if it lists none."""
    try:
        listed = exchange(f"{judge.api}/models", None, FIRST_SECONDS, os.environ.get(JUDGE_KEY))
        return [str(entry["id"]) for entry in listed["data"]]
    except (ServerFailed, KeyError, TypeError):
        return []


def accepted_from(value: object) -> Accepted | None:
    """What `asdict` made of an `Accepted`; None for anything else."""
    names = {one.name for one in fields(Accepted)}
    if not isinstance(value, Mapping) or set(value) != names or type(value["tokens"]) is not str:
        return None
    return Accepted(**value)
