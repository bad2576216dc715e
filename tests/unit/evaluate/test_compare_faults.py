"""Errors of `yeonma compare`, reported with location and remedy before weights are loaded; full disks."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import Folders, tiny_adapter, tiny_base
from tests.comparing import ROWS, TEMPLATE, compare
from tests.runs import arguments, command, write_jsonl
from tests.tokenizers import byte_level
from yeonma.model import load


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return tiny_adapter(tmp_path_factory.mktemp("adapter"), byte_level(), template=TEMPLATE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "held_out.jsonl", ROWS)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("weights were loaded"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_path": "nowhere/rows.jsonl"}, "nowhere/rows.jsonl"),
        ({"rows": 0}, "of at least 1"),
        ({"template": "none.txt"}, "none.txt"),
        ({"columns": {"documnet": "title"}}, 'no template has a field "documnet"'),
        ({"columns": {"document": "documents"}}, 'did you mean "document"'),
        ({"output_dir": "FILE"}, "it is a file"),
        ({"output_dir": "FILE/below"}, "is a file"),
        ({"output_dir": "BASE"}, "it is a model's folder"),
        ({"max_new_tokens": 5000}, "leave no room"),
    ],
)
def test_invalid_setting_is_reported_and_nothing_is_written(
    settings: dict[str, Any], message: str, folders: Folders, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    output = str(settings.pop("output_dir", tmp_path / "report"))
    output = output.replace("FILE", str(tmp_path / "file")).replace("BASE", str(folders.base))
    before = sorted(path.name for path in tmp_path.iterdir())
    words = arguments({"data_path": data, "max_new_tokens": 12, "template": TEMPLATE, **settings})
    done = command(tmp_path, "compare", "--models", str(folders.base), "--output_dir", output, *words)
    assert done.status == 2, done.err
    assert message in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.usefixtures("no_weights")
def test_all_invalid_models_are_reported_together(folders: Folders, data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = compare(tmp_path / "report", "./gone", folders.base, empty, data_path=data)
    assert done.status == 2
    assert "./gone: no such model folder" in done.err
    assert f"{empty}: the folder is empty" in done.err
    done = compare(tmp_path / "report", folders.base, folders.base, data_path=data)
    assert "is given twice" in done.err
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("no_weights")
def test_invalid_rows_are_each_reported_once_with_their_line(folders: Folders, tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "odd.jsonl", [ROWS[0], {"title": "no article"}, {"document": {"a": 7}, "title": "x"}]
    )
    done = compare(tmp_path / "report", folders.base, folders.adapter, data_path=data)
    assert done.status == 2
    assert done.err.count("odd.jsonl:2") == 1
    assert done.err.count("odd.jsonl:3") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("no_weights")
def test_unwritable_output_folder_is_reported(folders: Folders, data: Path, tmp_path: Path) -> None:
    read_only_folder = tmp_path / "closed"
    read_only_folder.mkdir(mode=0o500)
    done = compare(read_only_folder / "report", folders.base, data_path=data, template=TEMPLATE)
    assert done.status == 2
    assert "cannot be written" in done.err


@pytest.mark.usefixtures("no_weights")
def test_adapter_of_another_base_is_reported_with_its_own_base(
    folders: Folders, data: Path, tmp_path: Path
) -> None:
    other = tiny_base(tmp_path / "other", byte_level(), layers=3)
    done = compare(tmp_path / "report", folders.adapter, data_path=data, base_model=other)
    assert done.status == 2
    assert f"{folders.adapter}: it was trained on {folders.base}, which is not {other}" in done.err
    assert f"--base_model {folders.base}" in done.err
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("no_weights")
def test_a_tokenizer_larger_than_the_embedding_is_reported(
    folders: Folders, data: Path, tmp_path: Path
) -> None:
    base = tiny_base(tmp_path / "base", byte_level())
    larger = byte_level()
    larger.add_tokens(["<more>"])
    larger.save_pretrained(base)
    done = compare(tmp_path / "report", base, data_path=data, template=TEMPLATE)
    assert done.status == 2
    assert f"{base}: the tokenizer has ids up to" in done.err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", "", "no rows"),
        ("head.csv", "document,title\n", "a header but no rows"),
        ("other.jsonl", '{"text": "a", "headline": "b"}\n', 'other.jsonl:1: field "document" is missing'),
        ("torn.jsonl", '{"document": "a", "title": "b"}\n{"document":\n', "torn.jsonl:2:"),
    ],
)
def test_unusable_data_is_reported_with_its_location(
    name: str, content: str, message: str, folders: Folders, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    done = compare(tmp_path / "report", folders.base, folders.adapter, data_path=tmp_path / name)
    assert done.status == 2
    assert message in done.err
    assert not (tmp_path / "report").exists()


@contextmanager
def limit_file_size(size_bytes: int) -> Iterator[None]:
    """Limits the size of written files; the system's error is like that of a full disk."""
    previous_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, previous_limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous_limit)


@pytest.mark.parametrize(("size_bytes", "what"), [(700, "an answer"), (8000, "the report")])
def test_full_disk_is_reported_and_the_same_command_resumes(
    size_bytes: int, what: str, folders: Folders, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "report"
    for _ in range(2):  # the second run finds an incomplete last line
        with limit_file_size(size_bytes):
            done = compare(output, folders.base, folders.adapter, data_path=data)
        assert done.status == 2
        assert f"{output}: {what} cannot be written: " in done.err
        assert sorted(path.name for path in output.iterdir()) == ["answers.jsonl"]
    done = compare(output, folders.base, folders.adapter, data_path=data)
    assert done.status == 0
    assert "rows were answered before" in done.err or what == "the report"
    assert (output / "report.html").is_file()
