"""What lies in an output folder under a run's names: files and folders, never links or pipes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from yeonma.errors import UserError
from yeonma.files import hidden_path, kind_of, open_regular, read_file, read_regular, replace_file
from yeonma.run_folder import entries, run_log
from yeonma.run_folder.checkpoint import checkpoints, newest_whole, read_state, recover, sweep
from yeonma.run_folder.entries import check_entries, is_checkpoint, passed_over
from yeonma.run_folder.run_log import open_metrics, open_trained_rows, read_metrics

FILES = (
    "run.json",
    "manifest.json",
    "metrics.jsonl",
    "trained_rows.jsonl",
    "answers.jsonl",
    "log.txt",
    "settings.yaml",
    "README.md",
    "loss.svg",
    "adapter_model.safetensors",
    "adapter_config.json",
    "yeonma.json",
    "template.txt",
    "samples.json",
    "sample_answers.json",
    "tokenizer.json",
    "chat_template.jinja",
    ".lock",
    ".lock.held",
    ".run.json.partial",
    ".manifest.json.partial",
    ".README.md.partial",
)
FOLDERS = (
    "checkpoint-4",
    ".checkpoint-4.partial",
    ".checkpoint-4.removed",
    ".checkpoint-4.former",
    ".final.partial",
    "additional_chat_templates",
)


def make_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))  # whose path may be only so long


WRONG: dict[str, Callable[[Path], object]] = {
    "symbolic link": lambda path: path.symlink_to(path.parent / "elsewhere"),
    "pipe": os.mkfifo,
    "socket": make_socket,
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_fault_89_a_name_taken_by_something_else_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    wanted = "file" if name in FILES else "folder"
    WRONG[kind](tmp_path / name)
    with pytest.raises(UserError) as caught:
        check_entries(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / name}: it is a {kind}, and a run has a {wanted} of this name; "
        "remove it, or give another output_dir"
    )


def test_fault_89_folders_for_files_and_files_for_folders_are_refused_together(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "checkpoint-4").write_text("")
    with pytest.raises(UserError) as caught:
        check_entries(tmp_path)
    assert [problem.what for problem in caught.value.problems] == [
        "it is a file, and a run has a folder of this name",
        "it is a folder, and a run has a file of this name",
    ]


def test_what_a_run_leaves_and_what_is_not_its_own_is_fine(tmp_path: Path) -> None:
    check_entries(tmp_path / "missing")
    for name in FILES:
        (tmp_path / name).write_text("")
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "mine")
    (tmp_path / "notes.txt").symlink_to("elsewhere")
    check_entries(tmp_path)


NAMES_OF_NO_RUN = (
    "checkpoint-04",
    "checkpoint-0",
    "checkpoint-٤",
    "checkpoint-４",
    "checkpoint-4.bak",
    "checkpoint-4 ",
    "checkpoint--4",
    "checkpoint-4_0",
    "checkpoint-" + "9" * 30,
)


def test_fault_88_only_plain_digits_name_a_checkpoint(tmp_path: Path) -> None:
    assert is_checkpoint("checkpoint-4") and is_checkpoint("checkpoint-100")
    for name in NAMES_OF_NO_RUN:
        assert not is_checkpoint(name)
        (tmp_path / name).mkdir()
        (tmp_path / f".{name}.partial").mkdir()
        (tmp_path / f".{name}.former").mkdir()
    before = sorted(os.listdir(tmp_path))
    assert checkpoints(tmp_path) == []
    messages: list[str] = []
    assert newest_whole(tmp_path, messages.append) is None
    assert sorted(line.partition(": ")[0] for line in messages) == sorted(
        f"passing over {name}" for name in NAMES_OF_NO_RUN
    )
    recover(tmp_path)
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


# Writing and reading: no link is followed, and nothing waits for a pipe


@pytest.mark.parametrize("kind", ["symbolic link", "pipe"])
def test_fault_89_a_file_is_not_replaced_through_what_lies_beside_it(tmp_path: Path, kind: str) -> None:
    precious, path = tmp_path / "elsewhere", tmp_path / "run.json"
    precious.write_text("as it was")
    WRONG[kind](hidden_path(path, "partial"))
    with pytest.raises(
        UserError, match=rf"\.run\.json\.partial: it is a {kind} where a file belongs; remove it"
    ):
        replace_file(path, b"{}")
    assert precious.read_text() == "as it was"
    assert not path.exists() and kind_of(hidden_path(path, "partial")) == kind


@pytest.mark.parametrize("kind", ["symbolic link", "pipe"])
def test_fault_89_logs_are_not_written_through_a_link_or_a_pipe(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").write_text("as it was")
    WRONG[kind](tmp_path / "log")
    for opened in (
        lambda: open_metrics(tmp_path / "log", None),
        lambda: open_trained_rows(tmp_path / "log", 0),
    ):
        with pytest.raises(UserError, match=rf"log: it is a {kind} where a file belongs"):
            opened()
    assert (tmp_path / "elsewhere").read_text() == "as it was"


@pytest.mark.parametrize("kind", ["symbolic link", "pipe"])
def test_fault_89_a_manifest_that_is_no_file_is_damage(tmp_path: Path, kind: str) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    WRONG[kind](tmp_path / "checkpoint-4" / "manifest.json")
    with pytest.raises(UserError, match=rf"manifest\.json: it is a {kind} where a file belongs"):
        read_state(tmp_path / "checkpoint-4")


def test_files_are_opened_as_always(tmp_path: Path) -> None:
    path = tmp_path / "a"
    os.close(open_regular(path, os.O_WRONLY | os.O_CREAT))
    replace_file(path, b"new")
    hidden_path(path, "partial").write_bytes(b"what a killed process has left")
    replace_file(path, b"newer")
    assert path.read_bytes() == b"newer"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "b", os.O_RDONLY)


def test_a_hard_link_under_a_hidden_name_is_not_written_through(tmp_path: Path) -> None:
    precious, path = tmp_path / "precious", tmp_path / "run.json"
    precious.write_bytes(b"as it was")
    os.link(precious, hidden_path(path, "partial"))
    replace_file(path, b"new")
    assert (precious.read_bytes(), path.read_bytes()) == (b"as it was", b"new")


def test_a_disk_without_capitals_takes_no_checkpoint_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has such disks. Saving checkpoint-5 there would replace Checkpoint-5."""
    (tmp_path / "Checkpoint-5").mkdir()
    check_entries(tmp_path)  # this disk tells them apart
    assert passed_over(tmp_path) == ["Checkpoint-5"]
    monkeypatch.setattr(entries, "kind_of", lambda path: kind_of(path.with_name(path.name.capitalize())))
    with pytest.raises(
        UserError, match=r"Checkpoint-5: this disk does not tell it from checkpoint-5.*; rename it"
    ):
        check_entries(tmp_path)


@pytest.mark.parametrize("read", [read_file, read_regular])
def test_a_sparse_file_is_not_read_into_memory(tmp_path: Path, read: Callable[[Path], bytes]) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"{}")
    assert read(path) == b"{}"
    os.truncate(path, 1 << 40)
    with pytest.raises(OSError, match="it has more than 268,435,456 bytes"):
        read(path)


def test_a_sparse_log_is_read_up_to_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "MOST_BYTES", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n')
    os.truncate(path, 1 << 40)
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
