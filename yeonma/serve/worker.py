"""One thread that answers all questions: a question joins those at work as soon as there is room.

Questions are taken in the order in which they came. Those to one model grow together, whatever way each is to be
answered in; a question to another model waits until they have ended, and those behind it wait with it.
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
from yeonma.generation.sampling import SamplingParams
from yeonma.serve.openai_api import Reply
from yeonma.serve.stream_buffer import StreamBuffer

log = logging.getLogger("yeonma.serve")


class Busy(Exception):
    """No answer now: too many questions wait, or the server is stopping."""


class NoRoom(Exception):
    """A question does not fit into memory."""


@dataclass(frozen=True)
class ServedModel:
    """A model that can be asked. `active` makes it the one that answers for as long as a block runs: several share
    their base's weights."""

    model: Any
    """Without an adapter around it."""
    tokenizer: Any
    stop_ids: tuple[int, ...]
    by_forest: bool
    active: Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, eq=False)
class Job:
    """A question to one model. `tell` is called from the worker's thread: with text, if it streams, then with a Reply
    or an Exception."""

    model: str
    question: Prompt
    how: AnswerSettings
    stops: tuple[str, ...]
    streams: bool
    tell: Callable[[str | Reply | Exception], None]
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the answer any more."""


class Worker:
    """The thread and its queue."""

    def __init__(self, speakers: Mapping[str, ServedModel], batch_size: int, most_waiting: int) -> None:
        self._speakers = speakers
        self._batch_size, self._most_waiting = batch_size, most_waiting
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """`break_off`, and wait until the thread has ended."""
        self.break_off()
        self._thread.join()

    def break_off(self) -> None:
        """Take no more, and end what is at work and what waits; all are told."""
        with self._changed:
            self._ended = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify()
        for job in waiting:
            job.tell(Busy("the server is stopping"))

    def put(self, jobs: Sequence[Job]) -> None:
        """Raises Busy where there is no room for all of them."""
        with self._changed:
            if self._ended:
                raise Busy("the server is stopping")
            if len(self._jobs) + len(jobs) > self._most_waiting:
                raise Busy(f"{len(self._jobs)} questions are waiting")
            self._jobs.extend(jobs)
            self._changed.notify()

    def _work(self) -> None:
        while jobs := self._next():
            self._answer(jobs)

    def _next(self) -> list[Job]:
        """Those that wait longest and can begin together; waits for some. None at the end."""
        while True:
            with self._changed:
                while not self._jobs and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return []
                model = self._jobs[0].model
            most = self._batch_size if self._speakers[model].by_forest else 1
            if found := self._take(most, model, []):
                return found

    def _take(self, most: int, model: str, frame: Sequence[int]) -> list[Job]:
        """From the queue's front, as far as they are for this model and go on from `frame`."""
        found: list[Job] = []
        with self._changed:
            while self._jobs and len(found) < most and not self._ended:
                job = self._jobs[0]
                if not job.gone.is_set():
                    ids = job.question.token_ids
                    begins = len(ids) > len(frame) and ids[: len(frame)].tolist() == list(frame)
                    if job.model != model or not begins:
                        break
                    found.append(job)
                self._jobs.popleft()
        return found

    def _answer(self, jobs: list[Job]) -> None:
        """Answer these and those that join them. Whatever happens, each is told, or stands in the queue again."""
        speaker = self._speakers[jobs[0].model]
        batch = _Batch(speaker, lambda: self._ended)
        try:
            wanted = batch.add(jobs)
            with speaker.active(), generation_mode(speaker.model):
                if speaker.by_forest:
                    decode(
                        speaker.model,
                        wanted,
                        max_rows=self._batch_size,
                        on_done=batch.done,
                        on_token=batch.token,
                        more=lambda most, frame: batch.add(self._take(most, jobs[0].model, frame)),
                    )
                else:
                    (one,) = wanted
                    ids = answer_alone(
                        speaker.model, one.prompt, one.sampling, lambda ids: batch.token(0, ids)
                    )
                    batch.done(0, ids)
        except torch.OutOfMemoryError:
            self._again(batch.unanswered)
        except Exception as error:  # one bad question must not end the server
            for job in batch.unanswered:
                job.tell(error)

    def _again(self, jobs: list[Job]) -> None:
        """After memory was short: with fewer at once from now on."""
        if len(jobs) == 1 or self._batch_size == 1:
            job = jobs.pop(0)
            tokens = len(job.question.token_ids)
            job.tell(
                NoRoom(f"a prompt of {tokens} tokens and its answer do not fit into the device's memory")
            )
        else:
            self._batch_size = (min(self._batch_size, len(jobs)) + 1) // 2
            log.warning("memory is short: at most %d answers at once from now on", self._batch_size)
        with self._changed:
            if not self._ended:
                self._jobs.extendleft(reversed(jobs))
                return
        for job in jobs:
            job.tell(Busy("the server is stopping"))


class _Batch:
    """The questions that are answered in one go, by their numbers."""

    def __init__(self, speaker: ServedModel, ended: Callable[[], bool]) -> None:
        self._speaker, self._ended = speaker, ended
        self._jobs: list[Job] = []
        self._said: list[StreamBuffer] = []
        self._answered: set[int] = set()

    @property
    def unanswered(self) -> list[Job]:
        return [job for at, job in enumerate(self._jobs) if at not in self._answered]

    def add(self, jobs: Sequence[Job]) -> list[DecodeRequest]:
        self._jobs += jobs
        self._said += [StreamBuffer(job.question, job.stops) for job in jobs]
        return [
            DecodeRequest(job.question.token_ids.tolist(), SamplingParams.of(job.how, self._speaker.stop_ids))
            for job in jobs
        ]

    def token(self, index: int, ids: list[int]) -> bool:
        """After every token: show what can be shown, and say whether to end here."""
        job, said = self._jobs[index], self._said[index]
        if self._ended() or job.gone.is_set():
            return True
        if not job.streams and not job.stops:
            return False
        text = self._text(job, ids)
        if said.stopped_at(text) is not None:
            return True
        if job.streams and (new := said.more(text)):
            job.tell(new)
        return False

    def done(self, index: int, ids: list[int]) -> None:
        job, said = self._jobs[index], self._said[index]
        self._answered.add(index)
        by_token = ids[-1] in self._speaker.stop_ids
        kept = ids[:-1] if by_token else ids
        text = self._text(job, kept)
        by_text = said.stopped_at(text) is not None
        if self._ended() and not by_token and not by_text and len(ids) < job.how.max_new_tokens:
            job.tell(Busy("the server is stopping"))
            return
        if job.streams and (rest := said.rest(text)):
            job.tell(rest)
        job.tell(Reply(said.whole(text), tuple(kept), by_token or by_text))

    def _text(self, job: Job, ids: list[int]) -> str:
        return continued_text(self._speaker.tokenizer, job.question.token_ids.tolist(), ids)
