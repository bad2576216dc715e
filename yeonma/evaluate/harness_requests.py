"""The requests of lm-evaluation-harness on token ids, answered over forests and kept on disk.

All requests of a block are one forest: few-shot examples, a question and its options are computed once, and no request
is padded. Numbers are those of the harness's own model class for transformers, up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from yeonma.errors import Log
from yeonma.evaluate.answer_cache import AnswerCache
from yeonma.files import content_key
from yeonma.generation.completion import Answer
from yeonma.generation.sampling import SamplingParams
from yeonma.messages import counted, tr
from yeonma.policy import Policy
from yeonma.run_folder.progress import passes_a_tenth

BLOCK_TOKENS = 8192
"""Tokens of one forest; a single longer request is not split."""
LOOK_BACK = 2
"""Tokens before those of a stop text in which it is searched: a model may write it with other tokens."""

RequestIds = tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """Tokens of which the last `scored` are the continuation whose likelihood is asked for."""

    token_ids: RequestIds
    scored: int

    def key(self, identity: str) -> str:
        return content_key("loglikelihood", identity, self.token_ids, self.scored)


@dataclass(frozen=True)
class OpenQuestion:
    """A prompt to answer until one of the texts `until` occurs. `task`: those of one task are answered together."""

    prompt: RequestIds
    sampling: SamplingParams
    until: tuple[str, ...]
    task: str = ""

    def key(self, identity: str) -> str:
        sampling = self.sampling
        numbers: list[float] = []
        if sampling.temperature > 0:
            numbers = [sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed]
        limits = sampling.stop_ids, sampling.max_new_tokens, sampling.repetition_penalty
        return content_key("generate_until", identity, self.prompt, limits, numbers, self.until)


@dataclass(frozen=True, eq=False)
class RequestRunner:
    """Answers requests with one model, and keeps each answer in `cache`, which later calls and commands read."""

    policy: Policy
    tokenizer: Any
    name: str
    """Of the model, for lines of progress."""
    identity: str
    """Of the model, in the cache: what determines its numbers."""
    cache: AnswerCache
    log: Log
    batch_size: int
    """Prompts to answer at once."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many requests were `asked` and `computed`."""

    def loglikelihoods(self, requests: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """(Log-likelihood of the continuation, whether greedy decoding writes it), in the order of the requests.

        Raises UserError if a single request does not fit into the device's memory.
        """
        keys = [request.key(self.identity) for request in requests]
        waiting = self._new(requests, keys)
        self._tell_known(len(requests), len(waiting))
        progress = self._progress(len(waiting))
        for block in blocks(list(waiting.values()), BLOCK_TOKENS):
            for request, (logprob, is_greedy) in zip(block, self._score(block), strict=True):
                record = {"nll": -logprob, "trained_tokens": request.scored, "greedy": is_greedy}
                self.cache.add(request.key(self.identity), record)
            progress(len(block))
        records = [self.cache.records[key] for key in keys]
        return [(-record["nll"], bool(record["greedy"])) for record in records]

    def _score(self, block: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """The options of one context are one unit, so that they share all of it."""
        contexts: dict[RequestIds, int] = {}
        units = [
            contexts.setdefault(request.token_ids[: len(request.token_ids) - request.scored], len(contexts))
            for request in block
        ]
        token_ids = [np.array(request.token_ids, dtype=np.int64) for request in block]
        scored = [
            np.arange(len(request.token_ids)) >= len(request.token_ids) - request.scored for request in block
        ]
        scores = self.policy.token_scores(token_ids, scored, top=1, units=units)
        results = []
        for request, score in zip(block, scores, strict=True):
            greedy = score.top_id_NK[:, 0].tolist()
            is_greedy = greedy == list(request.token_ids[len(request.token_ids) - request.scored :])
            results.append((float(score.logprob_N.sum()), is_greedy))
        return results

    def generations(self, requests: Sequence[OpenQuestion]) -> list[str]:
        """The text of each answer, up to its first stop text. Raises UserError as `Policy.generate_from_ids`."""
        keys = [request.key(self.identity) for request in requests]
        waiting = self._new(requests, keys)
        self._tell_known(len(requests), len(waiting))
        progress = self._progress(len(waiting))
        groups: dict[tuple[str, SamplingParams], list[OpenQuestion]] = {}
        for request in waiting.values():
            groups.setdefault((request.task, request.sampling), []).append(request)
        for (_, sampling), group in groups.items():
            self._answer(group, sampling, progress)
        return [str(self.cache.records[key]["text"]) for key in keys]

    def _answer(
        self, group: Sequence[OpenQuestion], sampling: SamplingParams, progress: Callable[[int], None]
    ) -> None:
        """Answers prompts of one task, which are decoded as one forest."""
        look_back = [self._look_back(request.until) for request in group]

        def is_over(index: int, ids: Sequence[int]) -> bool:
            tail = self.tokenizer.decode(list(ids[-look_back[index] :]))
            return any(text in tail for text in group[index].until)

        def keep(index: int, answer: Answer) -> None:
            text = self.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
            for stop in group[index].until:
                text = text.split(stop)[0]
            record = {"text": text, "token_ids": list(answer.token_ids), "ended": answer.ended}
            self.cache.add(group[index].key(self.identity), record)
            progress(1)

        self.policy.generate_from_ids(
            [request.prompt for request in group],
            self.tokenizer,
            sampling,
            batch_size=self.batch_size,
            on_answer=keep,
            is_over=is_over,
        )

    def _look_back(self, until: Sequence[str]) -> int:
        """Tokens at the end of an answer in which its stop texts are searched."""
        lengths = [len(self.tokenizer.encode(text, add_special_tokens=False)) for text in until]
        return max(lengths, default=0) + LOOK_BACK

    def _new(self, requests: Sequence[Any], keys: Sequence[str]) -> dict[str, Any]:
        """Key -> request, of those without an answer, each once."""
        known = self.cache.records
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
        self.counts.update(asked=len(requests), computed=len(new))
        return new

    def _tell_known(self, asked: int, new: int) -> None:
        if not new and asked:
            self.log(
                tr("{name}: {requests} answered before", name=self.name, requests=counted(asked, "request"))
            )

    def _progress(self, total: int) -> Callable[[int], None]:
        """Counts answers, and tells every tenth of them."""
        done = 0

        def add(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            if passes_a_tenth(done, before, total):
                of = counted(total, "request")
                self.log(tr("{name}: answered {done} of {rows}", name=self.name, done=done, rows=of))

        return add


def blocks(requests: Sequence[Continuation], block_tokens: int) -> Iterator[list[Continuation]]:
    """The requests in the order of their tokens, in groups of at most `block_tokens` distinct tokens."""
    ordered = sorted(requests, key=lambda request: request.token_ids)
    common = [0] * len(ordered[:1]) + [_common(a.token_ids, b.token_ids) for a, b in pairwise(ordered)]
    block: list[Continuation] = []
    tokens = 0
    for request, shared in zip(ordered, common, strict=True):
        length = len(request.token_ids)
        if block and tokens + length - shared > block_tokens:
            yield block
            block, tokens, shared = [], 0, 0
        block.append(request)
        tokens += length - shared
    if block:
        yield block


def _common(a: RequestIds, b: RequestIds) -> int:
    """The length of the common beginning of two sequences."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # a slice compares faster than a loop
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def seeded(request: OpenQuestion, repeat: int) -> OpenQuestion:
    """The same request asked once more: sampled answers then differ, greedy ones cannot."""
    if repeat == 0 or request.sampling.temperature == 0:
        return request
    return replace(request, sampling=replace(request.sampling, seed=request.sampling.seed + repeat))
