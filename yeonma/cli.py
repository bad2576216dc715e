"""The `yeonma` command: one subcommand a verb, each imported only when it runs."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from yeonma import __version__
from yeonma.config.settings import (
    PREFERENCE,
    PREFERENCE_DEFAULTS,
    TRAINING,
    AdapterSettings,
    AnswerSettings,
    CompareSettings,
    DemoSettings,
    ExportSettings,
    GenerateSettings,
    InspectSettings,
    MergeSettings,
    PushSettings,
    ServeSettings,
    VerifySettings,
)
from yeonma.errors import LOST, ProcessLost, UserError, did_you_mean
from yeonma.train.interrupt import Stopped

HELD_SECONDS = 10


@dataclass(frozen=True)
class Verb:
    """One subcommand. `run` is `module:function`; the function takes the settings groups by their types.

    `defaults`: values that settings have for this verb, where they are not the groups' own.
    """

    about: str
    run: str
    groups: tuple[type, ...]
    positional: str | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    needless: tuple[str, ...] = ()
    """Settings that other verbs require, and this one takes without needing them."""


GENERATING = (AdapterSettings, GenerateSettings, AnswerSettings)
CHATTING = (AdapterSettings, AnswerSettings)
VERBS = {
    "sft": Verb(
        "Fine-tune a model on the answers of a table of examples.", "yeonma.commands.sft:run", TRAINING
    ),
    "dpo": Verb(
        "Fine-tune a model on pairs of a chosen and a rejected answer.",
        "yeonma.commands.dpo:run",
        PREFERENCE,
        defaults=PREFERENCE_DEFAULTS,
    ),
    "inspect": Verb(
        "Show rows as the model will see them, and audit all of them, before training.",
        "yeonma.commands.inspect:run",
        (InspectSettings, *PREFERENCE),
        needless=("output_dir",),
    ),
    "generate": Verb("Answer rows or a prompt.", "yeonma.commands.generate:run", GENERATING, "adapter_dir"),
    "chat": Verb("Talk with a tuned model.", "yeonma.commands.chat:run", CHATTING, "adapter_dir"),
    "compare": Verb(
        "Measure models on the same rows, and write a report.",
        "yeonma.commands.compare:run",
        (CompareSettings, AnswerSettings),
    ),
    "verify": Verb(
        "Check that a run's folder is whole, and that adapter, template, tokenizer and base belong together.",
        "yeonma.commands.verify:run",
        (VerifySettings,),
        "adapter_dir",
    ),
    "merge": Verb(
        "Make one whole model of an adapter and its base, and check that it says the same.",
        "yeonma.export.merged_model:run",
        (MergeSettings,),
        "adapter_dir",
    ),
    "export": Verb(
        "Write a tuned model for llama.cpp or Ollama.",
        "yeonma.commands.export:run",
        (ExportSettings,),
        "model_dir",
    ),
    "push": Verb(
        "Send an adapter or a merged model to the hub.",
        "yeonma.export.hub_push:run",
        (PushSettings,),
        "folder",
    ),
    "serve": Verb(
        "Answer requests in OpenAI's form, with one or several adapters of a base.",
        "yeonma.commands.serve:run",
        (ServeSettings,),
        "adapter_dirs",
    ),
    "demo": Verb(
        "Tune a small model on the bundled sample, end to end.", "yeonma.commands.demo:run", (DemoSettings,)
    ),
    "demo-dpo": Verb(
        "Tune a small model on the bundled pairs, end to end.",
        "yeonma.commands.demo:run_dpo",
        (DemoSettings,),
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

    from yeonma.config.parse import read_settings

    reading = read_settings(
        verb.groups,
        arguments,
        verb=name,
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
    return getattr(import_module(module), function)(reading.settings) or 0


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
