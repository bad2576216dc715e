"""The `yeonma` command line. Each subcommand is imported only when it runs."""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from yeonma import __version__
from yeonma.config.settings import (
    DEFAULTS,
    GROUPS,
    CacheSettings,
    ChatConfig,
    CompareConfig,
    CompletionSettings,
    ConvertSettings,
    DemoSettings,
    DoctorSettings,
    EvalSettings,
    ExportSettings,
    GenerateConfig,
    InspectConfig,
    InspectSettings,
    MergeSettings,
    PushSettings,
    RunConfig,
    ServeSettings,
    StudioSettings,
    VerifySettings,
)
from yeonma.errors import LOST, ProcessLost, UserError, did_you_mean
from yeonma.messages import tr
from yeonma.platforms import check_platform
from yeonma.shown import traceback_text
from yeonma.streams import escape_other_libraries, log_line, say, say_lines
from yeonma.train.interrupt import Stopped

NON_FIRST_RANK_DELAY_SECONDS = 10
HELP = re.compile(r"-h|--help(=.*)?")


@dataclass(frozen=True)
class Verb:
    """One subcommand.

    about: one line of help. run: `module:function`; the function takes an instance of `config`. positional: the
    setting given without its name. reads: the groups of `config` that are read, all by default. defaults: defaults
    that differ from the groups' own.
    """

    about: str
    run: str
    config: type
    positional: str | None = None
    reads: tuple[type, ...] | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    not_required: tuple[str, ...] = ()
    """Settings that the groups require and this subcommand does not: they are empty if not given."""
    important: tuple[str, ...] = ()
    """The settings on the one screen of `--help`, besides those that are required. If empty, that shows all."""
    example: str = ""
    check: str = ""
    """The function of yeonma.commands.first_checks that runs before the command is imported."""

    @property
    def groups(self) -> tuple[type, ...]:
        from yeonma.config.parse import groups_in

        return self.reads or groups_in(self.config)


FIRST = ("template", "val_set_size")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
EXAMPLE = f"--base_model {BASE} \\\n    --data_path rows.jsonl"
VERBS = {
    "sft": Verb(
        "Fine-tune a model on the answers in a table of examples.",
        "yeonma.commands.sft:run",
        RunConfig,
        reads=GROUPS["sft"],
        important=(
            *FIRST,
            "cutoff_len",
            "num_epochs",
            "batch_size",
            "lora_r",
            "quantization",
            "learning_rate",
        ),
        example=f"yeonma sft {EXAMPLE} --template title.txt --output_dir titles",
    ),
    "dpo": Verb(
        "Fine-tune a model on preference pairs or labelled answers.",
        "yeonma.commands.dpo:run",
        RunConfig,
        reads=GROUPS["dpo"],
        defaults=DEFAULTS["dpo"],
        important=(*FIRST, "loss", "beta", "num_epochs", "batch_size", "quantization", "learning_rate"),
        example="yeonma dpo --base_model titles --data_path pairs.jsonl --output_dir titles-dpo",
    ),
    "grpo": Verb(
        "Fine-tune a model by rewards of the answers that it draws.",
        "yeonma.commands.grpo:run",
        RunConfig,
        reads=GROUPS["grpo"],
        defaults=DEFAULTS["grpo"],
        important=(
            *FIRST,
            "group_size",
            "batch_size",
            "max_new_tokens",
            "policy_loss",
            "num_epochs",
            "learning_rate",
        ),
        example="yeonma grpo --base_model titles --data_path problems.jsonl \\\n    --reward exact --output_dir solver",
    ),
    "inspect": Verb(
        "Show what a run would train on, audit it, and forecast memory and time.",
        "yeonma.commands.inspect:run",
        InspectConfig,
        reads=(InspectSettings, *GROUPS["dpo"]),
        not_required=("output_dir",),
        important=(*FIRST, "objective", "rows", "tokens", "html", "probe", "cutoff_len"),
        example=f"yeonma inspect {EXAMPLE} --template title.txt --rows 1-3",
    ),
    "generate": Verb(
        "Generate answers to rows or a prompt.",
        "yeonma.commands.generate:run",
        GenerateConfig,
        "adapter_dir",
        important=("data_path", "row", "prompt", "output", "max_new_tokens", "temperature", "batch_size"),
        example="""yeonma generate titles --row '{"document": "The ferry runs again."}'""",
        check="check_generate",
    ),
    "chat": Verb(
        "Chat with a fine-tuned model.",
        "yeonma.commands.chat:run",
        ChatConfig,
        "adapter_dir",
        important=("max_new_tokens", "temperature", "adapter_weights", "template"),
        example="yeonma chat titles",
        check="check_chat",
    ),
    "compare": Verb(
        "Compare models on the same rows and write a report.",
        "yeonma.commands.compare:run",
        CompareConfig,
        important=("template", "output_dir", "max_new_tokens", "data_split"),
        example=f"yeonma compare --models {BASE} titles \\\n    --data_path test.jsonl --output_dir report",
        check="check_compare",
    ),
    "eval": Verb(
        "Run benchmarks of lm-evaluation-harness on a fine-tuned model and its base.",
        "yeonma.commands.eval:run",
        EvalSettings,
        "adapter_dir",
        important=("num_fewshot", "limit", "apply_chat_template", "include_path", "base", "output"),
        example="yeonma eval titles --tasks haerae,kobest --limit 100",
        check="check_eval",
    ),
    "verify": Verb(
        "Check the folder of a run for damage and mismatches.",
        "yeonma.commands.verify:run",
        VerifySettings,
        "adapter_dir",
        check="check_verify",
    ),
    "merge": Verb(
        "Merge an adapter into its base model and check the result.",
        "yeonma.commands.merge:run",
        MergeSettings,
        "adapter_dir",
        check="check_merge",
    ),
    "export": Verb(
        "Export a fine-tuned model to llama.cpp or Ollama.",
        "yeonma.commands.export:run",
        ExportSettings,
        "model_dir",
        check="check_export",
    ),
    "push": Verb(
        "Upload an adapter or a merged model to the Hugging Face hub.",
        "yeonma.commands.push:run",
        PushSettings,
        "folder",
    ),
    "serve": Verb(
        "Serve adapters over an OpenAI-compatible API.",
        "yeonma.commands.serve:run",
        ServeSettings,
        "adapter_dirs",
        important=("host", "port", "engine", "max_new_tokens", "batch_size", "api_key"),
        example="yeonma serve titles --port 8000",
    ),
    "studio": Verb(
        "Look at runs and at rows in the browser.",
        "yeonma.commands.studio:run",
        StudioSettings,
        example="yeonma studio --root runs data",
    ),
    "convert": Verb(
        "Turn a settings file of LLaMA-Factory or Axolotl into one of Yeonma.",
        "yeonma.commands.convert:run",
        ConvertSettings,
        "file",
    ),
    "doctor": Verb(
        "Show what is installed, what a run here would use, and what is wrong.",
        "yeonma.commands.doctor:run",
        DoctorSettings,
    ),
    "cache": Verb(
        "Show what Yeonma keeps on disk, and delete what is no longer needed.",
        "yeonma.commands.cache_command:run",
        CacheSettings,
        "action",
    ),
    "completion": Verb(
        "Print a script with which a shell completes commands and settings.",
        "yeonma.cli:complete",
        CompletionSettings,
        "shell",
    ),
    "demo": Verb("Fine-tune a small model on a bundled sample.", "yeonma.commands.demo:run", DemoSettings),
    "demo-dpo": Verb(
        "Fine-tune a small model on bundled preference pairs.",
        "yeonma.commands.demo:run_dpo",
        DemoSettings,
        defaults={"output_dir": "demo-dpo"},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit status.

    0: success. 2: a user error. 69: another process of the run was lost. 75: the time limit of training was reached.
    129: training was stopped by SIGHUP. 130: interrupted. 141: the reader of the output is gone. 143: training was
    stopped by SIGTERM.
    YEONMA_DEBUG=1 also prints the traceback of a user error. Any other exception is a bug and passes through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        check_platform()
        return _dispatch(arguments)
    except UserError as error:
        if os.environ.get("YEONMA_DEBUG") == "1":
            sys.stderr.write(traceback_text(error))
        if os.environ.get("RANK", "0") != "0":
            # Most errors occur in every process. torchrun ends this one once rank 0 has printed the error and exited.
            time.sleep(NON_FIRST_RANK_DELAY_SECONDS)
        for line in str(error).split("\n"):
            log_line(line)
        return 2
    except Stopped as stopped:
        if not stopped.printed and os.environ.get("RANK", "0") == "0":
            log_line(str(stopped))
        return stopped.status
    except ProcessLost as lost:
        log_line(str(lost))
        return LOST
    except KeyboardInterrupt:
        log_line(tr("interrupted"))
        return 130
    except BrokenPipeError:  # the reader is gone: `yeonma generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        from yeonma.config.help import overview

        say_lines(overview({name: verb.about for name, verb in VERBS.items()}))
        return 0
    if arguments[0] in ("--version", "-V"):
        _say_versions()
        return 0
    name, *rest = arguments
    if name not in VERBS:
        cure = did_you_mean(name, VERBS) or tr("the commands are {verbs}", verbs=", ".join(VERBS))
        raise UserError(tr("unknown command"), place=name, cure=cure)
    verb = VERBS[name]
    asked = next((index for index, word in enumerate(rest) if HELP.fullmatch(word)), None)
    if asked is not None:
        from yeonma.config.help import HelpSource, help_text

        _, _, given = rest[asked].partition("=")
        following = rest[asked + 1 : asked + 2]
        topic = given or next((word for word in following if not word.startswith("-")), None)
        source = HelpSource(
            verb.groups,
            name,
            verb.about,
            verb.positional,
            verb.not_required,
            verb.defaults,
            verb.important,
            verb.example,
        )
        say_lines(help_text(source, topic))
        return 0
    return _run(name, verb, rest)


def _run(name: str, verb: Verb, arguments: list[str]) -> int:
    from importlib import import_module

    from yeonma.config.parse import ParsedConfig, read_config

    parsed: ParsedConfig[Any] = read_config(
        verb.config,
        arguments,
        verb=name,
        groups=verb.groups,
        positional=verb.positional,
        not_required=verb.not_required,
        defaults=verb.defaults,
    )
    if os.environ.get("RANK", "0") == "0":  # once, not in every process that torchrun starts
        for warning in parsed.warnings:
            log_line(tr("warning: {text}", text=warning))
    escape_other_libraries()
    atexit.register(gc.freeze)  # skips the last garbage collection, which takes most of a second
    if verb.check:
        getattr(import_module("yeonma.commands.first_checks"), verb.check)(parsed.config)
    module, function = verb.run.split(":")
    return getattr(import_module(module), function)(parsed.config) or 0


def complete(settings: CompletionSettings) -> int:
    """`yeonma completion`. It is here because it needs all commands."""
    from yeonma.commands.shell_completion import CompletedCommand, write_script
    from yeonma.config.help import about_command
    from yeonma.config.parse import settings_of

    commands = {
        name: CompletedCommand(
            about_command(name, verb.about),
            settings_of(verb.groups, verb.not_required, verb.defaults),
            verb.positional,
        )
        for name, verb in VERBS.items()
    }
    return write_script(settings, commands)


def _say_versions() -> None:
    """The first line is Yeonma's alone."""
    import platform

    from yeonma.packages import MAIN, version_of

    say(f"yeonma {__version__}")
    machine = f"{platform.system()} {platform.machine()}"
    python = tr("{version} on {machine}", version=platform.python_version(), machine=machine)
    say(f"python {python}")
    for name in MAIN:
        found = version_of(name)
        say(f"{name} {found}" if found else tr("{name} is not installed", name=name))
