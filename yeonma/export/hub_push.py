"""Uploads an adapter folder or a merged model to the hub, without what should stay private."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yeonma.errors import Log, Problem, UserError
from yeonma.export.secret_scan import find_problems, replace_name, without_paths
from yeonma.files import file_hash

UPLOADED = (
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
    "loss.svg",
    "loss.png",  # of earlier versions
)
"""Patterns of files to upload. All others stay: checkpoints, logs, settings, rows, unknown files."""
NOT_SCANNED_FOR_PATHS = ("tokenizer.json", "vocab.*", "merges.txt", "*.jinja")
"""Files whose text resembles paths without being any: pieces of words, programs."""
BINARY = (".safetensors", ".png", ".model")
MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Upload:
    """A file to upload: as it is at `path`, or with edited `content`."""

    name: str
    path: Path
    content: bytes | None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.content is None else len(self.content)


def collect(
    folder: Path, base_model: str | None, hide_paths: bool, environment: Mapping[str, str]
) -> list[Upload]:
    """The files to upload, as they will be sent.

    Raises UserError with every reason not to send them: secrets, paths of this machine, a base that is only here.
    """
    if not folder.is_dir():
        cure = "give the output folder of a run, or of `yeonma merge`"
        raise UserError("no such folder", place=str(folder), cure=cure)
    paths = sorted({path for pattern in UPLOADED for path in folder.glob(pattern) if path.is_file()})
    names = {path.name for path in paths}
    is_whole_model = "config.json" in names and any(name.startswith("model") for name in names)
    if "adapter_model.safetensors" not in names and not is_whole_model:
        cure = "give the output folder of a finished run, or of `yeonma merge`"
        raise UserError("neither an adapter nor a model in this folder", place=str(folder), cure=cure)
    if base_model is not None and (Path(base_model).exists() or not _is_hub_name(base_model)):
        what, cure = "not the name of a model on the hub", "write owner/name"
        raise UserError(what, place=f"base_model {base_model}", cure=cure)
    base = base_of(folder)
    uploads, problems = [], list[Problem]()
    if base is not None and base_model is None and not _is_hub_name(base):
        what = f"the base model is a folder of this machine, {base}, which nobody else has"
        problems.append(Problem(what, str(folder), "give its name on the hub: --base_model owner/name"))
    for path in paths:
        file, own_problems = _prepared(path, base, base_model, hide_paths, environment)
        uploads.append(file)
        # a base that is a folder is reported once, above
        problems += [
            problem for problem in own_problems if base is None or base_model or base not in problem.what
        ]
    if len(problems) > MAX_PROBLEMS:
        more = Problem(f"and {len(problems) - MAX_PROBLEMS} more such places")
        problems = [*problems[:MAX_PROBLEMS], more]
    if problems:
        raise UserError(problems)
    return uploads


def base_of(folder: Path) -> str | None:
    """The base model that the folder's own files name, or None."""
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
    """The file as it will be sent, and the reasons not to send it."""
    if path.suffix in BINARY:
        text = _header(path) if path.suffix == ".safetensors" else ""
        name = f"{path.name}.json" if text else path.name
        return Upload(path.name, path, None), find_problems(name, text, environment)
    try:
        before = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return Upload(path.name, path, None), [Problem("not UTF-8 text", str(path))]
    may_have_paths = not any(path.match(pattern) for pattern in NOT_SCANNED_FOR_PATHS)
    text = before
    if may_have_paths and base is not None and base_model is not None:
        text = replace_name(path.name, text, base, base_model)
    if may_have_paths and hide_paths:
        text = without_paths(path.name, text)
    content = None if text == before else text.encode()
    problems = find_problems(path.name, text, environment, paths=may_have_paths)
    return Upload(path.name, path, content), problems


def _header(path: Path) -> str:
    """The metadata of a safetensors file, as JSON."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return json.dumps(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"damaged ({error})", place=str(path)) from None


def upload(repo: str, uploads: Sequence[Upload], message: str, public: bool, say: Log) -> str:
    """Uploads the files in one commit, creating the repository if needed, and compares what arrived with what was sent.

    Returns the commit's URL. Raises UserError if the hub refuses or cannot be reached, if the repository's visibility
    is not as asked, and if a file arrived changed. Without a commit nothing changes there, except that the repository
    may exist.
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
            raise _visibility_error(repo, public)
        operations = [
            CommitOperationAdd(file.name, file.path if file.content is None else file.content)
            for file in uploads
        ]
        commit = api.create_commit(repo, operations, commit_message=message)
        received = {
            info.path: info
            for info in api.get_paths_info(repo, [file.name for file in uploads], revision=commit.oid)
        }
    except HfHubHTTPError as error:
        raise _hub_error(error, repo) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"upload failed: {_first_line(error)}", place=f"repo {repo}") from error
    except Exception as error:
        if not _is_connection(error):
            raise
        cure = "check the connection and HF_ENDPOINT, and push again"
        raise UserError(
            f"the hub cannot be reached: {_first_line(error)}", place=f"repo {repo}", cure=cure
        ) from error
    _compare(repo, uploads, received)
    return str(commit.commit_url)


def _visibility_error(repo: str, public: bool) -> UserError:
    """The repository exists, or was created by its owner's rules, with the other visibility."""
    if public:
        what, cure = "it is private", "change that in its settings on the hub, or leave out --public"
    else:
        what, cure = "it is public", "give --public true, make it private on the hub, or choose another name"
    return UserError(what, place=f"repo {repo}", cure=cure)


def _compare(repo: str, uploads: Iterable[Upload], received: Mapping[str, Any]) -> None:
    """Raises UserError if size or hash of a file on the hub is not that of the file sent."""
    problems = []
    for file in uploads:
        place = f"{repo}/{file.name}"
        info = received.get(file.name)
        if info is None:
            problems.append(Problem("it did not arrive", place, "check the repository's .gitignore"))
        elif info.size != file.size or not _has_hash_of(info, file):
            problems.append(Problem("it differs from the file sent", place, "push again"))
    if problems:
        raise UserError(problems)


def _has_hash_of(info: Any, file: Upload) -> bool:
    """Git LFS names a file by its SHA-256, git by the SHA-1 of its blob."""
    if info.lfs is not None and file.content is None:
        return bool(info.lfs.sha256 == file_hash(file.path))
    content = file.path.read_bytes() if file.content is None else file.content
    hashes = (hashlib.sha256(content), hashlib.sha1(b"blob %d\0" % len(content) + content))
    actual = info.blob_id if info.lfs is None else info.lfs.sha256
    return actual in {own.hexdigest() for own in hashes}


def _hub_error(error: Any, repo: str) -> UserError:
    status = int(error.response.status_code)
    cures = {
        401: "log in again with `hf auth login`, or set HF_TOKEN",
        403: "use a token that may write there",
        404: "check the name, and use a token that may write there",
        409: "somebody else pushed meanwhile: push again",
        429: "wait, and push again",
    }
    what = f"the hub refused the upload ({status}): {_first_line(error)}"
    return UserError(what, place=f"repo {repo}", cure=cures.get(status, ""))


def _is_connection(error: Exception) -> bool:
    """Whether it is an error of the HTTP library that huggingface_hub uses, whichever that is."""
    return any(kind.__name__ in ("HTTPError", "TransportError") for kind in type(error).__mro__)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
