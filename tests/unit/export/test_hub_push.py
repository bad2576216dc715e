"""`yeonma push`: what is uploaded, what stays, what is refused, and that the files arrive unchanged."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import OWNER, TOKEN, Hub, Repository, hub
from tests.runs import articles, model_folder, trained, write_jsonl
from yeonma.errors import UserError
from yeonma.export.hub_push import collect

ROOT = Path(__file__).resolve().parents[3]
NAME = "someone/tiny-base"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of two steps, on a base in a local folder."""
    place = tmp_path_factory.mktemp("run")
    base = model_folder(place / "base")
    data = write_jsonl(place / "rows.jsonl", articles(8))
    return trained(place / "titles", base, data, max_steps=2, card_rows=1).folder


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "titles"))


@pytest.fixture
def there() -> Iterator[Hub]:
    with hub() as state:
        yield state


def environment(there: Hub | None, home: Path, **more: str) -> dict[str, str]:
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    address = there.address if there else "http://127.0.0.1:9"
    # xet uses other servers; without it the client uses git-lfs
    own = {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    return {**inherited, **own, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


def push(there: Hub | None, folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "yeonma", "push", str(folder), "--repo", "titles", *words]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(there, folder.parent / "home", **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


READY = ("--base_model", NAME, "--hide_paths", "true", "--yes", "true")


def test_the_adapter_arrives_without_paths_of_this_machine(there: Hub, folder: Path) -> None:
    done = push(there, folder, *READY)
    assert done.returncode == 0, done.stderr
    repository = there.repositories[f"{OWNER}/titles"]
    assert repository.private
    assert set(repository.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "template.txt",
        "yeonma.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "base_chat_template.jinja",
        "loss.svg",
    }
    for name in ("adapter_model.safetensors", "template.txt", "tokenizer.json", "loss.svg"):
        assert repository.files[name] == (folder / name).read_bytes()
    assert repository.large == {"adapter_model.safetensors"}
    everything = b"".join(repository.files.values())
    assert str(folder.parent).encode() not in everything
    run_place = json.loads((folder / "yeonma.json").read_text("utf-8"))["base"]["name"]
    assert run_place.encode() not in everything
    assert json.loads(repository.files["yeonma.json"])["base"]["name"] == NAME
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] == NAME
    assert f"base_model: {NAME}\n".encode() in repository.files["README.md"]
    for name in ("checkpoint-", "metrics.jsonl", "settings.yaml", "run.json"):
        assert name in done.stdout.partition("not sent:")[2]
    assert "10 files uploaded and verified: " in done.stdout


def test_the_plot_of_an_earlier_version_arrives_too(there: Hub, folder: Path) -> None:
    (folder / "loss.svg").unlink()
    (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = push(there, folder, *READY)
    assert done.returncode == 0, done.stderr
    assert there.repositories[f"{OWNER}/titles"].files["loss.png"] == b"\x89PNG\r\n\x1a\n"


def test_a_dry_run_lists_the_files_without_the_hub(there: Hub, folder: Path) -> None:
    done = push(there, folder, *READY[:4], "--dry_run", "true")
    assert done.returncode == 0, done.stderr
    assert there.requests == []
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{folder} -> titles (private): 10 files, ")
    assert any(line.split()[0] == "adapter_model.safetensors" for line in lines)
    assert any(line.startswith("  yeonma.json") and line.endswith("edited for upload") for line in lines)
    assert not any(line.startswith("  template.txt") and line.endswith("upload") for line in lines)


def test_without_a_terminal_nothing_is_sent_unconfirmed(there: Hub, folder: Path) -> None:
    done = push(there, folder, *READY[:4])
    assert done.returncode == 2
    assert "--yes true" in done.stderr
    assert there.requests == []


@pytest.mark.parametrize(("said", "status", "sent"), [("y\n", 0, True), ("\n", 1, False)])
def test_a_terminal_is_asked_to_confirm(there: Hub, folder: Path, said: str, status: int, sent: bool) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "yeonma", "push", str(folder), "--repo", "titles", *READY[:4]]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(there, folder.parent / "home"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = ""
        while "[y/N]" not in shown:
            assert select.select([ours], [], [], 60)[0], shown
            shown += os.read(ours, 4096).decode()
        assert there.requests == []
        os.write(ours, said.encode())
        assert process.wait(timeout=60) == status
    os.close(ours)
    assert (f"{OWNER}/titles" in there.repositories) == sent


def test_a_repository_is_public_only_if_asked_for(there: Hub, folder: Path) -> None:
    assert push(there, folder, *READY, "--public", "true").returncode == 0
    assert not there.repositories[f"{OWNER}/titles"].private
    done = push(there, folder, *READY)  # the same repository, which is public now
    assert done.returncode == 2
    assert "it is public" in done.stderr
    assert len(there.repositories[f"{OWNER}/titles"].messages) == 1


def test_a_private_repository_is_not_made_public(there: Hub, folder: Path) -> None:
    there.repositories[f"{OWNER}/titles"] = Repository(private=True)
    done = push(there, folder, *READY, "--public", "true")
    assert done.returncode == 2
    assert "it is private" in done.stderr
    assert there.repositories[f"{OWNER}/titles"].files == {}


def test_a_second_push_is_a_second_commit(there: Hub, folder: Path) -> None:
    assert push(there, folder, *READY).returncode == 0
    (folder / "README.md").write_text("# Better text\n", encoding="utf-8")
    assert push(there, folder, *READY, "--message", "Better text").returncode == 0
    repository = there.repositories[f"{OWNER}/titles"]
    assert repository.messages == ["Upload with Yeonma", "Better text"]
    assert repository.files["README.md"] == b"# Better text\n"


def test_a_base_that_is_only_on_this_machine_is_refused(there: Hub, folder: Path) -> None:
    done = push(there, folder, "--hide_paths", "true", "--yes", "true")
    assert done.returncode == 2
    assert "--base_model owner/name" in done.stderr
    assert there.requests == []


def test_paths_are_refused_with_their_places(there: Hub, folder: Path) -> None:
    done = push(there, folder, "--base_model", NAME, "--yes", "true")
    assert done.returncode == 2
    assert "yeonma.json: trained_on.data: contains a path of this machine" in done.stderr
    assert "README.md:" in done.stderr
    assert "--hide_paths true" in done.stderr
    assert there.requests == []


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("README.md", "see hf_" + "a" * 34, "a Hugging Face token"),
        ("README.md", "sk-" + "Ab1" * 10, "an API key"),
        ("README.md", "AKIA" + "A1" * 8, "an AWS access key"),
        ("README.md", "https://me:pass@example.org/", "a password in a URL"),
        ("template.txt", "-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("chat_template.jinja", "{# ghp_" + "a" * 36 + " #}", "a GitHub token"),
        ("README.md", "over-the-hills-and-far", "the value of $OTHER_SECRET"),
    ],
)
def test_secrets_are_refused_and_not_repeated(folder: Path, name: str, text: str, what: str) -> None:
    path = folder / name
    path.write_text((path.read_text("utf-8") if path.exists() else "") + f"\n{text}\n", encoding="utf-8")
    line = path.read_text("utf-8").count("\n")
    with pytest.raises(UserError) as error:
        collect(folder, NAME, True, {"OTHER_SECRET": "over-the-hills-and-far"})
    (problem,) = error.value.problems
    assert what in problem.what
    assert problem.place == f"{name}:{line}"
    assert text not in str(error.value)


def test_the_metadata_of_weights_is_scanned(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"from": "/home/mina/secret/run"})
    with pytest.raises(UserError, match=r"adapter_model\.safetensors.*/home/mina/secret/run"):
        collect(folder, NAME, True, {})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("token", "hf auth login"),
        ("read_only", "a token that may write"),
        ("loses", "did not arrive"),
        ("damages", "differs from the file sent"),
        ("away", "cannot be reached"),
        ("no token", "no token for the hub"),
        ("name", "owner/name"),
    ],
)
def test_faults_of_the_hub_are_reported(there: Hub, folder: Path, fault: str, message: str) -> None:
    more: dict[str, str] = {}
    words = list(READY)
    if fault == "token":
        more["HF_TOKEN"] = "hf_other"
    elif fault == "no token":
        more["HF_TOKEN"] = ""
    elif fault == "name":
        words += ["--repo", "a/b/c"]
    elif fault == "read_only":
        there.read_only = True
    elif fault == "loses":
        there.loses = "template.txt"
    elif fault == "damages":
        there.damages = "adapter_model.safetensors"
    done = push(None if fault == "away" else there, folder, *words, **more)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_folders_with_nothing_to_send_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        collect(tmp_path / "nowhere", None, False, {})
    with pytest.raises(UserError, match="neither an adapter nor a model"):
        collect(tmp_path, None, False, {})
    (folder / "yeonma.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        collect(folder, NAME, True, {})
    with pytest.raises(UserError, match="base_model"):
        collect(folder, str(tmp_path), True, {})
