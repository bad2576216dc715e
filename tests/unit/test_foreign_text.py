"""Hostile strings wherever a user or a file can put a text: no verb shows one raw, and no message is long."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.adapters import tiny_adapter, tiny_base
from tests.hostile import NAME, STRINGS, TEXT, check_files, check_messages, check_screen, check_shown
from tests.runs import Done, arguments, articles, command, sft, write_jsonl
from tests.tokenizers import CHATML, byte_level

FEW = (NAME, STRINGS[-1])
SHORT = {"max_new_tokens": 3}
TEMPLATE = f"Below.{TEXT.replace(chr(10) + '---', '')}\n{{document}}\n\ntitle: {{title}}"


def checked(done: Done, status: int | None = None) -> Done:
    check_shown(done.out, "standard output")
    check_messages(done.err, "standard error")
    assert done.status in ((0, 1, 2) if status is None else (status,)), done.err
    if done.status == 2:
        assert done.err.startswith("yeonma: ")
    return done


# whole runs


@dataclass(frozen=True)
class Run:
    base: Path
    data: Path
    settings: Mapping[str, object]
    done: Done

    @property
    def adapter(self) -> Path:
        return self.done.folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run in which every name and text is hostile."""
    folder = tmp_path_factory.mktemp("run")
    base = tiny_base(folder / f"base{NAME}", byte_level())
    odd = [f" {TEXT}", *(text[:200] for text in STRINGS)]
    rows = [
        {
            "document": f"{row['document']}{odd[at % len(odd)]}",
            "title": row["title"],
            NAME: odd[at % len(odd)],
        }
        for at, row in enumerate(articles(8))
    ]
    data = write_jsonl(folder / f"rows{NAME}.jsonl", rows)
    settings = {"template": TEMPLATE, "cutoff_len": 2000, "max_steps": 1, "val_set_size": 2, "run_name": NAME}
    done = sft(folder / f"out{NAME}", base, data, card_rows=1, **settings)
    return Run(base, data, settings, done)


def test_a_run_and_all_that_it_leaves(run: Run) -> None:
    checked(run.done, 0)
    names = check_files(run.adapter)
    assert {"README.md", "settings.yaml", "loss.svg", "run.json", "yeonma.json", "samples.json"} <= set(names)
    card = (run.adapter / "README.md").read_text("utf-8")
    assert "\\x1b[2J\\nINJECTED\\r" in card
    again = checked(sft(run.adapter, run.base, run.data, card_rows=1, **run.settings), 0)
    assert "is finished" in again.out
    refused = checked(sft(run.adapter, run.base, run.data, card_rows=1, **{**run.settings, "seed": 1}), 2)
    assert "\\x1b[2J" in refused.err


def test_its_settings_are_read_back(run: Run) -> None:
    config = run.adapter / "settings.yaml"
    again = checked(command(run.adapter, "sft", "--config", str(config)), 0)
    assert "is finished" in again.out


def test_inspect(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    wanted = {**run.settings, "base_model": run.base, "data_path": run.data, "tokens": True, "html": page}
    done = checked(command(tmp_path, "inspect", *arguments(wanted)), 0)
    assert "\\u202e" in done.out
    assert "⟨U+001B⟩" in page.read_text("utf-8")
    check_files(tmp_path)


def test_compare(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / f"report{NAME}"
    words = arguments({"data_path": run.data, "output_dir": folder, **SHORT})
    checked(command(folder, "compare", "--models", str(run.base), str(run.adapter), *words), 0)
    assert {"report.html", "report.json", "answers.jsonl"} <= set(check_files(folder))


def test_generate_verify_and_merge(run: Run, tmp_path: Path) -> None:
    answers = tmp_path / f"answers{NAME}.jsonl"
    for more in ({}, {"output": answers}):
        wanted = arguments({"data_path": run.data, **SHORT, **more})
        checked(command(run.adapter, "generate", str(run.adapter), *wanted), 0)
    assert len([json.loads(line) for line in answers.read_text("utf-8").splitlines()]) == 8
    checked(command(run.adapter, "verify", str(run.adapter)), 0)
    checked(command(run.adapter, "verify", str(run.adapter), "--json", "true"), 0)
    merged = tmp_path / f"merged{NAME}"
    checked(command(merged, "merge", str(run.adapter), "--output_dir", str(merged)), 0)
    assert "README.md" in check_files(merged)


class _Screen(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("on_terminal", [False, True])
def test_chat(run: Run, monkeypatch: pytest.MonkeyPatch, on_terminal: bool) -> None:
    kind = _Screen if on_terminal else StringIO
    out, err = kind(), kind()
    for name, stream in (("stdin", kind(f"a{TEXT}\n\n")), ("stdout", out), ("stderr", err)):
        monkeypatch.setattr(sys, name, stream)
    from yeonma.cli import main

    assert main(["chat", str(run.adapter), *arguments(SHORT)]) == 0, err.getvalue()
    check_screen(out.getvalue())
    check_messages(err.getvalue())


# refusals, before weights


Words = Callable[[Path, str], list[str]]


def _with(verb: str, **changed: object) -> Words:
    def words(folder: Path, text: str) -> list[str]:
        given = {
            "base_model": folder / "base",
            "data_path": folder / "rows.jsonl",
            "output_dir": folder / "x",
        }
        return [
            verb,
            *arguments(
                {**given, **{name: text if value is ... else value for name, value in changed.items()}}
            ),
        ]

    return words


def _file(name: str, content: Callable[[str], str], *words: str) -> Words:
    """Writes a file with the text in it, and gives these words, in which `@` is the folder."""

    def write(folder: Path, text: str) -> list[str]:
        (folder / name).write_text(content(text), encoding="utf-8", errors="surrogatepass", newline="")
        return [word.replace("@", str(folder)) for word in words]

    return write


_BASE = ("--base_model", "@/base", "--output_dir", "@/x")
_SFT = ("sft", *_BASE, "--template", "title")
PLACES: Mapping[str, Words] = {
    "verb": lambda folder, text: [text],
    "argument": lambda folder, text: ["sft", text],
    "setting": lambda folder, text: ["sft", f"--{text}", "1"],
    **{
        f"sft {name}": _with("sft", **{name: ...})
        for name in ("data_path", "base_model", "template", "columns")
    },
    **{
        f"sft {name}": _with("sft", **{name: ...})
        for name in (
            "output_dir",
            "config",
            "cutoff_len",
            "lora_target_modules",
            "report_to",
            "adapter",
            "encoding",
        )
    },
    "sft field": _with("sft", template="{a\x1b\u202eb} {title}"),
    "sft shrink": _with("sft", template="title", shrink=...),
    "dpo loss": _with("dpo", loss=...),
    "inspect rows": _with("inspect", rows=...),
    "config file key": _file("c.yaml", lambda text: json.dumps({text: 1}), "sft", "--config", "@/c.yaml"),
    "config file value": _file(
        "c.yaml", lambda text: json.dumps({"dtype": text}), "sft", "--config", "@/c.yaml"
    ),
    "config file": _file("c.yaml", lambda text: f"a: [{text}", "sft", "--config", "@/c.yaml"),
    "template file": _file(
        "t.txt", lambda text: f"{{{text}}} {{", *_SFT[:-1], "@/t.txt", "--data_path", "@/rows.jsonl"
    ),
    "key": _file("d.jsonl", lambda text: json.dumps({text: "x"}), *_SFT, "--data_path", "@/d.jsonl"),
    "value": _file(
        "d.jsonl",
        lambda text: json.dumps({"document": [text], "title": text}),
        *_SFT,
        "--data_path",
        "@/d.jsonl",
    ),
    "role": _file(
        "d.jsonl",
        lambda text: json.dumps({"messages": [{"role": text, "content": text}]}),
        *("sft", *_BASE, "--data_path", "@/d.jsonl"),
    ),
    "broken JSON": _file("d.jsonl", lambda text: '{"' + text, *_SFT, "--data_path", "@/d.jsonl"),
    "header": _file("d.csv", lambda text: f'"{text}","{text}"\nx,y\n', *_SFT, "--data_path", "@/d.csv"),
    **{
        verb: lambda folder, text, verb=verb: [verb, text]  # type: ignore[misc]
        for verb in ("generate", "chat", "verify", "push", "serve")
    },
    **{
        verb: lambda folder, text, verb=verb: [verb, text, "--output_dir", str(folder / "y")]
        for verb in ("merge", "export")
    },  # type: ignore[misc]
    "generate row": lambda folder, text: ["generate", str(folder / "OUT"), "--row", json.dumps({text: text})],
    "generate broken row": lambda folder, text: ["generate", str(folder / "OUT"), "--row", '{"' + text],
    "compare models": _with("compare", models=...),
    "serve host": lambda folder, text: ["serve", str(folder / "OUT"), "--host", text],
    "demo": _with("demo", model_dir=...),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without weights, so that every command ends before them, an adapter on it, and rows."""
    folder = tmp_path_factory.mktemp("folders")
    tiny_adapter(folder, byte_level(CHATML))
    save_file({"nothing": torch.zeros(1)}, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    write_jsonl(folder / "rows.jsonl", articles(4))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names are in a folder of the test, and nobody types."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", StringIO())


def refuse(words: Sequence[str], folder: Path) -> None:
    if not any("\0" in word for word in words):
        checked(command(folder, *words), 2)


@pytest.mark.parametrize("place", PLACES)
def test_refusals(folders: Path, place: str) -> None:
    for text in FEW:
        refuse(PLACES[place](folders, text), folders)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_refusals_of_all_strings(folders: Path, place: str) -> None:
    for text in STRINGS:
        refuse(PLACES[place](folders, text), folders)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(sorted(PLACES)),
    text=st.lists(st.sampled_from([*NAME, *"{}[]:\"'|>#&*!%@,=\x1b\r\n\x00", "INJECTED", "가"])).map("".join),
)
def test_refusals_of_drawn_strings(folders: Path, place: str, text: str) -> None:
    refuse(PLACES[place](folders, text), folders)


# folders of others


FILES = ("OUT/yeonma.json", "OUT/adapter_config.json", "OUT/tokenizer_config.json", "base/config.json")


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of the texts and of the keys in a JSON value; a key's path ends in its object's key twice."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*path, key, None)
            yield from _leaves(part, (*path, key))
    elif isinstance(value, list):
        for at, part in enumerate(value):
            yield from _leaves(part, (*path, at))
    elif isinstance(value, str) or value is None:
        yield path


def _changed(value: Any, path: Sequence[Any], text: str) -> Any:
    head, *rest = path
    if rest == [None]:
        return {text if key == head else key: part for key, part in value.items()}
    part = _changed(value[head], rest, text) if rest else text
    if isinstance(value, dict):
        return {**value, head: part}
    return [part if at == head else other for at, other in enumerate(value)]


def _try_folders(folders: Path, copy: Path, verbs: Sequence[str], step: int) -> int:
    count = 0
    for name in FILES:
        content = json.loads((folders / name).read_text("utf-8"))
        for at, path in enumerate(_leaves(content)):
            if at % step:
                continue
            text = STRINGS[at % len(STRINGS)]
            (copy / name).write_text(json.dumps(_changed(content, path, text)), encoding="utf-8")
            for verb in verbs:
                words = {"generate": ["--row", '{"document": "x"}', "--max_new_tokens", "1"]}.get(verb, [])
                checked(command(copy, verb, str(copy / "OUT"), "--base_model", str(copy / "base"), *words))
                count += 1
        shutil.copyfile(folders / name, copy / name)
    return count


def test_an_adapter_of_others(folders: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folders, tmp_path / "copy")
    assert _try_folders(folders, copy, ["generate"], 8) > 10


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["generate", "verify"])
def test_every_text_of_an_adapter_of_others(folders: Path, tmp_path: Path, verb: str) -> None:
    copy = shutil.copytree(folders, tmp_path / "copy")
    assert _try_folders(folders, copy, [verb], 1) > 80


def test_a_thousand_tensors_with_long_names_are_a_short_message(folders: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folders, tmp_path / "copy")
    names = {f"base_model.model.{'x' * 300}.{number}\n\x1b[31m": torch.zeros(1) for number in range(1000)}
    save_file(names, copy / "OUT" / "adapter_model.safetensors")
    for verb in ("generate", "verify"):
        words = ["--row", '{"document": "x"}'] if verb == "generate" else []
        checked(command(copy, verb, str(copy / "OUT"), "--base_model", str(copy / "base"), *words))
