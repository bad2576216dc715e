"""Adapter folders -> an OpenAI-compatible server. The base is in memory once; every model has a name for requests."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from starlette.applications import Starlette

from yeonma.adapter.base_check import check_content
from yeonma.adapter.foreign_adapter import is_foreign
from yeonma.adapter.found_adapter import given_twice
from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder, quantization_for
from yeonma.config.settings import AnswerSettings, ServeSettings
from yeonma.errors import Log, Problem, UserError
from yeonma.evaluate.candidates import short_names, source_key
from yeonma.messages import counted, tr
from yeonma.model.base_content import changes
from yeonma.model.load import check_vocabulary, pick_device, pick_dtype
from yeonma.model.position_limits import model_positions
from yeonma.policy import Policy, adapter_names, build_policy, check_outline
from yeonma.serve.app import Limits, Models, make_app
from yeonma.serve.bounded_log import limit_log
from yeonma.serve.connections import ConnectionLimits, connection_limit, watched
from yeonma.serve.listen import is_local
from yeonma.serve.web_server import GRACE_SECONDS, make_server
from yeonma.serve.worker import ServedModel, Worker

MAX_WAITING = 256
"""Maximum number of prompts in the queue."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class ServedAdapters:
    """Adapters of one base, by their names in requests. `base_name` is that of the base itself, where it is served. A
    fully fine-tuned model is served alone, and has none."""

    prompt_builders: Mapping[str, PromptBuilder]
    base_name: str | None

    @property
    def first(self) -> PromptBuilder:
        return next(iter(self.prompt_builders.values()))

    @property
    def names(self) -> list[str]:
        return [*self.prompt_builders, *([] if self.base_name is None else [self.base_name])]


def open_adapters(settings: ServeSettings, log: Log = lambda _: None) -> ServedAdapters:
    """Open the adapter folders, without weights. `log` gets a line if reading the base for its SHA-256 takes long.

    Raises UserError with the problems of all of them.
    """
    folders = settings.adapter_dirs
    problems: list[Problem] = []
    prompt_builders: list[PromptBuilder] = []
    for folder in folders:
        try:
            prompt_builder = open_prompt_builder(
                folder,
                base_model=settings.base_model,
                trust_remote_code=settings.trust_remote_code,
                template=settings.template if is_foreign(folder) else None,
            )
            prompt_builder.check_template()
            if prompt_builder.adapter.is_full and len(folders) > 1:
                what = tr("all of its weights were trained: it is served alone")
                cure = tr("use a second command on another --port")
                raise UserError(what, place=folder, cure=cure)
            if prompt_builder.adapter.is_whole and not prompt_builder.adapter.is_full:
                cure = tr("give the folder of the adapter that was merged")
                raise UserError(tr("this is a merged model"), place=folder, cure=cure)
            place = str(prompt_builder.adapter.path)
            prompt_builder.check_room(settings.max_new_tokens, place, tr("lower --max_new_tokens"))
            check_content(prompt_builder.adapter, prompt_builder.source, log=log, download=False)
            prompt_builders.append(prompt_builder.by_field_names())
        except UserError as error:
            problems += error.problems
    if not folders:
        problems.append(
            Problem(tr("no adapter given"), "adapter_dirs", tr("give one or more adapter folders"))
        )
    problems += given_twice(folders)
    if settings.template is not None and prompt_builders and not any(one.remark for one in prompt_builders):
        what = tr("the adapters have templates of their own")
        cure = tr("leave it out; it is for adapters of other tools")
        problems.append(Problem(what, "--template", cure))
    problems += _quantization_problems(settings, prompt_builders)
    others = [builder for builder in prompt_builders if not _have_one_base(prompt_builders[0], builder)]
    if others and not problems:
        first, second = prompt_builders[0], others[0]
        problem = tr(
            "its base is {source}, but that of {path} is {source2}",
            source=second.source.name,
            path=first.adapter.path,
            source2=first.source.name,
        )
        cure = tr("serve it with a second command on another --port")
        problems.append(Problem(problem, str(second.adapter.path), cure))
    if settings.max_new_tokens > settings.max_new_tokens_limit:
        problem = tr(
            "{max_new_tokens} exceeds max_new_tokens_limit {max_new_tokens_limit}",
            max_new_tokens=settings.max_new_tokens,
            max_new_tokens_limit=settings.max_new_tokens_limit,
        )
        problems.append(Problem(problem, "max_new_tokens", tr("lower it, or raise the limit")))
    if problems:
        raise UserError(problems)
    base = prompt_builders[0].source
    if prompt_builders[0].adapter.is_full:
        (name,) = short_names([os.path.realpath(prompt_builders[0].adapter.path)])
        return ServedAdapters({name: prompt_builders[0]}, None)
    paths = [os.path.realpath(prompt_builder.adapter.path) for prompt_builder in prompt_builders]
    *names, base_name = short_names([*paths, source_key(base)[0]])
    return ServedAdapters(
        dict(zip(names, prompt_builders, strict=True)),
        base_name if os.path.isdir(base.name) else base.name,
    )


def _have_one_base(one: PromptBuilder, other: PromptBuilder) -> bool:
    """Whether two adapters have the same base, or equal ones in two places."""
    if source_key(one.source) == source_key(other.source):
        return True
    first, second = one.adapter.base_content, other.adapter.base_content
    return first is not None and second is not None and not changes(first, second)


def _quantization_problems(
    settings: ServeSettings, prompt_builders: Sequence[PromptBuilder]
) -> list[Problem]:
    """A problem if the adapters' quantisations differ: they share one base."""
    folders = {
        quantization_for(settings.quantization, builder.adapter): builder.adapter.path
        for builder in prompt_builders
    }
    if len(folders) < 2:
        return []
    (first_kind, first), (second_kind, second) = list(folders.items())[:2]
    problem = tr(
        "it was trained on a base with quantization {second_kind}, but {first} with {first_kind}",
        second_kind=second_kind,
        first=first,
        first_kind=first_kind,
    )
    cure = tr("serve it with a second command on another --port, or set --quantization")
    return [Problem(problem, str(second), cure)]


def load_served_models(adapters: ServedAdapters, settings: ServeSettings, log: Log) -> dict[str, ServedModel]:
    """Load the base once, with all adapters. The base is a model of its own, unless an adapter has tokens that it does
    not know.

    Raises UserError as `build_policy`, and for an adapter beside others that adds rows to the base.
    """
    device = pick_device(settings.device)
    source = adapters.first.source
    builders = adapters.prompt_builders
    for builder in builders.values():
        if builder.remark:
            log(builder.remark)
    folders = [str(builder.adapter.path) for builder in builders.values() if not builder.adapter.is_whole]
    added = {folder: check_outline(source, [folder]) for folder in folders}
    if len(folders) > 1 and (larger := [folder for folder, rows in added.items() if rows]):
        tokens = counted(added[larger[0]], "token")
        what = tr(
            "it has {tokens} of its own, so its base has more rows than that of the others", tokens=tokens
        )
        raise UserError(
            what, place=larger[0], cure=tr("serve it with a command of its own on another --port")
        )
    log(tr("loading {model}", model=source.name))
    policy = build_policy(
        source,
        folders,
        device=device,
        dtype=pick_dtype(settings.dtype, device),
        quantization=quantization_for(settings.quantization, adapters.first.adapter),
    )
    for builder in builders.values():
        check_content(builder.adapter, source, log=log)
        check_vocabulary(builder.tokenizer, policy.vocabulary_size, source.name)
    if not policy.support.forest:
        log(tr("answers are generated one at a time: {why_not}", why_not=policy.support.why_not))
    names = zip(builders, adapter_names(len(builders)), strict=True)
    models = {
        name: _served(replace(policy, adapter_name=adapter_name), builders[name])
        for name, adapter_name in names
    }
    if any(added.values()) or any(builder.adapter.new_tokens for builder in builders.values()):
        log(
            tr(
                "{base_name} is not served by itself: it does not know the adapter's own tokens",
                base_name=adapters.base_name,
            )
        )
        return models
    if adapters.base_name is None:
        return models
    base = _served(replace(policy, adapter_weights=False), adapters.first)
    return {**models, adapters.base_name: base}


def _served(policy: Policy, builder: PromptBuilder) -> ServedModel:
    model = policy.transformers_model
    return ServedModel(model, builder.tokenizer, builder.tokens, policy.support, policy.active)


def run_server(
    adapters: ServedAdapters,
    models: Mapping[str, ServedModel],
    settings: ServeSettings,
    listener: socket.socket,
    key: str | None,
    on_ready: Callable[[], None],
    log: Log,
    connection_limits: ConnectionLimits | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. Running answers then have a few seconds to finish.

    Raises KeyboardInterrupt after SIGINT.
    """
    worker = Worker(models, settings.batch_size, MAX_WAITING)
    tokenizing = ThreadPoolExecutor(1, "tokens")
    config = next(iter(models.values())).model.config
    limits = Limits(
        AnswerSettings(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature),
        settings.max_new_tokens_limit,
        model_positions(config),
        key,
        is_local(listener),
    )

    async def abort_after_grace() -> None:
        while not server.should_exit:
            await asyncio.sleep(POLL_SECONDS)
        connections.stop()
        await asyncio.sleep(GRACE_SECONDS)
        worker.abort()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        aborting = asyncio.create_task(abort_after_grace())
        connections.start(listener, lambda: server.should_exit)
        on_ready()
        try:
            yield
        finally:
            aborting.cancel()
            connections.close()
            worker.stop()
            tokenizing.shutdown()

    prompt_builders = {name: adapters.prompt_builders.get(name, adapters.first) for name in models}
    app = make_app(Models(prompt_builders, worker, tokenizing), limits, lifespan)
    server, connections = make_server(
        watched(app), connection_limits or ConnectionLimits(connection_limit()), log
    )
    limit_log(("yeonma.serve", "asyncio"))
    server.run(sockets=[])
