"""One thread generates all answers, with continuous batching: a request joins the running batch as soon as there is
room.

Requests run in the order of their arrival. Requests to the same model run together, whatever their settings. A request
to another model waits until they have finished, and so do the requests behind it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from yeonma.adapter.prompt_builder import Prompt
from yeonma.config.settings import AnswerSettings
from yeonma.generation.completion import answer_alone, continued_text, generation_mode
from yeonma.generation.forest_decode import DecodeRequest, decode
from yeonma.generation.json_grammar import JsonGrammar, JsonMask
from yeonma.generation.sampling import NO_CHANGES, LogitChanges, SamplingParams
from yeonma.generation.token_scores import ScoredToken, ScoreLog, score_prompts
from yeonma.messages import counted_in_english, tr
from yeonma.model.logprobs import ForestSupport
from yeonma.serve.openai_responses import ReasoningText, Reply, ScoredPrompt
from yeonma.serve.stream_buffer import StreamBuffer
from yeonma.tokenization.example import AnswerTokens

log = logging.getLogger("yeonma.serve")


class Busy(Exception):
    """The queue is full, or the server is shutting down."""


class PromptTooLarge(Exception):
    """A prompt does not fit into the device's memory, even on its own."""


class GrammarFailed(Exception):
    """The grammar of an answer came to a point from which its library knows no way on."""


@dataclass(frozen=True)
class ServedModel:
    """A model to serve. Several share the weights of their base; within `active()`, this one is switched on."""

    model: Any
    """The base model, without PEFT's wrapper."""
    tokenizer: Any
    tokens: AnswerTokens
    support: ForestSupport
    active: Callable[[], AbstractContextManager[object]]

    @property
    def by_forest(self) -> bool:
        return self.support.forest


ScoredTokens = tuple[ScoredToken, ...]
Event = str | ReasoningText | ScoredPrompt | ScoredTokens | Reply | Exception


@dataclass(frozen=True, eq=False)
class Job:
    """A prompt to a model. The worker's thread calls `notify` with pieces of text if `streams`, and finally with a
    Reply or an Exception. `settings.max_new_tokens` may be 0: then the reply is empty."""

    model: str
    prompt: Prompt
    settings: AnswerSettings
    stops: tuple[str, ...]
    streams: bool
    notify: Callable[[Event], None]
    changes: LogitChanges = NO_CHANGES
    grammar: JsonGrammar | None = None
    """What the answer must follow, after any reasoning that the prompt opened."""
    top_logprobs: int | None = None
    """How many of the most likely tokens to score beside each token; None: no scores. In a stream, the new ones come
    before the text to which they belong."""
    scores_prompt: bool = False
    """Whether to notify of a ScoredPrompt as well, before anything else."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when nobody is waiting for the answer any more."""


class Worker:
    """The thread and its queue."""

    def __init__(self, models: Mapping[str, ServedModel], batch_size: int, max_waiting: int) -> None:
        self._models = models
        self._batch_size, self._max_waiting = batch_size, max_waiting
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Abort, and wait until the thread has ended."""
        self.abort()
        self._thread.join()

    def abort(self) -> None:
        """Accept no more jobs, and end those that are running or waiting. All of them are notified."""
        with self._changed:
            self._stopping = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify()
        for job in waiting:
            job.notify(Busy("the server is shutting down"))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs. If there is no room for all of them, queue none and raise Busy."""
        with self._changed:
            if self._stopping:
                raise Busy("the server is shutting down")
            if len(self._jobs) + len(jobs) > self._max_waiting:
                raise Busy(counted_in_english(len(self._jobs), "request is waiting", "requests are waiting"))
            self._jobs.extend(jobs)
            self._changed.notify()

    def _work(self) -> None:
        while jobs := self._next_batch():
            self._run(jobs)

    def _next_batch(self) -> list[Job]:
        """The jobs at the front of the queue that can start together. Waits for some; returns none at shutdown."""
        while True:
            with self._changed:
                while not self._jobs and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return []
                model = self._jobs[0].model
            limit = self._batch_size if self._models[model].by_forest else 1
            if jobs := self._take(limit, model, []):
                return jobs

    def _take(self, limit: int, model: str, prefix: Sequence[int]) -> list[Job]:
        """Take jobs from the front of the queue while they are for this model and their prompts start with `prefix`."""
        jobs: list[Job] = []
        with self._changed:
            while self._jobs and len(jobs) < limit and not self._stopping:
                job = self._jobs[0]
                if not job.cancelled.is_set():
                    ids = job.prompt.token_ids
                    has_prefix = len(ids) > len(prefix) and ids[: len(prefix)].tolist() == list(prefix)
                    if job.model != model or not has_prefix:
                        break
                    jobs.append(job)
                self._jobs.popleft()
        return jobs

    def _run(self, jobs: list[Job]) -> None:
        """Answer these jobs and those that join them. Whatever happens, every job is notified or queued again."""
        served = self._models[jobs[0].model]
        batch = _RequestBatch(served, lambda: self._stopping)
        try:
            with served.active(), generation_mode(served.model):
                requests = batch.add(jobs)
                if not requests:
                    return
                if served.by_forest:
                    decode(
                        served.model,
                        requests,
                        max_rows=self._batch_size,
                        on_done=batch.on_done,
                        on_token=batch.on_token,
                        more=lambda limit, prefix: batch.add(self._take(limit, jobs[0].model, prefix)),
                    )
                else:
                    (request,) = requests
                    ids = answer_alone(
                        served.model,
                        request.prompt,
                        request.sampling,
                        lambda ids: batch.on_token(0, ids),
                        mask=request.mask,
                        scores=request.scores,
                    )
                    batch.on_done(0, ids)
        except torch.OutOfMemoryError:
            self._retry_smaller(batch.unanswered)
        except Exception as error:  # one bad request must not end the server
            for job in batch.unanswered:
                job.notify(error)

    def _retry_smaller(self, jobs: list[Job]) -> None:
        """After running out of memory: queue the jobs again, and use a smaller batch size from now on."""
        if len(jobs) == 1 or self._batch_size == 1:
            job = jobs.pop(0)
            tokens = len(job.prompt.token_ids)
            prompt = f"a prompt of {counted_in_english(tokens, 'token')}"
            message = f"{prompt} and its answer do not fit into the device's memory"
            job.notify(PromptTooLarge(message))
        else:
            self._batch_size = (min(self._batch_size, len(jobs)) + 1) // 2
            log.warning(tr("out of memory: at most %d answers at once from now on"), self._batch_size)
        with self._changed:
            if not self._stopping:
                self._jobs.extendleft(reversed(jobs))
                return
        for job in jobs:
            job.notify(Busy("the server is shutting down"))


@dataclass(eq=False)
class _Running:
    """A job that is being answered."""

    job: Job
    buffer: StreamBuffer
    mask: JsonMask | None
    log: ScoreLog | None
    scores_sent: int = 0

    def new_scores(self) -> ScoredTokens:
        """The scored tokens since the last call."""
        if self.log is None:
            return ()
        new, self.scores_sent = self.log.tokens[self.scores_sent :], len(self.log.tokens)
        return tuple(new)


class _RequestBatch:
    """Jobs that run together. Their indices are those of `decode`."""

    def __init__(self, served: ServedModel, is_stopping: Callable[[], bool]) -> None:
        self._served, self._is_stopping = served, is_stopping
        self._running: list[_Running] = []
        self._unanswered: list[Job] = []

    @property
    def unanswered(self) -> list[Job]:
        return list(self._unanswered)

    def add(self, jobs: Sequence[Job]) -> list[DecodeRequest]:
        """The requests of the jobs that need an answer. Prompts are scored at once."""
        self._unanswered += jobs
        self._score_prompts([job for job in jobs if job.scores_prompt])
        for job in jobs:
            if job.settings.max_new_tokens == 0:
                self._notify_end(job, Reply("", (), False))
        return [self._request(job) for job in jobs if job.settings.max_new_tokens > 0]

    def _score_prompts(self, jobs: Sequence[Job]) -> None:
        prompts = [job.prompt.token_ids.tolist() for job in jobs]
        top = max((job.top_logprobs or 0 for job in jobs), default=0)
        scored = score_prompts(self._served.model, self._served.support, prompts, top)
        for job, tokens in zip(jobs, scored, strict=True):
            kept = (ScoredToken(it.token_id, it.logprob, it.top[: job.top_logprobs or 0]) for it in tokens)
            job.notify(ScoredPrompt(tuple(kept)))

    def _request(self, job: Job) -> DecodeRequest:
        tags = job.prompt.shape.tags
        after = tags.close if tags is not None and job.prompt.opens_reasoning else None
        mask = None if job.grammar is None else job.grammar.mask(after)
        log = None if job.top_logprobs is None else ScoreLog(job.top_logprobs)
        self._running.append(_Running(job, StreamBuffer(job.prompt, job.stops), mask, log))
        tokens = self._served.tokens
        sampling = SamplingParams.of(job.settings, tokens.stop_ids, tokens.shown_ids, job.changes)
        return DecodeRequest(job.prompt.token_ids.tolist(), sampling, mask, log)

    def _notify_end(self, job: Job, event: Reply | Exception) -> None:
        self._unanswered = [other for other in self._unanswered if other is not job]
        job.notify(event)

    def on_token(self, index: int, ids: list[int]) -> bool:
        """Called after every token. Send what can be sent, and return whether to end this answer."""
        running = self._running[index]
        job, buffer = running.job, running.buffer
        if self._is_stopping() or job.cancelled.is_set():
            return True
        if not job.streams and not job.stops:
            return False
        text = self._text(job, ids)
        if buffer.is_stopped(text):
            return True
        if job.streams and (reasoning := buffer.new_reasoning(text)):
            job.notify(ReasoningText(reasoning))
        if job.streams and (new := buffer.new_text(text)):
            if scores := running.new_scores():
                job.notify(scores)
            job.notify(new)
        return False

    def on_done(self, index: int, ids: list[int]) -> None:
        running = self._running[index]
        job, buffer, mask = running.job, running.buffer, running.mask
        if mask is not None and mask.has_failed:
            self._notify_end(job, GrammarFailed("the JSON could not be continued with this model's tokens"))
            return
        ended_by_token = ids[-1] in self._served.tokens.stop_ids
        answer_ids = ids[:-1] if ended_by_token else ids
        text = self._text(job, answer_ids)
        ended = ended_by_token or buffer.is_stopped(text, growing=False)
        ended = ended or (mask is not None and mask.is_over)
        if self._is_stopping() and not ended and len(ids) < job.settings.max_new_tokens:
            self._notify_end(job, Busy("the server is shutting down"))
            return
        if job.streams and (rest := buffer.new_reasoning(text, growing=False)):
            job.notify(ReasoningText(rest))
        if job.streams and (remaining := buffer.remaining_text(text)):
            job.notify(remaining)
        reasoning = job.prompt.reasoning(text)
        scores = () if running.log is None else tuple(running.log.tokens)
        reply = Reply(buffer.answer(text), tuple(answer_ids), ended, reasoning, scores=scores)
        self._notify_end(job, reply)

    def _text(self, job: Job, ids: list[int]) -> str:
        shown_ids = self._served.tokens.shown_ids
        return continued_text(self._served.tokenizer, job.prompt.token_ids.tolist(), ids, shown_ids)
