"""One thread that answers all questions: those that wait together, and want to be answered alike, in one batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from yeonma.after.api import Reply
from yeonma.model.ask import Question
from yeonma.model.generate import Answer
from yeonma.settings import AnswerSettings

Answerer = Callable[
    [Sequence[Question], AnswerSettings, Callable[[int, Answer], None], Callable[[str], None] | None], None
]
"""Answers questions and calls back with the index of each; the last argument gets the text of a single one as it comes."""


class Busy(Exception):
    """Too many questions wait."""


class _Gone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Job:
    """A question to one model. `tell` is called from the worker's thread: with text, if it streams, then with a Reply
    or an Exception."""

    model: str
    question: Question
    how: AnswerSettings
    streams: bool
    tell: Callable[[str | Reply | Exception], None]
    gone: threading.Event = field(default_factory=threading.Event)

    @property
    def alike(self) -> tuple[object, ...]:
        return self.model, self.how, self.streams


class Worker:
    """The thread and its queue. A streamed answer is computed by itself, others together, first come, first served."""

    def __init__(self, answerers: Mapping[str, Answerer], batch_size: int, most_waiting: int) -> None:
        self._answerers = answerers
        self._batch_size, self._most_waiting = batch_size, most_waiting
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take no more, and tell those that wait; the batch at work is left to itself."""
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
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[Job]:
        """The question that waits longest, and those that can be answered with it; none at the end."""
        with self._changed:
            while True:
                self._jobs = deque(job for job in self._jobs if not job.gone.is_set())
                if self._jobs or self._ended:
                    break
                self._changed.wait()
            if not self._jobs:
                return []
            first = self._jobs[0]
            alike = [job for job in self._jobs if job.alike == first.alike]
            batch = alike[: 1 if first.streams else self._batch_size]
            taken = {id(job) for job in batch}
            self._jobs = deque(job for job in self._jobs if id(job) not in taken)
            return batch

    def _answer(self, batch: Sequence[Job]) -> None:
        def answered(index: int, answer: Answer) -> None:
            text = batch[index].question.answer(answer.text)
            told.add(index)
            batch[index].tell(Reply(text, len(answer.token_ids), answer.ended))

        def on_text(text: str) -> None:
            if batch[0].gone.is_set():
                raise _Gone
            batch[0].tell(text)

        told: set[int] = set()
        try:
            answerer = self._answerers[batch[0].model]
            streamed: Any = on_text if batch[0].streams else None
            answerer([job.question for job in batch], batch[0].how, answered, streamed)
        except _Gone:
            pass
        except Exception as error:  # one bad batch must not end the server
            for index, job in enumerate(batch):
                if index not in told:
                    job.tell(error)
