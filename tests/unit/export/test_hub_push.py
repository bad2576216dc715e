"""`yeonma push`: what is uploaded, what stays, what is refused, and that the files arrive unchanged."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import OWNER, TOKEN, Hub, Repository, hub
from tests.runs import articles, model_folder, trained, write_jsonl
from tests.secret_shapes import weights
from yeonma.errors import UserError
from yeonma.export.hub_push import collect, is_sent, upload

ROOT = Path(__file__).resolve().parents[3]
NAME = "someone/tiny-base"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of two steps, on a base in a local folder."""
    folder = tmp_path_factory.mktemp("run")
    base = model_folder(folder / "base")
    data = write_jsonl(folder / "rows.jsonl", articles(8))
    return trained(folder / "titles", base, data, max_steps=2, card_rows=1).folder


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "titles"))


@pytest.fixture
def fake_hub() -> Iterator[Hub]:
    with hub() as state:
        yield state


def environment(fake_hub: Hub | None, home: Path, **overrides: str) -> dict[str, str]:
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    address = fake_hub.address if fake_hub else "http://127.0.0.1:9"
    # xet uses other servers; without it the client uses git-lfs
    settings = {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    return {**inherited, **settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **overrides}


def push(
    fake_hub: Hub | None, folder: Path, *words: str, **overrides: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "yeonma", "push", str(folder), "--repo", "titles", *words]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(fake_hub, folder.parent / "home", **overrides),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=6000,
    )


READY = ("--base_model", NAME, "--hide_paths", "true", "--yes", "true")


def test_uploaded_adapter_contains_no_local_paths(fake_hub: Hub, folder: Path) -> None:
    done = push(fake_hub, folder, *READY)
    assert done.returncode == 0, done.stderr
    repository = fake_hub.repositories[f"{OWNER}/titles"]
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
    uploaded = b"".join(repository.files.values())
    assert str(folder.parent).encode() not in uploaded
    local_base = json.loads((folder / "yeonma.json").read_text("utf-8"))["base"]["name"]
    assert local_base.encode() not in uploaded
    assert json.loads(repository.files["yeonma.json"])["base"]["name"] == NAME
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] == NAME
    assert repository.files["README.md"].startswith(f"---\nbase_model: {NAME}\n".encode())
    assert f"vllm serve {NAME} ".encode() in repository.files["README.md"]
    assert b"path/to/" not in repository.files["README.md"]
    assert b"local folder" not in repository.files["README.md"]
    for name in ("checkpoint-", "metrics.jsonl", "settings.yaml", "run.json", "log.txt"):
        assert name in done.stdout.partition("not sent:")[2]
    assert "10 files uploaded and verified: " in done.stdout


def test_png_plot_of_an_earlier_version_is_uploaded(fake_hub: Hub, folder: Path) -> None:
    (folder / "loss.svg").unlink()
    (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = push(fake_hub, folder, *READY)
    assert done.returncode == 0, done.stderr
    assert fake_hub.repositories[f"{OWNER}/titles"].files["loss.png"] == b"\x89PNG\r\n\x1a\n"


def test_dry_run_lists_the_files_without_contacting_the_hub(fake_hub: Hub, folder: Path) -> None:
    done = push(fake_hub, folder, *READY[:4], "--dry_run", "true")
    assert done.returncode == 0, done.stderr
    assert fake_hub.requests == []
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{folder} -> titles (private): 10 files, ")
    assert any(line.split()[0] == "adapter_model.safetensors" for line in lines)
    assert any(line.startswith("  yeonma.json") and line.endswith("edited for upload") for line in lines)
    assert not any(line.startswith("  template.txt") and line.endswith("upload") for line in lines)


def test_push_without_terminal_or_yes_option_is_refused(fake_hub: Hub, folder: Path) -> None:
    done = push(fake_hub, folder, *READY[:4])
    assert done.returncode == 2
    assert "--yes true" in done.stderr
    assert fake_hub.requests == []


@pytest.mark.parametrize(("reply", "status", "sent"), [("y\n", 0, True), ("\n", 1, False)])
def test_push_in_a_terminal_asks_for_confirmation(
    fake_hub: Hub, folder: Path, reply: str, status: int, sent: bool
) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "yeonma", "push", str(folder), "--repo", "titles", *READY[:4]]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(fake_hub, folder.parent / "home"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        output = ""
        while "[y/N]" not in output:
            assert select.select([controller], [], [], 60)[0], output
            output += os.read(controller, 4096).decode()
        assert fake_hub.requests == []
        os.write(controller, reply.encode())
        assert process.wait(timeout=600) == status
    os.close(controller)
    assert (f"{OWNER}/titles" in fake_hub.repositories) == sent


def test_repository_is_public_only_with_the_public_option(fake_hub: Hub, folder: Path) -> None:
    assert push(fake_hub, folder, *READY, "--public", "true").returncode == 0
    assert not fake_hub.repositories[f"{OWNER}/titles"].private
    done = push(fake_hub, folder, *READY)  # the same repository, which is public now
    assert done.returncode == 2
    assert "it is public" in done.stderr
    assert len(fake_hub.repositories[f"{OWNER}/titles"].messages) == 1


def test_a_private_repository_is_not_made_public(fake_hub: Hub, folder: Path) -> None:
    fake_hub.repositories[f"{OWNER}/titles"] = Repository(private=True)
    done = push(fake_hub, folder, *READY, "--public", "true")
    assert done.returncode == 2
    assert "it is private" in done.stderr
    assert fake_hub.repositories[f"{OWNER}/titles"].files == {}


def test_a_second_push_is_a_second_commit(fake_hub: Hub, folder: Path) -> None:
    assert push(fake_hub, folder, *READY).returncode == 0
    (folder / "README.md").write_text("# Better text\n", encoding="utf-8")
    assert push(fake_hub, folder, *READY, "--message", "Better text").returncode == 0
    repository = fake_hub.repositories[f"{OWNER}/titles"]
    assert repository.messages == ["Upload with Yeonma", "Better text"]
    assert repository.files["README.md"] == b"# Better text\n"


def test_local_base_without_a_hub_name_is_refused(fake_hub: Hub, folder: Path) -> None:
    done = push(fake_hub, folder, "--hide_paths", "true", "--yes", "true")
    assert done.returncode == 2
    assert "--base_model owner/name" in done.stderr
    assert fake_hub.requests == []


def test_local_paths_are_refused_with_their_locations(fake_hub: Hub, folder: Path) -> None:
    done = push(fake_hub, folder, "--base_model", NAME, "--yes", "true")
    assert done.returncode == 2
    assert "yeonma.json: trained_on.data: contains a path of this machine" in done.stderr
    assert "README.md" not in done.stderr
    assert "--hide_paths true" in done.stderr
    assert fake_hub.requests == []


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
def test_secrets_are_refused_and_not_printed(folder: Path, name: str, text: str, what: str) -> None:
    path = folder / name
    path.write_text((path.read_text("utf-8") if path.exists() else "") + f"\n{text}\n", encoding="utf-8")
    line = path.read_text("utf-8").count("\n")
    with pytest.raises(UserError) as error:
        collect(folder, NAME, True, {"OTHER_SECRET": "over-the-hills-and-far"})
    (problem,) = error.value.problems
    assert what in problem.what
    assert problem.place == f"{name}:{line}"
    assert text not in str(error.value)


@pytest.mark.parametrize("kind", ["link", "link to nothing", "link within", "folder", "pipe", "socket"])
def test_only_files_are_sent(folder: Path, tmp_path: Path, kind: str) -> None:
    card = folder / "README.md"
    outside = tmp_path / "outside.md"
    outside.write_text("# Nothing secret\n", encoding="utf-8")
    card.unlink()
    if kind == "folder":
        card.mkdir()
    elif kind == "pipe":
        os.mkfifo(card)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(card))
    else:
        card.symlink_to({"link": outside, "link to nothing": tmp_path / "away"}.get(kind, "template.txt"))
    with pytest.raises(UserError) as error:
        collect(folder, NAME, True, {})
    (problem,) = error.value.problems
    assert problem.place == str(card) and kind.partition(" ")[0] in problem.what
    card.rmdir() if kind == "folder" else card.unlink()
    assert "README.md" not in [file.name for file in collect(folder, NAME, True, {})]


def test_only_exact_names_are_sent(folder: Path) -> None:
    strange = [
        *("tokenizer.json.bak", "tokenizer_secrets.txt", "vocab.key", "model-final.safetensors"),
        *("model-00001-of-2.safetensors", "my_chat_template.jinja", "adapter_model.bin", ".env"),
    ]
    for name in strange:
        (folder / name).write_text("hf_" + "a1B2" * 9, encoding="utf-8")
    sent = {file.name for file in collect(folder, NAME, True, {})}
    assert not sent & set(strange) and "tokenizer.json" in sent
    assert is_sent("model-00001-of-00002.safetensors") and is_sent("tokenizer.model")


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    weights(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / shard)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    index = {"weight_map": {"a": shard, "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: the index names this file"):
        collect(tmp_path, NAME, False, {})


@pytest.mark.parametrize("how", ["replaced", "linked", "changed in place"])
def test_weights_that_change_after_the_scan_are_not_sent(
    fake_hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for name, value in environment(fake_hub, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake_hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    uploads = collect(folder, NAME, True, {})
    path = folder / "adapter_model.safetensors"
    other = tmp_path / "other.safetensors"
    shutil.copy(path, other)
    if how == "linked":
        path.unlink()
        path.symlink_to(other)
    elif how == "replaced":
        weights(folder, {"notes": "hf_" + "a1B2" * 9})
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match="has changed since it was scanned"):
        upload("titles", uploads, "message", False, print)
    assert fake_hub.repositories[f"{OWNER}/titles"].files == {}


def test_texts_that_change_after_the_scan_are_sent_as_scanned(folder: Path) -> None:
    uploads = collect(folder, NAME, True, {})
    before = (folder / "template.txt").read_bytes()
    (folder / "template.txt").write_text("hf_" + "a1B2" * 9, encoding="utf-8")
    assert {file.name: file.content for file in uploads}["template.txt"] == before


def test_what_the_model_was_trained_with_is_never_edited(folder: Path) -> None:
    template = folder / "template.txt"
    template.write_text("Files lie in /srv/data/rows. {document} {title}", encoding="utf-8")
    sent = {file.name: file for file in collect(folder, NAME, True, {}, ["rows"])}
    assert sent["template.txt"].content == template.read_bytes() and not sent["template.txt"].edited
    template.write_text("Files lie in /home/minsu/rows. {document} {title}", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"template\.txt:1: contains a home directory, /home/minsu; the model"
    ):
        collect(folder, NAME, True, {})


def test_names_of_this_machine_are_reported_or_hidden(folder: Path) -> None:
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write("Trained by minsu on lab-box17.\n")
    names = ["minsu", "lab-box17"]
    with pytest.raises(UserError, match="contains minsu, a name of this machine's user"):
        collect(folder, NAME, False, {}, names)
    sent = {file.name: file.content for file in collect(folder, NAME, True, {}, names)}
    assert (sent["README.md"] or b"").endswith(b"Trained by user on user.\n")
    # the owner of the base is public anyway
    sent = {file.name: file.content for file in collect(folder, "minsu/base", True, {}, ["minsu"])}
    assert (sent["README.md"] or b"").endswith(b"Trained by minsu on lab-box17.\n")


def test_weights_with_bytes_beyond_their_tensors_are_damaged(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(b"hf_" + b"a1B2" * 9)
    with pytest.raises(UserError, match="more or fewer bytes than its tensors"):
        collect(folder, NAME, True, {})


def test_metadata_of_weights_is_scanned_for_local_paths(folder: Path) -> None:
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
def test_hub_and_token_errors_are_reported(fake_hub: Hub, folder: Path, fault: str, message: str) -> None:
    overrides: dict[str, str] = {}
    words = list(READY)
    if fault == "token":
        overrides["HF_TOKEN"] = "hf_other"
    elif fault == "no token":
        overrides["HF_TOKEN"] = ""
    elif fault == "name":
        words += ["--repo", "a/b/c"]
    elif fault == "read_only":
        fake_hub.read_only = True
    elif fault == "loses":
        fake_hub.loses = "template.txt"
    elif fault == "damages":
        fake_hub.damages = "adapter_model.safetensors"
    done = push(None if fault == "away" else fake_hub, folder, *words, **overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_empty_or_damaged_folders_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        collect(tmp_path / "nowhere", None, False, {})
    with pytest.raises(UserError, match="neither an adapter nor a model"):
        collect(tmp_path, None, False, {})
    (folder / "yeonma.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        collect(folder, NAME, True, {})
    with pytest.raises(UserError, match="base_model"):
        collect(folder, str(tmp_path), True, {})


def test_a_call_in_python_sends_the_same_and_returns_the_address(fake_hub: Hub, folder: Path) -> None:
    code = (
        "import sys, yeonma\n"
        f"settings = {{'repo': 'titles', 'base_model': {NAME!r}, 'hide_paths': True}}\n"
        "dry = yeonma.push(sys.argv[1], dry_run=True, **settings)\n"
        "assert dry.url is None and len(dry.files) == 10, dry\n"
        "try:\n"
        "    yeonma.push(sys.argv[1], **settings)\n"
        "except yeonma.UserError as error:\n"
        "    assert 'give yes=True' in str(error), error\n"
        "print(repr(yeonma.push(sys.argv[1], yes=True, **settings)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env=environment(fake_hub, folder.parent / "home"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=6000,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("10 files uploaded and verified: http")
    assert len(fake_hub.repositories[f"{OWNER}/titles"].files) == 10
