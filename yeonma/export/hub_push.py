"""`yeonma push`: an adapter folder or a merged model to the hub, and no more of it than others should have."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yeonma.config.settings import PushSettings
from yeonma.errors import Log, Problem, UserError
from yeonma.export.secret_scan import problems, renamed, without_paths
from yeonma.files import file_hash, user_path

SENT = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "template.txt",
    "yeonma.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
    "*_chat_template.jinja",
    "loss.png",
)
"""What may be sent, by pattern. All else stays: checkpoints, logs, settings, rows, files that others put there."""
WITHOUT_PATHS = ("tokenizer.json", "vocab.*", "merges.txt", "*.jinja")
"""Text that is no place for paths, and may look like them: pieces of words, programs."""
BINARY = (".safetensors", ".png", ".model")
MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Upload:
    """A file to send: its path where it goes as it is, or its content where it is changed on the way."""

    name: str
    path: Path
    content: bytes | None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.content is None else len(self.content)


def run(settings: PushSettings) -> int:
    """Show what will be sent, ask, send it in one commit, and compare what arrived.

    Returns 1 where the answer is no. Raises UserError, before anything is sent, for files that hold secrets or paths of
    this machine, for a base that nobody else has, and for a repository that others see more of than was asked for.
    """
    push = settings
    folder = user_path(push.folder)
    uploads = collect(folder, push.base_model, push.hide_paths, os.environ)
    _show(folder, uploads, push.repo, push.public)
    if push.dry_run:
        print("nothing was sent (dry_run)")
        return 0
    # what may be refused without the hub comes first, so that nobody says yes in vain
    if not push.yes and not _asked():
        print("nothing was sent")
        return 1
    print(send(push.repo, uploads, push.message, push.public, lambda text: print(text, flush=True)))
    return 0


def collect(
    folder: Path, base_model: str | None, hide_paths: bool, environment: Mapping[str, str]
) -> list[Upload]:
    """The files to send, as they will be sent. Raises UserError with all that must not be."""
    if not folder.is_dir():
        raise UserError(
            "no such folder", place=str(folder), cure="give the output folder of a run, or of `yeonma merge`"
        )
    found = sorted({path for pattern in SENT for path in folder.glob(pattern) if path.is_file()})
    names = {path.name for path in found}
    whole_model = "config.json" in names and any(name.startswith("model") for name in names)
    if "adapter_model.safetensors" not in names and not whole_model:
        cure = "give the output folder of a finished run, or of `yeonma merge`"
        raise UserError("it holds neither an adapter nor a model", place=str(folder), cure=cure)
    if base_model is not None and (Path(base_model).exists() or not _is_hub_name(base_model)):
        raise UserError(
            "not a model's name on the hub", place=f"base_model {base_model}", cure="write owner/name"
        )
    base = base_of(folder)
    uploads, wrong = [], list[Problem]()
    if base is not None and base_model is None and not _is_hub_name(base):
        what = f"the base model is a folder of this machine, {base}, which nobody else has"
        wrong.append(Problem(what, str(folder), "give its name on the hub: --base_model owner/name"))
    for path in found:
        upload, bad = _prepared(path, base, base_model, hide_paths, environment)
        uploads.append(upload)
        wrong += [each for each in bad if base is None or base_model or base not in each.what]
    if wrong:
        more = (
            [Problem(f"and {len(wrong) - MOST_PROBLEMS} more such places")]
            if len(wrong) > MOST_PROBLEMS
            else []
        )
        raise UserError([*wrong[:MOST_PROBLEMS], *more])
    return uploads


def base_of(folder: Path) -> str | None:
    """The name of the base model that the folder's own files give; None where they name none."""
    for name, keys in (
        ("yeonma.json", ("base", "name")),
        ("adapter_config.json", ("base_model_name_or_path",)),
    ):
        try:
            value: Any = json.loads((folder / name).read_text("utf-8"))
            for key in keys:
                value = value[key]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"damaged ({error})", place=str(folder / name)) from None
        if isinstance(value, str):
            return value
    return None


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.isdir(name)


def _prepared(
    path: Path, base: str | None, base_model: str | None, hide_paths: bool, environment: Mapping[str, str]
) -> tuple[Upload, list[Problem]]:
    """The file as it will be sent, and what it must not be sent with."""
    if path.suffix in BINARY:
        text = _header(path) if path.suffix == ".safetensors" else ""
        return Upload(path.name, path, None), problems(
            f"{path.name}.json" if text else path.name, text, environment
        )
    try:
        before = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return Upload(path.name, path, None), [Problem("it is not UTF-8 text", str(path))]
    paths = not any(path.match(pattern) for pattern in WITHOUT_PATHS)
    text = before
    if paths and base is not None and base_model is not None:
        text = renamed(path.name, text, base, base_model)
    if paths and hide_paths:
        text = without_paths(path.name, text)
    content = None if text == before else text.encode()
    return Upload(path.name, path, content), problems(path.name, text, environment, paths=paths)


def _header(path: Path) -> str:
    """What a safetensors file says of itself, as JSON."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return json.dumps(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"damaged ({error})", place=str(path)) from None


def _show(folder: Path, uploads: Sequence[Upload], repo: str, public: bool) -> None:
    seen = "everybody can see it" if public else "private"
    total = sum(each.size for each in uploads)
    print(f"{folder} -> {repo} ({seen}): {len(uploads)} files, {_bytes(total)}")
    width = max(len(each.name) for each in uploads)
    for each in uploads:
        print(
            f"  {each.name:{width}}  {_bytes(each.size):>10}{'  changed on the way' if each.content else ''}"
        )
    sent = {each.name for each in uploads}
    stays = sorted(
        path.name + ("/" if path.is_dir() else "") for path in folder.iterdir() if path.name not in sent
    )
    if stays:
        print(f"stays here: {', '.join(stays)}")


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _asked() -> bool:
    if not sys.stdin.isatty():
        raise UserError("nobody can be asked whether to send this", place="yes", cure="give --yes true")
    try:
        return input("send these files? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def send(repo: str, uploads: Sequence[Upload], message: str, public: bool, say: Log) -> str:
    """Send the files to the hub in one commit, and compare what lies there with what was to be sent.

    Returns the commit's address. Raises UserError for what the hub refuses; without a commit nothing has changed there
    but that the repository exists.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(str(error), place=f"repo {repo}", cure="write owner/name") from None
    if get_token() is None:
        raise UserError("no token for the hub", cure="run `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="yeonma")
    try:
        if "/" not in repo:
            repo = f"{api.whoami()['name']}/{repo}"
        try:
            private = bool(api.repo_info(repo).private)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=not public)
            private = bool(api.repo_info(repo).private)
            say(f"{repo} is new, and {'private' if private else 'public'}")
        if private == public:
            raise _seen_otherwise(repo, public)
        operations = [
            CommitOperationAdd(each.name, each.path if each.content is None else each.content)
            for each in uploads
        ]
        commit = api.create_commit(repo, operations, commit_message=message)
        there = {
            info.path: info
            for info in api.get_paths_info(repo, [each.name for each in uploads], revision=commit.oid)
        }
    except HfHubHTTPError as error:
        raise _refused(error, repo) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"the hub could not be used: {_first_line(error)}", place=f"repo {repo}") from error
    except Exception as error:
        if not _is_connection(error):
            raise
        cure = "look at the connection and at HF_ENDPOINT, and send it again"
        raise UserError(
            f"the hub cannot be reached: {_first_line(error)}", place=f"repo {repo}", cure=cure
        ) from error
    _compare(repo, uploads, there)
    return f"{len(uploads)} files are there as they are here: {commit.commit_url}"


def _seen_otherwise(repo: str, public: bool) -> UserError:
    """The repository is there, or was made by rules of its owner, with the other visibility."""
    now, cure = (
        ("private", "change that in its settings on the hub, or leave --public out")
        if public
        else ("public", "give --public true, make it private on the hub, or name another")
    )
    return UserError(f"it is {now}", place=f"repo {repo}", cure=cure)


def _compare(repo: str, uploads: Iterable[Upload], there: Mapping[str, Any]) -> None:
    """Raises UserError where what lies on the hub is not what was to be sent, by size and hash."""
    wrong = []
    for each in uploads:
        info = there.get(each.name)
        if info is None:
            wrong.append(
                Problem("it did not arrive", f"{repo}/{each.name}", "look at the repository's .gitignore")
            )
            continue
        if info.lfs is not None and each.content is None:
            same = info.lfs.sha256 == file_hash(each.path)
        else:
            content = each.path.read_bytes() if each.content is None else each.content
            sums = (
                hashlib.sha256(content),
                hashlib.sha1(b"blob %d\0" % len(content) + content),
            )  # LFS's name, git's
            same = (info.blob_id if info.lfs is None else info.lfs.sha256) in {
                each.hexdigest() for each in sums
            }
        if not same or info.size != each.size:
            wrong.append(Problem("it is not what was sent", f"{repo}/{each.name}", "send it again"))
    if wrong:
        raise UserError(wrong)


def _refused(error: Any, repo: str) -> UserError:
    status = int(error.response.status_code)
    cures = {
        401: "log in again with `hf auth login`, or set HF_TOKEN",
        403: "use a token that may write there",
        404: "look at the name, and use a token that may write there",
        409: "somebody else sent something meanwhile: send it again",
        429: "wait, and send it again",
    }
    what = f"the hub refused it ({status}): {_first_line(error)}"
    return UserError(what, place=f"repo {repo}", cure=cures.get(status, ""))


def _is_connection(error: Exception) -> bool:
    """An error of the HTTP library that the hub's own library is built on, whichever that is."""
    return any(kind.__name__ in ("HTTPError", "TransportError") for kind in type(error).__mro__)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
