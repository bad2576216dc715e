"""The thread that answers: who joins, who has gone, what happens when memory is short."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import VOCABULARY, tiny_model
from tests.runs import characters
from yeonma.adapter.prompt_builder import Prompt
from yeonma.config.settings import AnswerSettings
from yeonma.generation.completion import generate
from yeonma.generation.sampling import SamplingParams
from yeonma.model.forest_support import check_forest_support
from yeonma.serve.openai_api import Reply
from yeonma.serve.worker import Busy, Job, NoRoom, ServedModel, Worker

LENGTHS = (30, 3, 17, 9, 1, 12)
PATIENCE_SECONDS = 60


class Heard:
    """What a job is told."""

    def __init__(self) -> None:
        self.events: queue.Queue[str | Reply | Exception] = queue.Queue()
        self.texts: list[str] = []

    def end(self) -> Reply | Exception:
        while isinstance(event := self.events.get(timeout=PATIENCE_SECONDS), str):
            self.texts.append(event)
        return event

    def reply(self) -> Reply:
        found = self.end()
        assert isinstance(found, Reply), found
        return found


def prompts(lengths: Sequence[int] = LENGTHS, shared: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    frame = draw.integers(4, VOCABULARY, shared)
    return [
        np.concatenate([frame, draw.integers(4, VOCABULARY, length)]).astype(np.int32) for length in lengths
    ]


def job(ids: np.ndarray, model: str = "a", streams: bool = False, **how: Any) -> tuple[Job, Heard]:
    heard = Heard()
    settings = AnswerSettings(**{"max_new_tokens": 12, **how})
    return Job(model, Prompt(ids), settings, (), streams, heard.events.put), heard


def speaker(model: Any) -> ServedModel:
    return ServedModel(model, characters(), (2,), check_forest_support(model).forest, nullcontext)


@contextmanager
def working(speakers: dict[str, ServedModel], jobs: Sequence[Job] = (), **options: int) -> Iterator[Worker]:
    """With the jobs in the queue before it begins."""
    worker = Worker(speakers, **{"batch_size": 4, "most_waiting": 100, **options})
    worker.put(jobs)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def expected(model: Any, ids: np.ndarray, **how: Any) -> str:
    sampling = SamplingParams((2,), **{"max_new_tokens": 12, **how})
    return generate(model, characters(), [ids], sampling, by_forest=False)[0].text


@pytest.mark.parametrize("family", ["llama", "lfm2"])  # by a forest; one by one
@pytest.mark.parametrize("shared", [0, 20])
def test_each_is_answered_as_by_generate_in_whatever_company(family: str, shared: int) -> None:
    model = tiny_model(family)
    asked = prompts(shared=shared)
    ways: list[dict[str, Any]] = [
        {},
        {"max_new_tokens": 3},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.0, "seed": 6, "top_k": 9},
        {"repetition_penalty": 1.7},
        {"temperature": 0.5, "repetition_penalty": 1.3, "top_p": 0.8},
    ]
    wanted = [expected(model, ids, **how) for ids, how in zip(asked, ways, strict=True)]
    pairs = [
        job(ids, streams=bool(at % 2), **how) for at, (ids, how) in enumerate(zip(asked, ways, strict=True))
    ]
    one = speaker(model)
    assert one.by_forest == (family == "llama")
    with working({"a": one}, [each for each, _ in pairs]):
        for at, (_, heard) in enumerate(pairs):
            assert heard.reply().text == wanted[at]
            assert "".join(heard.texts) == (wanted[at] if at % 2 else "")


def test_the_ids_that_reach_the_model_are_the_prompts() -> None:
    model = tiny_model("llama")
    one = speaker(model)
    asked = prompts(shared=20)
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: seen.extend(keywords["input_ids"][0].tolist()), with_kwargs=True
    )
    pairs = [job(ids, max_new_tokens=1) for ids in asked[:4]]
    with working({"a": one}, [each for each, _ in pairs]):
        for _, heard in pairs:
            heard.reply()
    frame = asked[0][:20].tolist()
    assert seen == frame + [number for ids in asked[:4] for number in ids[20:].tolist()]


def test_one_that_comes_later_joins_and_another_models_waits() -> None:
    models = {"a": tiny_model("llama"), "b": tiny_model("llama", seed=1)}
    rows: list[tuple[str, int]] = []
    speakers = {}
    first, heard = job(prompts()[0], streams=True, max_new_tokens=60)
    later, later_heard = job(prompts()[1])
    other, other_heard = job(prompts()[2], "b")
    behind, behind_heard = job(prompts()[3])
    for name, model in models.items():
        speakers[name] = speaker(model)

        def watch(module: Any, args: Any, keywords: Any, name: str = name) -> None:
            rows.append((name, len(keywords["logits_to_keep"])))
            if len(rows) == 3:  # while the first is at work
                worker.put([later, other, behind])

        model.register_forward_pre_hook(watch, with_kwargs=True)
    with working(speakers) as worker:
        worker.put([first])
        texts = [each.reply().text for each in (heard, later_heard, other_heard, behind_heard)]
    assert ("a", 2) in rows  # the first and the later one
    assert [name for name, _ in groupby(name for name, _ in rows)] == ["a", "b", "a"]
    a, b = tiny_model("llama"), tiny_model("llama", seed=1)
    wanted = [expected(a, prompts()[0], max_new_tokens=60), expected(a, prompts()[1])]
    assert texts == [*wanted, expected(b, prompts()[2]), expected(a, prompts()[3])]


def test_nobody_works_for_those_who_have_gone() -> None:
    model = tiny_model("llama")
    one, steps = speaker(model), []
    gone, _ = job(prompts()[0], max_new_tokens=90)
    never, _ = job(prompts()[1])
    last, heard = job(prompts()[2])
    never.gone.set()

    def watch(module: Any, args: Any, keywords: Any) -> None:
        steps.append(len(keywords["logits_to_keep"]))
        if len(steps) == 5:
            gone.gone.set()

    model.register_forward_pre_hook(watch, with_kwargs=True)
    with working({"a": one}, [gone, never, last], batch_size=1):
        reply = heard.reply()
    assert steps == [1] * (5 + len(reply.token_ids) + reply.ended)


def test_short_memory_means_fewer_at_once_and_the_same_answers() -> None:
    model = tiny_model("llama")
    wanted = [expected(model, ids) for ids in prompts()]
    one, most = speaker(model), []

    def refuse(module: Any, args: Any, keywords: Any) -> None:
        most.append(len(keywords["logits_to_keep"]))
        if most[-1] > 2:
            raise torch.OutOfMemoryError("no")

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    pairs = [job(ids, streams=True) for ids in prompts()]
    with working({"a": one}, [each for each, _ in pairs], batch_size=6):
        assert [heard.reply().text for _, heard in pairs] == wanted
        assert ["".join(heard.texts) for _, heard in pairs] == wanted
        assert max(most) == 6 and most[-1] <= 2
        hook.remove()
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        failed, heard = job(prompts()[0])
    with working({"a": one}, [failed]):
        assert isinstance(heard.end(), NoRoom)


def test_a_bug_is_told_and_the_next_one_is_answered() -> None:
    model = tiny_model("llama")
    one = speaker(model)
    hook = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError()))
    broken, heard = job(prompts()[0])
    whole, later = job(prompts()[1])
    with working({"a": one}, [broken]) as worker:
        assert isinstance(heard.end(), ZeroDivisionError)
        hook.remove()
        worker.put([whole])
        assert later.reply().text == expected(tiny_model("llama"), prompts()[1])


def test_a_full_queue_and_a_stopping_server_take_nothing() -> None:
    one = speaker(tiny_model("llama"))
    pairs = [job(ids) for ids in prompts()]
    worker = Worker({"a": one}, 4, 5)
    worker.put([each for each, _ in pairs[:5]])
    with pytest.raises(Busy, match="5 questions are waiting"):
        worker.put([pairs[5][0]])
    worker.start()
    worker.stop()
    ends = [heard.end() for _, heard in pairs[:5]]
    assert all(isinstance(end, Reply | Busy) for end in ends)
    with pytest.raises(Busy, match="stopping"):
        worker.put([pairs[5][0]])
