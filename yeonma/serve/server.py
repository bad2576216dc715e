"""Adapter folders -> a server that answers as OpenAI's does: which models, by which names, in memory once."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette

from yeonma.adapter.adapter_folder import base_identity, check_base
from yeonma.adapter.prompt_builder import PromptBuilder, held_as, open_folder
from yeonma.config.settings import AnswerSettings, ServeSettings
from yeonma.errors import Log, Problem, UserError
from yeonma.evaluate.candidates import place_of, short_names
from yeonma.model.forest_support import check_forest_support
from yeonma.model.kernels.lora import speed_up
from yeonma.model.kernels.patch import patch
from yeonma.model.load import check_vocabulary, load_adapter, load_another, load_base, pick_device, pick_dtype
from yeonma.serve.app import Bounds, Models, make_app
from yeonma.serve.listen import is_local
from yeonma.serve.worker import ServedModel, Worker

MOST_WAITING = 256  # questions
GRACE_SECONDS = 3  # that answers at work have when the server is told to stop
LOOK_SECONDS = 0.1  # between looks whether it is


@dataclass(frozen=True)
class Served:
    """The models by their names in requests: adapters of one base, and the base itself under `base_name`."""

    askers: Mapping[str, PromptBuilder]
    base_name: str

    @property
    def first(self) -> PromptBuilder:
        return next(iter(self.askers.values()))

    @property
    def names(self) -> list[str]:
        return [*self.askers, self.base_name]


def open_served(asked: ServeSettings) -> Served:
    """What the settings name, without weights. Raises UserError with all that is wrong with any of the folders."""
    specs = asked.adapter_dirs
    problems: list[Problem] = []
    askers: list[PromptBuilder] = []
    for spec in specs:
        try:
            asker = open_folder(spec, base_model=asked.base_model, trust_remote_code=asked.trust_remote_code)
            if asker.adapter.is_merged:
                cure = "give the folder of the adapter that was merged"
                raise UserError("it is a merged model", place=spec, cure=cure)
            _check_room(asker, asked.max_new_tokens)
            askers.append(asker.by_field_names())
        except UserError as error:
            problems += error.problems
    if not specs:
        problems.append(Problem("no adapter is named", "adapter_dirs", "give an adapter folder, or several"))
    paths = [os.path.realpath(asker.adapter.path) for asker in askers]
    problems += [
        Problem("named twice", spec, "name each adapter once")
        for at, spec in enumerate(specs)
        if spec in specs[:at]
    ]
    problems += _held_differently(asked, askers)
    bases = {place_of(asker.source): asker for asker in askers}
    if len(bases) > 1 and not problems:
        one, other = list(bases.values())[:2]
        what = f"its base is {other.source.name}, that of {one.adapter.path} is {one.source.name}"
        cure = "serve it by a second command at another --port"
        problems.append(Problem(what, str(other.adapter.path), cure))
    if asked.max_new_tokens > asked.max_new_tokens_limit:
        what = f"{asked.max_new_tokens} is more than max_new_tokens_limit {asked.max_new_tokens_limit}"
        problems.append(Problem(what, "max_new_tokens", "lower the one, or raise the other"))
    if problems:
        raise UserError(problems)
    base = askers[0].source
    *names, base_name = short_names([*paths, place_of(base)[0]])
    return Served(dict(zip(names, askers, strict=True)), base_name if os.path.isdir(base.name) else base.name)


def _held_differently(asked: ServeSettings, askers: Sequence[PromptBuilder]) -> list[Problem]:
    kinds = {held_as(asked.quantization, asker.adapter): asker.adapter.path for asker in askers}
    if len(kinds) < 2:
        return []
    (one, first), (other, path) = list(kinds.items())[:2]
    what = f"it was trained on a base with quantization {other}, {first} with {one}"
    return [Problem(what, str(path), "serve it by a second command at another --port, or say --quantization")]


def _check_room(asker: PromptBuilder, max_new_tokens: int) -> None:
    if max_new_tokens >= asker.adapter.rules.cutoff_len:
        what = (
            f"{max_new_tokens} new tokens leave no room for a prompt in its {asker.adapter.rules.cutoff_len}"
        )
        raise UserError(what, place=str(asker.adapter.path), cure="lower --max_new_tokens")


def load_served_models(served: Served, asked: ServeSettings, say: Log) -> dict[str, ServedModel]:
    """The base with all adapters on it, in memory once. Raises UserError as `load_model`."""
    device = pick_device(asked.device)
    source = served.first.source
    say(f"loading {source.name}")
    held = held_as(asked.quantization, served.first.adapter)
    base = load_base(source, device, pick_dtype(asked.dtype, device), held)
    identity = base_identity(base, source)
    for asker in served.askers.values():
        check_base(asker.adapter, identity)
        check_vocabulary(asker.tokenizer, base.get_input_embeddings().weight.shape[0], source.name)
    tuned: Any = None
    inside: dict[str, str] = {}  # PEFT's names, which hold no dots
    for number, (name, asker) in enumerate(served.askers.items()):
        folder = str(asker.adapter.path)
        inside[name] = f"adapter{number}" if number else "default"
        if tuned is None:
            tuned = load_adapter(base, folder, trainable=False).eval()
        else:
            load_another(tuned, folder, inside[name])
    forward = check_forest_support(tuned.eval().get_base_model())
    speed_up(tuned)
    patch(tuned)
    if not forward.forest:
        say(f"answers are computed one by one: {forward.why_not}")

    def speaker(asker: PromptBuilder, active: Callable[[], AbstractContextManager[object]]) -> ServedModel:
        model = tuned.get_base_model()
        return ServedModel(model, asker.tokenizer, asker.stop_ids, forward.forest, active)

    found = {
        name: speaker(asker, partial(_chosen, tuned, inside[name])) for name, asker in served.askers.items()
    }
    return {**found, served.base_name: speaker(served.first, tuned.disable_adapter)}


@contextmanager
def _chosen(tuned: Any, name: str) -> Iterator[None]:
    if tuned.active_adapter != name:
        tuned.set_adapter(name, inference_mode=True)
    yield


def run_server(
    served: Served,
    speakers: Mapping[str, ServedModel],
    asked: ServeSettings,
    listener: socket.socket,
    key: str | None,
    on_ready: Callable[[], None],
) -> None:
    """Answer until the process is interrupted or terminated: then what is at work has a few seconds to end.

    Raises KeyboardInterrupt after SIGINT.
    """
    worker = Worker(speakers, asked.batch_size, MOST_WAITING)
    tokenizing = ThreadPoolExecutor(1, "tokens")
    config = next(iter(speakers.values())).model.config.get_text_config()
    usual = AnswerSettings(max_new_tokens=asked.max_new_tokens, temperature=asked.temperature)
    bounds = Bounds(
        usual,
        asked.max_new_tokens_limit,
        getattr(config, "max_position_embeddings", None),
        key,
        is_local(listener),
    )

    async def end_in_time() -> None:
        while not server.should_exit:
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.sleep(GRACE_SECONDS)
        worker.break_off()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        ending = asyncio.create_task(end_in_time())
        on_ready()
        try:
            yield
        finally:
            ending.cancel()
            worker.stop()
            tokenizing.shutdown()

    askers = {**served.askers, served.base_name: served.first}
    app = make_app(Models(askers, worker, tokenizing), bounds, lifespan)
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",  # the app tells of its own faults
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=10 * GRACE_SECONDS,  # a client that reads nothing must not hold it up
        lifespan="on",
    )
    server = uvicorn.Server(settings)
    server.run(sockets=[listener])
