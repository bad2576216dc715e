"""Whether llama.cpp's own server has the token ids of training for an exported file and how far its answers are from
the trained model's, where xllamacpp is installed.

It runs in a process of its own: a fault of native code ends that one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from yeonma.adapter.prompt_builder import PromptBuilder
from yeonma.adapter.sample_answers import SampleAnswer, read_sample_answers
from yeonma.errors import Log
from yeonma.messages import counted, tr
from yeonma.tokenization.chat_template_export import trials

PACKAGE = "xllamacpp"
SECONDS = 600
SMALL_BYTES = 10**9
MARGIN = 256
"""Tokens of context beside those that are asked."""
MOST_TOKENS = 64
"""Of a row's own answer, which are asked one by one."""
LISTED = 200
"""The most likely tokens that the server lists at each place."""
_PROGRAM = f"""\
import json, sys
from urllib.request import Request, urlopen
import {PACKAGE}
request = json.load(sys.stdin)
params = {PACKAGE}.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = request["gguf"], request["context"], 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
params.use_jinja, params.no_extra_bufts, params.warmup, params.fit_params = True, True, False, False
server = {PACKAGE}.Server(params)
def post(path, body):
    headers = {{"Content-Type": "application/json"}}
    with urlopen(Request(server.listening_address + path, json.dumps(body).encode(), headers)) as response:
        return json.load(response)
def ids(asked):
    prompt = asked
    if not isinstance(asked, str):
        try:
            prompt = post("/apply-template", {{"messages": asked}})["prompt"]
        except OSError:
            return None
    return post("/tokenize", {{"content": prompt, "add_special": True, "parse_special": True}})["tokens"]
def generate(prompt, most, listed):
    options = {{"n_predict": most, "n_probs": listed, "temperature": 0.0, "repeat_penalty": 1.0}}
    return post("/completion", {{"prompt": prompt, "return_tokens": True, **options}})
def logprobs(prompt, answer):
    found = []
    for place, token in enumerate(answer):
        told = generate(prompt + answer[:place], 1, request["listed"]).get("completion_probabilities", [])
        likely = {{one["id"]: one["logprob"] for one in told[0]["top_logprobs"]}} if told else {{}}
        found.append(likely.get(token, min(likely.values(), default=None)))
    return found
if "answers" in request:
    print(json.dumps([
        [generate(prompt, most, 0)["tokens"], logprobs(prompt, wanted)]
        for prompt, most, wanted in request["answers"]
    ]))
    sys.exit()
print(json.dumps([ids(asked) for asked in request["prompts"]]))
"""


def is_installed() -> bool:
    return find_spec(PACKAGE) is not None


def check_prompts(gguf: Path, prompt_builder: PromptBuilder, log: Log) -> None:
    """Says on how many trial rows llama.cpp's server has the prompt ids of training; nothing if none can be tried."""
    adapter = prompt_builder.adapter
    if adapter.template.is_text:
        return
    tried = list(trials(adapter.template, prompt_builder.tokenizer, adapter.rules))
    messages = [list(conversation.messages) for conversation, _ in tried]
    if not messages:
        return
    ids = _ids(gguf, messages)
    if ids is None:
        log(
            tr("llama.cpp's server does not start with the chat template in this file: send it whole prompts")
        )
        return
    same = sum(one == expected for one, (_, expected) in zip(ids, tried, strict=True))
    log(
        tr(
            "llama.cpp's server gives the prompt ids of training on {same} of {tried} trial rows",
            same=same,
            tried=len(tried),
        )
    )
    if same < len(tried):
        log(tr("send it whole prompts where they differ: `yeonma inspect` shows them"))


def check_texts(gguf: Path, prompts: Sequence[tuple[str, list[int]]], log: Log) -> None:
    """Says on how many prompts, texts with their ids in training, llama.cpp has these ids; nothing for none."""
    ids = _ids(gguf, [text for text, _ in prompts]) if prompts else None
    if ids is None:
        return
    log(
        tr(
            "llama.cpp gives the prompts of TEMPLATE the ids of training on {same} of {tried} trial rows",
            same=sum(one == expected for one, (_, expected) in zip(ids, prompts, strict=True)),
            tried=len(prompts),
        )
    )


@dataclass(frozen=True)
class GgufDistance:
    """How far llama.cpp's answers from a file are from those of the trained model, on its sample rows."""

    rows: int
    same_answers: int
    differences: Sequence[float]
    """Between the log-probabilities of each token of the rows' own answers; a lower bound where llama.cpp does not list
    the token."""

    @property
    def mean(self) -> float:
        return sum(map(abs, self.differences)) / len(self.differences) if self.differences else 0.0

    @property
    def largest(self) -> float:
        return max(map(abs, self.differences), default=0.0)


def distance(gguf: Path, answers: Sequence[SampleAnswer]) -> GgufDistance | None:
    """None if there is nothing to compare, or the server does not answer."""
    asked = [
        (
            answer.prompt_ids,
            len(answer.trained.token_ids) + answer.trained.ended,
            answer.wanted_ids.token_ids[:MOST_TOKENS],
        )
        for answer in answers
    ]
    longest = max((len(prompt) + most + len(wanted) for prompt, most, wanted in asked), default=0)
    found = _told(gguf, {"answers": asked, "context": longest + MARGIN, "listed": LISTED}) if asked else None
    if found is None:
        return None
    same, differences = 0, []
    for answer, (ids, logprobs) in zip(answers, found, strict=True):
        size = len(answer.trained.token_ids)
        same += ids[:size] == answer.trained.token_ids and (len(ids) <= size or not _goes_on(answer, ids))
        trained = answer.wanted_ids.trained[:MOST_TOKENS]
        differences += [one - other for one, other in zip(logprobs, trained, strict=True) if one is not None]
    return GgufDistance(len(answers), same, differences)


def _goes_on(answer: SampleAnswer, ids: Sequence[int]) -> bool:
    """Whether an answer with one more token than the trained model's does not end with that of the row's own answer."""
    return answer.trained.ended and ids[-1:] != answer.wanted_ids.token_ids[-1:]


def check_answers(gguf: Path, folder: Path, log: Log) -> None:
    """Says how far llama.cpp's answers are from the trained model's; nothing for a folder without sample answers."""
    answers = read_sample_answers(folder)
    if not answers:
        return
    found = distance(gguf, answers)
    if found is None:
        log(tr("llama.cpp's server did not answer the sample rows in {seconds} seconds", seconds=SECONDS))
        return
    log(
        tr(
            "llama.cpp answers {same} of {rows} as the trained model; the log-probability of a token of the wanted "
            "answers is {mean} off on average, {largest} at most ({tokens})",
            same=found.same_answers,
            rows=counted(found.rows, "sample row"),
            mean=f"{found.mean:.3f}",
            largest=f"{found.largest:.2f}",
            tokens=counted(len(found.differences), "token"),
        )
    )


def _ids(gguf: Path, prompts: Sequence[str | list[dict[str, object]]]) -> Sequence[list[int] | None] | None:
    """The ids of each prompt, a text or messages, None where it is refused; None for all if the server does not
    start."""
    found: Sequence[list[int] | None] | None = _told(gguf, {"prompts": prompts, "context": MARGIN})
    return found


def _told(gguf: Path, request: Mapping[str, Any]) -> Any:
    """What the program answers; None if the server does not start or fails."""
    # threads that wait spin: a small model is asked on one
    threads = 1 if gguf.stat().st_size < SMALL_BYTES else os.cpu_count() or 1
    sent = json.dumps({"gguf": str(gguf), "threads": threads, **request})
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], input=sent, capture_output=True, text=True, timeout=SECONDS
        )
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None
