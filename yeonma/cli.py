"""The `yeonma` command: one subcommand a verb, each imported only when it runs."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from yeonma import __version__
from yeonma.config.settings import (
    PREFERENCE_DEFAULTS,
    TRAINING,
    ChatConfig,
    CompareConfig,
    DemoSettings,
    ExportSettings,
    GenerateConfig,
    InspectConfig,
    MergeSettings,
    PushSettings,
    RunConfig,
    ServeSettings,
    VerifySettings,
)
from yeonma.errors import LOST, ProcessLost, UserError, did_you_mean
from yeonma.train.interrupt import Stopped

HELD_SECONDS = 10


@dataclass(frozen=True)
class Verb:
    """One subcommand. `run` is `module:function`; the function takes a `config`, whose settings are the verb's.

    `reads`: the groups of `config` that the verb reads, all by default; `defaults`: settings whose default differs.
    """

    about: str
    run: str
    config: type
    positional: str | None = None
    reads: tuple[type, ...] | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    needless: tuple[str, ...] = ()
    """Settings that other verbs require, and this one takes without needing them."""

    @property
    def groups(self) -> tuple[type, ...]:
        from yeonma.config.parse import groups_in

        return self.reads or groups_in(self.config)


VERBS = {
    "sft": Verb(
        "Fine-tune a model on the answers of a table of examples.",
        "yeonma.commands.sft:run",
        RunConfig,
        reads=TRAINING,
    ),
    "dpo": Verb(
        "Fine-tune a model on pairs of a chosen and a rejected answer.",
        "yeonma.commands.dpo:run",
        RunConfig,
        defaults=PREFERENCE_DEFAULTS,
    ),
    "inspect": Verb(
        "Show rows as the model will see them, and audit all of them, before training.",
        "yeonma.commands.inspect:run",
        InspectConfig,
        needless=("output_dir",),
    ),
    "generate": Verb(
        "Answer rows or a prompt.", "yeonma.commands.generate:run", GenerateConfig, "adapter_dir"
    ),
    "chat": Verb("Talk with a tuned model.", "yeonma.commands.chat:run", ChatConfig, "adapter_dir"),
    "compare": Verb(
        "Measure models on the same rows, and write a report.", "yeonma.commands.compare:run", CompareConfig
    ),
    "verify": Verb(
        "Check that a run's folder is whole, and that adapter, template, tokenizer and base belong together.",
        "yeonma.commands.verify:run",
        VerifySettings,
        "adapter_dir",
    ),
    "merge": Verb(
        "Make one whole model of an adapter and its base, and check that it says the same.",
        "yeonma.export.merged_model:run",
        MergeSettings,
        "adapter_dir",
    ),
    "export": Verb(
        "Write a tuned model for llama.cpp or Ollama.",
        "yeonma.commands.export:run",
        ExportSettings,
        "model_dir",
    ),
    "push": Verb(
        "Send an adapter or a merged model to the hub.", "yeonma.export.hub_push:run", PushSettings, "folder"
    ),
    "serve": Verb(
        "Serve adapters of one base model over an OpenAI-compatible API.",
        "yeonma.commands.serve:run",
        ServeSettings,
        "adapter_dirs",
    ),
    "demo": Verb(
        "Tune a small model on the bundled sample, end to end.", "yeonma.commands.demo:run", DemoSettings
    ),
    "demo-dpo": Verb(
        "Tune a small model on the bundled pairs, end to end.",
        "yeonma.commands.demo:run_dpo",
        DemoSettings,
        defaults={"output_dir": "demo-dpo"},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, and return the exit status: 0, 2 for the user's mistakes, 130 when interrupted, 143 when
    training was told to end (SIGTERM), 75 when its time limit was over, 69 when another of its processes was lost, 141
    when nobody reads the output any more.

    YEONMA_DEBUG=1 shows the traceback of a mistake too. Any other exception is a bug, and passes through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        if os.environ.get("YEONMA_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        if os.environ.get("RANK", "0") != "0":
            # Most mistakes show in every process alike. torchrun ends this one as soon as the first has told its own.
            time.sleep(HELD_SECONDS)
        for line in str(error).splitlines():
            print(f"yeonma: {line}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if not stopped.told and os.environ.get("RANK", "0") == "0":
            print(f"yeonma: {stopped}", file=sys.stderr)
        return stopped.status
    except ProcessLost as lost:
        print(f"yeonma: {lost}", file=sys.stderr)
        return LOST
    except KeyboardInterrupt:
        print("yeonma: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output has seen enough: `yeonma generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"yeonma {__version__}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        cure = did_you_mean(name, VERBS) or f"the verbs are {', '.join(VERBS)}"
        raise UserError("no such verb", place=name, cure=cure)
    verb = VERBS[name]
    if "-h" in rest or "--help" in rest:
        from yeonma.config.help import help_text

        page = help_text(
            verb.groups,
            verb=name,
            about=verb.about,
            positional=verb.positional,
            needless=verb.needless,
            defaults=verb.defaults,
        )
        print(page, end="")
        return 0
    return _run(name, verb, rest)


def _run(name: str, verb: Verb, arguments: list[str]) -> int:
    from importlib import import_module

    from yeonma.config.parse import Reading, read_config

    reading: Reading[Any] = read_config(
        verb.config,
        arguments,
        verb=name,
        groups=verb.groups,
        positional=verb.positional,
        needless=verb.needless,
        defaults=verb.defaults,
    )
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this once a process.
        for warning in reading.warnings:
            print(f"yeonma: warning: {warning}", file=sys.stderr)
    atexit.register(
        gc.freeze
    )  # else the last collection looks through all that is left, for most of a second
    module, function = verb.run.split(":")
    return getattr(import_module(module), function)(reading.config) or 0


def _overview() -> str:
    width = max(map(len, VERBS)) + 2
    lines = (f"  {name:{width}}{verb.about}" for name, verb in VERBS.items())
    return "\n".join(
        [
            "usage: yeonma VERB [--setting value ...]",
            "",
            *lines,
            "",
            "yeonma VERB --help   the verb's settings",
            "yeonma --version     the version",
        ]
    )
