"""The names in an output folder: which are a run's, and what must lie there. Files and folders, never links or pipes.

A link in place of a file would have a run write elsewhere; a pipe would have it wait for ever.
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from yeonma.errors import Problem, UserError, system_reason
from yeonma.files import kind_of
from yeonma.messages import later, tr

RUN = "run.json"
SEAL = "manifest.json"
LOCK = ".lock"
SOFT_LOCK = ".lock.held"
"""The lock on a disk that cannot lock files: one process can create it."""
PRINTED = "log.txt"
"""What a run printed. A user's own file of this name is appended to, and never deleted."""
FORMER_PLOT = "loss.png"
"""The plot of earlier versions, now loss.svg."""
OURS = (
    "settings.yaml",
    "metrics.jsonl",
    "trained_rows.jsonl",
    "answers.jsonl",
    "rollouts.jsonl",
    "loss.svg",
    FORMER_PLOT,
    "README.md",
    "yeonma.json",
    "template.txt",
    "samples.json",
    "sample_answers.json",
    SEAL,
    "adapter_*",
)
"""Patterns of the files that a run writes beside run.json and its checkpoints."""
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors",
)
"""Patterns of the files that full fine-tuning writes as well. In the folder of any other run they are not the run's."""
CHAT_TEMPLATES = "additional_chat_templates"
TOKENIZERS = (
    "tokenizer*",
    "chat_template.jinja",
    "base_chat_template.jinja",
    f"{CHAT_TEMPLATES}/*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
PARTIAL_FINAL = ".final.partial"
PARTIAL_FILES = tuple(
    f".{name}.partial"
    for name in (RUN, SEAL, "settings.yaml", "README.md", "loss.svg", FORMER_PLOT, "sample_answers.json")
)
"""Files that are being written, under the hidden names of `replace_file`."""
WRITTEN_IN_PLACE = ("metrics.jsonl", "trained_rows.jsonl", "answers.jsonl", "rollouts.jsonl", PRINTED, LOCK)
"""Files that are not replaced as a whole, so that a hard link elsewhere would change with them."""
_CHECKPOINT = re.compile("checkpoint-[1-9][0-9]{0,17}")
_UNFINISHED = re.compile(r"\.checkpoint-[1-9][0-9]{0,17}\.(partial|removed|former)")
_MOST_NAMED = 10
KINDS = (
    *(later("file"), later("folder"), later("symbolic link")),
    *(later("pipe"), later("socket"), later("device")),
)
"""What `kind_of` says."""


def is_checkpoint(name: str) -> bool:
    """Whether a run gives a checkpoint this name: the step in plain digits, without zeros before it."""
    return _CHECKPOINT.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    """Whether it is the hidden name of a checkpoint that is being written, replaced or deleted."""
    return _UNFINISHED.fullmatch(name) is not None


def check_entries(output: Path, *, full: bool = False) -> None:
    """Raises UserError with a line for each name of a run that is taken by something else: a link, a pipe, a folder
    where a file belongs. Changes nothing. An output folder that is missing has nothing wrong in it. `full`: whether the
    run writes a whole model."""
    try:
        names = sorted(os.listdir(output))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(
            tr("cannot be read ({strerror})", strerror=system_reason(error)),
            place=str(output),
            cure=tr("give another output_dir"),
        ) from error
    problems = []
    for name in names:
        wanted = _kind_wanted(name) or ("file" if full and is_model_file(name) else "")
        found = kind_of(output / name) if wanted else ""
        if found and found != wanted:
            what = tr(
                "it is a {found}, and a run has a {wanted} of this name", found=tr(found), wanted=tr(wanted)
            )
            problems.append(Problem(what, str(output / name), tr("remove it, or give another output_dir")))
        elif name in WRITTEN_IN_PLACE and _names_of(output / name) > 1:
            what = tr("it has another name elsewhere (a hard link), and a run would write there too")
            cure = tr("put a copy in its place: cp -p {name} {name}.copy && mv {name}.copy {name}", name=name)
            problems.append(Problem(what, str(output / name), tr("remove it") if name == LOCK else cure))
        elif other := _taken_for(name, names, output):
            what = tr("this disk does not tell it from {other}, which a run would replace", other=other)
            problems.append(
                Problem(
                    what, str(output / name), tr("rename it to {other}, or move it elsewhere", other=other)
                )
            )
    if problems:
        more = len(problems) - _MOST_NAMED
        rest = [Problem(tr("there are {more} more such names", more=more), str(output))] if more > 0 else []
        raise UserError([*problems[:_MOST_NAMED], *rest])


def _names_of(path: Path) -> int:
    """The number of a file's hard links."""
    try:
        return os.lstat(path).st_nlink
    except OSError:
        return 0


def _taken_for(name: str, names: list[str], output: Path) -> str:
    """The checkpoint for which a disk without capitals takes a name such as `Checkpoint-5`; empty if there is none."""
    other = name.casefold()
    is_taken = other != name and is_checkpoint(other) and other not in names and kind_of(output / other)
    return other if is_taken else ""


def passed_over(output: Path) -> list[str]:
    """Names that look like those of checkpoints, and that no run gives: `checkpoint-04`, `checkpoint-10.bak`."""
    return sorted(
        name
        for name in os.listdir(output)
        if name.casefold().startswith("checkpoint-") and not is_checkpoint(name)
    )


def is_model_file(name: str) -> bool:
    """Whether full fine-tuning gives a file this name, and no other run does."""
    return any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def _kind_wanted(name: str) -> str:
    """`file` or `folder` for a name of a run, else empty."""
    if is_checkpoint(name) or is_unfinished(name) or name in (PARTIAL_FINAL, CHAT_TEMPLATES):
        return "folder"
    if name in (RUN, LOCK, SOFT_LOCK, PRINTED, *PARTIAL_FILES):
        return "file"
    return "file" if any(fnmatchcase(name, pattern) for pattern in (*OURS, *TOKENIZERS)) else ""
