"""Fixtures of the fault tests: a base model, files, and complete runs that must be refused or succeed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import tiny_base
from tests.faults.tracing import Workshop, workshop
from tests.runs import Done, model_folder, sft
from tests.tokenizers import byte_level
from yeonma.model import load
from yeonma.train import run
from yeonma.train.prepare import Prepared

# The end of a long list, and the differences between two runs, whose cure is told once.
WITHOUT_CURE = re.compile(r"there are more such problems\Z| was .* and is now ")

WAY_OUT = "bad_rows: bad rows stop the run; --bad_rows skip leaves them out and counts them"
"""The line about bad rows among good ones. `refused` checks that it stands once, and does not return it."""

Write = Callable[[str, "str | bytes"], Path]
Refused = Callable[..., list[str]]
Accepted = Callable[..., "Taken"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model folder. Its tokenizer has one token per character and no chat template."""
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, whose tokenizer encodes any text and has a chat template."""
    return tiny_base(tmp_path_factory.mktemp("models") / "chat", byte_level())


@pytest.fixture(scope="session")
def saver() -> Iterator[Workshop]:
    """A process whose children save and train, to be traced, killed, or limited in disk space."""
    with workshop() as place:
        yield place


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file, and creates its folder if needed."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the bases whose weights are read."""
    names: list[str] = []
    read = load.load_base

    def noted(source: load.BaseSource, *rest: Any) -> Any:
        names.append(source.name)
        return read(source, *rest)

    monkeypatch.setattr(load, "load_base", noted)
    return names


def everything_in(folder: Path) -> dict[str, bytes | None] | None:
    """The content of every file, and every folder; None if the folder does not exist."""
    if not folder.exists():
        return None
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(tmp_path: Path, base: Path, loaded: list[str]) -> Refused:
    """Starts a run that must end with a UserError. Returns the lines of the message, without `tmp_path` in them.

    Each line must have a cure. Weights are not read (except with `reads_weights`). The output folder does not change.
    """

    def run_it(data: str | Path, *, reads_weights: bool = False, **settings: object) -> list[str]:
        output = Path(str(settings.pop("output_dir", tmp_path / "out")))
        before = everything_in(output)
        loaded.clear()
        base_model = Path(str(settings.pop("base_model", base)))
        done = sft(output, base_model, data, **settings)  # type: ignore[arg-type]
        assert done.status == 2, done.out
        assert len(loaded) == reads_weights
        assert everything_in(output) == before
        assert "Traceback" not in done.out + done.err
        lines = done.err.replace(f"{tmp_path}/", "").splitlines()
        assert lines
        for line in lines:
            assert line.startswith("yeonma: ")
            assert "; " in line or WITHOUT_CURE.search(line), line
        shown = [line.removeprefix("yeonma: ") for line in lines]
        assert shown.count(WAY_OUT) <= 1 and shown != [WAY_OUT]
        return [line for line in shown if line != WAY_OUT]

    return run_it


@dataclass(frozen=True)
class Taken:
    """A run that succeeded, and what it was trained on."""

    done: Done
    prepared: Prepared

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Each training example as two texts: all before its last answer, and that answer with its end token."""
        store, tokenizer = self.prepared.dataset.train.store, self.prepared.tokenizer
        examples = [store[int(position)] for position in self.prepared.dataset.train.positions]
        return [
            (tokenizer.decode(ids[:length]), tokenizer.decode(ids[length:]))
            for ids, length in ((example.token_ids.tolist(), example.prompt_length) for example in examples)
        ]


@pytest.fixture
def accepted(tmp_path: Path, chat_base: Path, monkeypatch: pytest.MonkeyPatch) -> Accepted:
    """A run of one step that must succeed, on `chat_base` by default."""
    all_prepared: list[Prepared] = []
    prepare = run.prepare

    def noted(*arguments: Any) -> Prepared:
        all_prepared.append(prepare(*arguments))
        return all_prepared[-1]

    monkeypatch.setattr(run, "prepare", noted)

    def run_it(data: str | Path, **settings: object) -> Taken:
        number = len(all_prepared)
        keywords: dict[str, object] = {"base_model": chat_base, "max_steps": 1, **settings}
        output = Path(str(keywords.pop("output_dir", tmp_path / f"taken-{number}")))
        done = sft(output, Path(str(keywords.pop("base_model"))), data, **keywords)  # type: ignore[arg-type]
        assert done.status == 0, done.err
        assert (output / "adapter_model.safetensors").is_file()
        return Taken(done, all_prepared[number])

    return run_it
