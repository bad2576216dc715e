"""The thread that generates answers: joining jobs, cancelled jobs, out of memory."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import FOREST_FAMILIES, VOCABULARY, tiny_model
from tests.runs import characters
from yeonma.adapter.prompt_builder import Prompt
from yeonma.config.settings import AnswerSettings
from yeonma.generation.completion import generate
from yeonma.generation.sampling import SamplingParams
from yeonma.model.forest_support import check_forest_support
from yeonma.serve.openai_responses import Reply
from yeonma.serve.worker import Busy, Job, PromptTooLarge, ServedModel, Worker
from yeonma.tokenization.example import AnswerTokens

LENGTHS = (30, 3, 17, 9, 1, 12)
PATIENCE_SECONDS = 60


class Events:
    """What the worker reports about a job."""

    def __init__(self) -> None:
        self.queue: queue.Queue[str | Reply | Exception] = queue.Queue()
        self.texts: list[str] = []

    def end(self) -> Reply | Exception:
        while isinstance(event := self.queue.get(timeout=PATIENCE_SECONDS), str):
            self.texts.append(event)
        return event

    def reply(self) -> Reply:
        event = self.end()
        assert isinstance(event, Reply), event
        return event


def prompts(lengths: Sequence[int] = LENGTHS, shared: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    prefix = rng.integers(4, VOCABULARY, shared)
    return [
        np.concatenate([prefix, rng.integers(4, VOCABULARY, length)]).astype(np.int32) for length in lengths
    ]


def job(ids: np.ndarray, model: str = "a", streams: bool = False, **settings: Any) -> tuple[Job, Events]:
    events = Events()
    answer_settings = AnswerSettings(**{"max_new_tokens": 12, **settings})
    return Job(model, Prompt(ids), answer_settings, (), streams, events.queue.put), events


def as_served(model: Any) -> ServedModel:
    return ServedModel(model, characters(), AnswerTokens((2,)), check_forest_support(model), nullcontext)


@contextmanager
def running_worker(
    models: dict[str, ServedModel], jobs: Sequence[Job] = (), **options: int
) -> Iterator[Worker]:
    """A worker that starts with the jobs already in its queue."""
    worker = Worker(models, **{"batch_size": 4, "max_waiting": 100, **options})
    worker.submit(jobs)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def generated_text(model: Any, ids: np.ndarray, **settings: Any) -> str:
    sampling = SamplingParams((2,), **{"max_new_tokens": 12, **settings})
    return generate(model, characters(), [ids], sampling, by_forest=False)[0].text


@pytest.mark.parametrize("family", ["llama", "lfm2", "bloom"])  # the last one by one
@pytest.mark.parametrize("shared", [0, 20])
def test_answers_equal_generate_whatever_else_is_in_the_batch(family: str, shared: int) -> None:
    model = tiny_model(family)
    all_ids = prompts(shared=shared)
    settings: list[dict[str, Any]] = [
        {},
        {"max_new_tokens": 3},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.0, "seed": 6, "top_k": 9},
        {"repetition_penalty": 1.7},
        {"temperature": 0.5, "repetition_penalty": 1.3, "top_p": 0.8},
    ]
    answers = [
        generated_text(model, ids, **job_settings)
        for ids, job_settings in zip(all_ids, settings, strict=True)
    ]
    pairs = [
        job(ids, streams=bool(index % 2), **job_settings)
        for index, (ids, job_settings) in enumerate(zip(all_ids, settings, strict=True))
    ]
    served_model = as_served(model)
    assert served_model.by_forest == (family in FOREST_FAMILIES)
    with running_worker({"a": served_model}, [job for job, _ in pairs]):
        for index, (_, events) in enumerate(pairs):
            assert events.reply().text == answers[index]
            assert "".join(events.texts) == (answers[index] if index % 2 else "")


def test_shared_prefix_is_fed_to_the_model_once() -> None:
    model = tiny_model("llama")
    served_model = as_served(model)
    all_ids = prompts(shared=20)
    fed_ids: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: fed_ids.extend(keywords["input_ids"][0].tolist()), with_kwargs=True
    )
    pairs = [job(ids, max_new_tokens=1) for ids in all_ids[:4]]
    with running_worker({"a": served_model}, [job for job, _ in pairs]):
        for _, events in pairs:
            events.reply()
    prefix = all_ids[0][:20].tolist()
    assert fed_ids == prefix + [number for ids in all_ids[:4] for number in ids[20:].tolist()]


def test_later_job_joins_the_batch_and_one_for_another_model_waits() -> None:
    models = {"a": tiny_model("llama"), "b": tiny_model("llama", seed=1)}
    rows: list[tuple[str, int]] = []
    served_models = {}
    first, first_events = job(prompts()[0], streams=True, max_new_tokens=60)
    later, later_events = job(prompts()[1])
    other, other_events = job(prompts()[2], "b")
    last, last_events = job(prompts()[3])
    for name, model in models.items():
        served_models[name] = as_served(model)

        def watch(module: Any, args: Any, keywords: Any, name: str = name) -> None:
            rows.append((name, len(keywords["logits_to_keep"])))
            if len(rows) == 3:  # while the first one runs
                worker.submit([later, other, last])

        model.register_forward_pre_hook(watch, with_kwargs=True)
    with running_worker(served_models) as worker:
        worker.submit([first])
        texts = [events.reply().text for events in (first_events, later_events, other_events, last_events)]
    assert ("a", 2) in rows  # the first and the later one
    assert [name for name, _ in groupby(name for name, _ in rows)] == ["a", "b", "a"]
    model_a, model_b = tiny_model("llama"), tiny_model("llama", seed=1)
    first_two = [
        generated_text(model_a, prompts()[0], max_new_tokens=60),
        generated_text(model_a, prompts()[1]),
    ]
    assert texts == [*first_two, generated_text(model_b, prompts()[2]), generated_text(model_a, prompts()[3])]


def test_cancelled_jobs_take_no_more_steps() -> None:
    model = tiny_model("llama")
    served_model = as_served(model)
    steps: list[int] = []
    running, _ = job(prompts()[0], max_new_tokens=90)
    waiting, _ = job(prompts()[1])
    last, events = job(prompts()[2])
    waiting.cancelled.set()

    def watch(module: Any, args: Any, keywords: Any) -> None:
        steps.append(len(keywords["logits_to_keep"]))
        if len(steps) == 5:
            running.cancelled.set()

    model.register_forward_pre_hook(watch, with_kwargs=True)
    with running_worker({"a": served_model}, [running, waiting, last], batch_size=1):
        reply = events.reply()
    assert steps == [1] * (5 + len(reply.token_ids) + reply.stopped)


def test_out_of_memory_shrinks_the_batch_and_keeps_the_answers() -> None:
    model = tiny_model("llama")
    answers = [generated_text(model, ids) for ids in prompts()]
    served_model = as_served(model)
    sizes: list[int] = []

    def refuse(module: Any, args: Any, keywords: Any) -> None:
        sizes.append(len(keywords["logits_to_keep"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no")

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    pairs = [job(ids, streams=True) for ids in prompts()]
    with running_worker({"a": served_model}, [job for job, _ in pairs], batch_size=6):
        assert [events.reply().text for _, events in pairs] == answers
        assert ["".join(events.texts) for _, events in pairs] == answers
        assert max(sizes) == 6 and sizes[-1] <= 2
        hook.remove()
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        failed, events = job(prompts()[0])
    with running_worker({"a": served_model}, [failed]):
        assert isinstance(events.end(), PromptTooLarge)


def test_exception_is_reported_and_the_next_job_is_answered() -> None:
    model = tiny_model("llama")
    served_model = as_served(model)
    hook = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError()))
    failing, failing_events = job(prompts()[0])
    following, events = job(prompts()[1])
    with running_worker({"a": served_model}, [failing]) as worker:
        assert isinstance(failing_events.end(), ZeroDivisionError)
        hook.remove()
        worker.submit([following])
        assert events.reply().text == generated_text(tiny_model("llama"), prompts()[1])


def test_full_queue_and_stopped_worker_refuse_jobs() -> None:
    pairs = [job(ids) for ids in prompts()]
    worker = Worker({"a": as_served(tiny_model("llama"))}, 4, 5)
    worker.submit([job for job, _ in pairs[:5]])
    with pytest.raises(Busy, match="5 requests are waiting"):
        worker.submit([pairs[5][0]])
    worker.start()
    worker.stop()
    results = [events.end() for _, events in pairs[:5]]
    assert all(isinstance(result, Reply | Busy) for result in results)
    with pytest.raises(Busy, match="shutting down"):
        worker.submit([pairs[5][0]])
