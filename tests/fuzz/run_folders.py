"""The target of damaged run folders: a run that has ended or was killed, damaged by accident or by a hostile hand, with
checksums that were made anew for what was changed, and then continued, checked, asked and merged.

A case names its edits; they are made in a copy of a real run's folder, whose model has two layers. Nothing is replaced:
a case with nothing to refuse trains the remaining steps, answers a row or merges the adapter.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.fuzz.end_to_end import CommandLine, run
from tests.fuzz.harness import Target
from tests.fuzz.mutate import PIECES, TEXTS, VALUES, Draw, containers, file_bytes
from tests.fuzz.sandbox import Sandbox, working_in
from tests.runs import articles, model_folder, trained, write_jsonl
from yeonma.errors import UserError
from yeonma.files import file_hash, kind_of
from yeonma.run_folder.checkpoint import MANIFEST, OPTIMIZER, RANDOM, STATE
from yeonma.run_folder.entries import OURS, PRINTED, RUN, SEAL, TOKENIZERS, is_checkpoint, is_unfinished
from yeonma.run_folder.run_log import METRICS, TRAINED_ROWS, LineSum
from yeonma.verify.file_checks import check_files

SETTINGS: Mapping[str, object] = {
    "max_steps": 4,
    "save_steps": 2,
    "lora_dropout": 0.1,
    "val_set_size": 4,
    "eval_steps": 2,
}
WEIGHTS = "adapter_model.safetensors"
OF_A_CHECKPOINT = (
    *(STATE, STATE, STATE, MANIFEST, OPTIMIZER, RANDOM, WEIGHTS),
    *("adapter_config.json", "yeonma.json", "template.txt", "samples.json", "tokenizer_config.json"),
)
OF_A_RUN = (
    *(RUN, RUN, RUN, SEAL, METRICS, METRICS, TRAINED_ROWS, TRAINED_ROWS, "settings.yaml", WEIGHTS),
    *("yeonma.json", "adapter_config.json", "template.txt", "samples.json", "README.md", "loss.svg"),
)
PLACES = (*(f"checkpoint-{step}/{name}" for step in (2, 4) for name in OF_A_CHECKPOINT), *OF_A_RUN)
# fmt: off
NEW_NAMES = (
    "checkpoint-3", "checkpoint-04", "checkpoint-٣", "checkpoint-1e3", "checkpoint-+5", "checkpoint--5",
    "checkpoint-0", "checkpoint-3000", "checkpoint-999999999999999999", "checkpoint-1000000000000000000",
    "Checkpoint-5", "checkpoint-5 ", "checkpoint-5\n", "checkpoint-", "checkpoint-4.bak", ".checkpoint-4.partial",
    ".checkpoint-4.former", ".checkpoint-4.removed", ".checkpoint-9.former", ".checkpoint-04.former",
    ".final.partial", ".run.json.partial", ".settings.yaml.partial", ".lock", ".lock.held", "config.json",
    "loss.png", "adapter_model.bin", "notes.txt", "additional_chat_templates", "checkpoint-4/extra.json",
    "checkpoint-4/sub", ".cache", "\udcff", "tokenizer.model",
)
# fmt: on
KEYS = ("step", "best_step", "lines", "sha256", "identity", "finished", "cpu/0", "lora_alpha", "optimizer")


@dataclass(frozen=True)
class Edit:
    """One change of the folder. `at` and `part` choose among what is there, whatever its number is."""

    what: str
    place: str
    at: int = 0
    part: int = 0
    value: Any = None


@dataclass(frozen=True)
class RunFolderCase:
    """`verb`: a key of COMMANDS. `finished`: whether run.json says so; `newest`: whether the last checkpoint is there.
    `sums`: whether checksums are made anew for what the edits left."""

    verb: str
    finished: bool = False
    newest: bool = True
    edits: tuple[Edit, ...] = ()
    sums: bool = False


TRAIN = ("--base_model", "base", "--data_path", "rows.jsonl", "--output_dir", "../work/run")
ROW = ("--row", '{"document": "a storm."}', "--max_new_tokens", "2")
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "continue": ("sft", *TRAIN),
    "continue at 2": ("sft", *TRAIN, "--resume_from_checkpoint", "../work/run/checkpoint-2"),
    "start anew": ("sft", *TRAIN, "--resume_from_checkpoint", "none"),
    "verify": ("verify", "../work/run"),
    "verify checkpoint": ("verify", "../work/run/checkpoint-4"),
    "generate": ("generate", "../work/run", *ROW),
    "generate checkpoint": ("generate", "../work/run/checkpoint-2", *ROW),
    "merge": ("merge", "../work/run", "--output_dir", "../work/merged"),
}
VERBS = (*["continue"] * 6, *["continue at 2"] * 2, "start anew", *["verify"] * 3, *list(COMMANDS)[4:])


def run_of_sandbox(scratch: Path) -> dict[str, bytes]:
    """A base with weights, data, a folder of somebody else, and a finished run, made where the sandbox will be: a run
    records the absolute path of its base."""
    root = scratch.parent / Sandbox.ROOT
    root.mkdir()
    model_folder(root / "base")
    write_jsonl(root / "rows.jsonl", articles(12))
    (root / "precious").mkdir()
    (root / "precious" / "file").write_bytes(b"as it was\n")
    with working_in(root, scratch / "cache"):
        trained(Path("run"), Path("base"), Path("rows.jsonl"), **SETTINGS)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# Edits


def edit_json(path: Path, edit: Edit) -> None:
    """Changes one value of a JSON file, or of one line of a log."""
    lines = path.read_bytes().splitlines(keepends=True) if path.suffix == ".jsonl" else [path.read_bytes()]
    number = edit.at % len(lines)
    lines[number] = file_bytes(json.dumps(_with_edit(json.loads(lines[number]), edit)) + "\n")
    path.write_bytes(b"".join(lines))


def _with_edit(content: Any, edit: Edit) -> Any:
    parents = [parent for parent in containers(content) if parent]
    kind, name, fresh = edit.value
    if not parents:
        return fresh
    parent = parents[edit.at % len(parents)]
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    key = keys[edit.part % len(keys)]
    if kind == "drop":
        del parent[key]
    elif kind == "wrap":
        parent[key] = [parent[key]]
    elif isinstance(parent, dict) and kind in ("add", "rename"):
        parent[name] = fresh if kind == "add" else parent.pop(key)
    elif kind == "near" and isinstance(parent[key], int | float):
        parent[key] += edit.part - 3
    else:
        parent[key] = fresh
    return content


def edit_bytes(path: Path, edit: Edit) -> None:
    content = path.read_bytes()
    at = edit.at % (len(content) + 1)
    rest = content[at : at + 1] and bytes([content[at] ^ (1 << edit.part % 8)]) + content[at + 1 :]
    ways = (content[:at], content[:at] + rest, content[:at] + edit.value + content[at:], b"", edit.value)
    path.write_bytes(ways[edit.part % len(ways)])


def edit_lines(path: Path, edit: Edit) -> None:
    """Takes one line of a log away, doubles it, or changes its place."""
    lines = path.read_bytes().splitlines(keepends=True)
    at = edit.at % len(lines)
    ways = (lines[:at] + lines[at + 1 :], [*lines[:at], lines[at], *lines[at:]], [*lines[at:], *lines[:at]])
    path.write_bytes(b"".join(ways[edit.part % len(ways)]))


def edit_tensors(path: Path, edit: Edit) -> None:
    tensors = load_file(path)
    names = sorted(tensors)
    name = names[edit.at % len(names)]
    tensor = tensors[name]
    ways: tuple[Callable[[], torch.Tensor | None], ...] = (
        lambda: None,
        lambda: tensor[..., :-1].contiguous() if tensor.ndim else tensor.reshape(1),
        lambda: tensor.reshape(-1, 1),
        lambda: tensor.to(torch.int32),
        lambda: tensor.to(torch.float64),
        lambda: torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 255),
        lambda: torch.full_like(tensor, float("inf") if tensor.is_floating_point() else 0),
        lambda: -tensor if tensor.is_floating_point() else tensor.flip(0),
        lambda: torch.empty(0, dtype=tensor.dtype),
    )
    changed = ways[edit.part % len(ways)]()
    del tensors[name]
    if changed is not None:
        tensors[edit.value or name] = changed
    save_file(tensors, path, metadata={"format": "pt"})


def edit_kind(path: Path, edit: Edit) -> None:
    """Puts something else in the place of a file or folder."""
    precious = Path("precious").absolute()
    former = path.with_name("former-of-a-link")
    path.rename(former)
    if edit.part % 8 == 0:
        path.symlink_to(former.name)
        return
    shutil.rmtree(former) if former.is_dir() else former.unlink()
    ways: tuple[Callable[[], object], ...] = (
        lambda: path.symlink_to(precious / "file"),
        lambda: path.symlink_to(precious),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to(precious / "nothing"),
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.write_bytes(b"{}"),
    )
    ways[edit.part % 8 - 1]()


def edit_name(path: Path, edit: Edit) -> None:
    """Copies a checkpoint, or puts something, under another name."""
    new = path.parent / edit.value
    if os.path.lexists(new):
        return
    precious = Path("precious").absolute()
    ways: tuple[Callable[[], object], ...] = (
        lambda: shutil.copytree(path, new, symlinks=True),
        lambda: path.rename(new),
        lambda: new.symlink_to(precious),
        lambda: new.symlink_to(precious / "file"),
        lambda: os.mkfifo(new),
        lambda: new.mkdir(),
        lambda: new.write_bytes(b'{"step": 3}\n'),
        lambda: new.symlink_to(path.name),
    )
    ways[edit.part % len(ways)]()


EDITS: Mapping[str, Callable[[Path, Edit], None]] = {
    "json": edit_json,
    "bytes": edit_bytes,
    "lines": edit_lines,
    "tensors": edit_tensors,
    "kind": edit_kind,
    "name": edit_name,
}


@st.composite
def an_edit(draw: Draw) -> Edit:
    what = draw(
        st.sampled_from(("json", "json", "json", "json", "bytes", "lines", "tensors", "kind", "name"))
    )
    at, part = draw(st.integers(0, 60)), draw(st.integers(0, 40))
    if what == "name":
        value = draw(st.sampled_from(NEW_NAMES))
        return Edit(what, draw(st.sampled_from(("checkpoint-2", "checkpoint-4"))), at, part, value)
    if what == "kind":
        return Edit(what, draw(st.sampled_from((*PLACES, "checkpoint-2", "checkpoint-4"))), at, part)
    endings = {"json": (".json", ".jsonl"), "lines": (".jsonl",), "tensors": (".safetensors",)}
    place = draw(st.sampled_from([name for name in PLACES if name.endswith(endings.get(what, ""))]))
    value: Any = None
    if what == "json":
        kind = draw(st.sampled_from(("change", "change", "near", "drop", "wrap", "add", "rename")))
        value = (kind, draw(st.sampled_from((*KEYS, *TEXTS))), draw(st.sampled_from(VALUES)))
    elif what == "bytes":
        at, value = draw(st.integers(0, 5000)), draw(st.sampled_from(PIECES))
    elif what == "tensors":
        value = draw(st.sampled_from((None, None, None, "x", "base_model.model.x/exp_avg")))
    return Edit(what, place, at, part, value)


@st.composite
def run_folder_cases(draw: Draw) -> RunFolderCase:
    verb = draw(st.sampled_from(VERBS))
    finished = draw(
        st.sampled_from((False, False, False, True) if verb in VERBS[:9] else (True, True, False))
    )
    edits = draw(st.lists(an_edit(), max_size=3))
    return RunFolderCase(
        verb, finished, draw(st.booleans()), tuple(edits), draw(st.sampled_from((True, True, False)))
    )


# What is made of them


def make_sums(output: Path) -> None:
    """Makes checksums of what is there now: the logs' in every state.json, the files' in every manifest."""
    folders = [output, *sorted(path for path in output.glob("*checkpoint-*") if kind_of(path) == "folder")]
    for folder in reversed(folders):
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if kind_of(folder / STATE) == "file":  # reading a pipe would not end
                state = json.loads((folder / STATE).read_bytes())
                for name, recorded in state["logs"].items():
                    if kind_of(output / name) != "file":
                        continue
                    lines = (output / name).read_bytes().splitlines()[: recorded["lines"]]
                    total = LineSum()
                    for line in lines:
                        total.add(json.loads(line))
                    recorded |= total.as_record()
                (folder / STATE).write_text(json.dumps(state))
        manifest = folder / MANIFEST
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if kind_of(manifest) == "file":
                content = json.loads(manifest.read_bytes())
                for name in content["sha256"]:
                    if kind_of(folder / name) == "file":
                        content["sha256"][name] = file_hash(folder / name)
                manifest.write_text(json.dumps(content))


def make_folder(case: RunFolderCase, output: Path) -> None:
    """The run's folder with the edits of a case. An edit for which something else is in the way is left out."""
    shutil.copytree("run", output)
    if not case.newest:
        shutil.rmtree(output / "checkpoint-4")
    if not case.finished:
        (output / SEAL).unlink()
        content = json.loads((output / RUN).read_bytes())
        (output / RUN).write_text(json.dumps({**content, "finished": False}))
    for edit in case.edits:
        path = output / edit.place
        is_file = edit.what not in ("kind", "name")
        if kind_of(path) in (("file",) if is_file else ("file", "folder")):
            with suppress(
                OSError, ValueError, ZeroDivisionError, RecursionError
            ):  # of what an edit before has left
                EDITS[edit.what](path, edit)
    if case.sums:
        make_sums(output)


def contents(folder: Path) -> dict[str, object]:
    """What lies under each name: a file's bytes, a link's target, else its kind."""
    found: dict[str, object] = {}
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(where, name)
            kind = kind_of(path)
            content = {"file": path.read_bytes, "symbolic link": lambda path=path: os.readlink(path)}
            found[str(path.relative_to(folder))] = (kind, content[kind]() if kind in content else None)
    return found


def is_a_runs(name: str) -> bool:
    """Whether a run may write or remove what lies under this path."""
    first = Path(name).parts[0]
    patterns = (*OURS, *TOKENIZERS, ".*.partial", RUN, SEAL, PRINTED)
    return is_checkpoint(first) or is_unfinished(first) or any(Path(name).match(one) for one in patterns)


def read_run_folder(case: RunFolderCase, sandbox: Sandbox) -> None:
    work = Path("../work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    output = work / "run"
    make_folder(case, output)
    before = contents(output)
    verb, *words = COMMANDS[case.verb]
    try:
        run(
            CommandLine(verb, (), finds=verb == "verify"),
            *words,
            *(settings_words() if verb == "sft" else ()),
        )
    except UserError:
        assert recovered(before) == recovered(contents(output)), changes(before, contents(output))
        assert verb != "merge" or [path.name for path in work.iterdir()] == ["run"]
        raise
    after = contents(output)
    others = {name: value for name, value in before.items() if not is_a_runs(name)}
    assert {name: after.get(name) for name in others} == others, changes(others, after)
    if verb != "sft" or (case.finished and case.verb == "continue" and before == after):
        assert before == after, changes(before, after)
        return
    assert json.loads((output / RUN).read_bytes())["finished"] is True
    assert check_files(output, is_run=True).problems == ()
    for name, tensor in load_file(output / WEIGHTS).items():
        assert bool(tensor.isfinite().all()), f"{name} is not finite"
    new_hidden = {name for name in after if name.startswith(".")} - set(others)
    assert not new_hidden, new_hidden
    if not case.edits:
        whole = contents(Path("run"))
        assert after.keys() == whole.keys()
        assert after[WEIGHTS] == whole[WEIGHTS]


def recovered(found: Mapping[str, object]) -> dict[str, object]:
    """With the names that a start gives back to checkpoints, even one that is refused then."""
    names = {Path(name).parts[0] for name in found}
    back = {
        name: name[1 : -len(".former")]
        for name in names
        if is_unfinished(name) and name.endswith(".former") and name[1 : -len(".former")] not in names
    }
    return {
        str(Path(back.get(Path(name).parts[0], Path(name).parts[0]), *Path(name).parts[1:])): value
        for name, value in found.items()
    }


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> str:
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return f"written, changed or removed: {', '.join(changed)}"


def settings_words() -> list[str]:
    from tests.runs import SETTINGS as OF_TESTS
    from tests.runs import arguments

    settings = {**OF_TESTS, **SETTINGS}
    del settings["num_epochs"]
    return arguments(settings)


RUN_FOLDER = Target(
    name="run_folder",
    cases=run_folder_cases(),
    valid=RunFolderCase("continue", newest=False),
    files=lambda case: {},
    read=read_run_folder,
    pristine=run_of_sandbox,
)
