"""Uploads an adapter folder or a merged model to the hub, without what should stay private."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yeonma.adapter.adapter_folder import LOCAL_BASE, folder_stand_in
from yeonma.config.yaml_text import write_item
from yeonma.errors import Log, Problem, UserError
from yeonma.export.publish_check import (
    HIDE,
    Private,
    find_problems,
    png_text,
    with_other_base,
    without_paths,
)
from yeonma.files import kind_of, open_regular, read_regular
from yeonma.messages import counted, in_every_language, later, tr
from yeonma.shown import code

CARD = "README.md"
EDITED = (
    CARD,
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "yeonma.json",
    "loss.svg",
)
"""Files in which paths and names may be hidden."""
CONFIGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors.index.json",
)
"""Files in which paths may be hidden, but no names: these may be tokens, or names of layers."""
TRAINED = ("template.txt", "chat_template.jinja", "base_chat_template.jinja")
"""Files that say what the model was trained with. They are sent as they are."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "qwen.tiktoken")
"""Files of pieces of words, which resemble paths without being any. They are sent as they are."""
BINARY_VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
WEIGHTS = re.compile(r"adapter_model\.safetensors|model(-[0-9]{5}-of-[0-9]{5})?\.safetensors")
PLOT = "loss.png"
"""The plot of earlier versions, now loss.svg."""
TEXTS = (*EDITED, *CONFIGS, *TRAINED, *VOCABULARIES)
MAX_PROBLEMS = 20
_LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, as the format limits them."""


@dataclass(frozen=True)
class Upload:
    """A file to upload: `content` as it was scanned, or a large file of weights at `path` whose SHA-256 is `sha256`.

    edited: whether the content differs from the file's.
    """

    name: str
    path: Path
    size: int
    content: bytes | None = None
    sha256: str = ""
    edited: bool = False


def is_sent(name: str) -> bool:
    """Whether a file of this name belongs to an adapter or a merged model. All others stay: checkpoints, logs,
    settings, rows, unknown files."""
    return name in (*TEXTS, *BINARY_VOCABULARIES, PLOT) or WEIGHTS.fullmatch(name) is not None


def collect(
    folder: Path,
    base_model: str | None,
    hide_paths: bool,
    environment: Mapping[str, str],
    names: Collection[str] = (),
) -> list[Upload]:
    """The files to upload, as they will be sent.

    names: those of this machine's user and host. Raises UserError with every reason not to send the files: links and
    other things that are no files, secrets, paths and names of this machine, a base that is only here.
    """
    if not folder.is_dir():
        cure = tr("give the output folder of a run, or of `yeonma merge`")
        raise UserError(tr("no such folder"), place=str(folder), cure=cure)
    paths = [folder / name for name in sorted(os.listdir(folder)) if is_sent(name)]
    sent = {path.name for path in paths}
    is_whole_model = "config.json" in sent and any(name.startswith("model") for name in sent)
    if "adapter_model.safetensors" not in sent and not is_whole_model:
        cure = tr("give the output folder of a finished run, or of `yeonma merge`")
        raise UserError(tr("neither an adapter nor a model in this folder"), place=str(folder), cure=cure)
    if base_model is not None and (Path(base_model).exists() or not _is_hub_name(base_model)):
        what, cure = tr("not the name of a model on the hub"), tr("write owner/name")
        raise UserError(what, place=f"base_model {base_model}", cure=cure)
    _check_kinds(paths)
    base = base_of(folder)
    public = base_model or base
    if public and _is_hub_name(public):  # its owner's name is no secret
        names = [name for name in names if name not in re.split("[^A-Za-z0-9]+", public)]
    uploads, problems = [], list[Problem]()
    if base is not None and base_model is None and not _is_hub_name(base):
        what = tr("the base model is a folder of this machine, {base}, which nobody else has", base=base)
        problems.append(Problem(what, str(folder), tr("give its name on the hub: --base_model owner/name")))
    problems += _missing_shards(folder, sent)
    for path in paths:
        file, own_problems = _prepared(path, base, base_model, hide_paths, environment, names)
        uploads.append(file)
        # a base that is a folder is reported once, above
        problems += [
            problem for problem in own_problems if base is None or base_model or base not in problem.what
        ]
    if len(problems) > MAX_PROBLEMS:
        more = Problem(tr("and {places}", places=counted(len(problems) - MAX_PROBLEMS, "more such place")))
        problems = [*problems[:MAX_PROBLEMS], more]
    if problems:
        raise UserError(problems)
    return uploads


MISSING_FILE = later("missing file")


def _check_kinds(paths: Sequence[Path]) -> None:
    """Raises UserError for everything that has the name of a file to send and is none."""
    problems = []
    for path in paths:
        kind = kind_of(path)
        if kind == "symbolic link":
            what = tr("it is a link to {path}, and links are not sent", path=os.readlink(path))
            problems.append(
                Problem(what, str(path), tr("put the file itself in its place, or remove the link"))
            )
        elif kind != "file":
            problems.append(
                Problem(
                    tr("it is a {value}, and only files are sent", value=tr(kind or MISSING_FILE)),
                    str(path),
                    tr("remove it"),
                )
            )
    if problems:
        raise UserError(problems)


def _missing_shards(folder: Path, sent: Collection[str]) -> list[Problem]:
    """The files of weights that the index names and that would not be sent."""
    if "model.safetensors.index.json" not in sent:
        return []
    path = folder / "model.safetensors.index.json"
    try:
        shards = set(json.loads(read_regular(path))["weight_map"].values())
        missing = sorted(str(name) for name in shards if name not in sent)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(tr("damaged ({error})", error=error), place=str(path)) from None
    what, cure = (
        tr("the index names this file, and it is not among those to send"),
        tr("merge the adapter again"),
    )
    return [Problem(what, str(folder / name), cure) for name in missing]


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
            raise UserError(tr("damaged ({error})", error=error), place=str(folder / name)) from None
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
    path: Path,
    base: str | None,
    base_model: str | None,
    hide_paths: bool,
    environment: Mapping[str, str],
    names: Collection[str],
) -> tuple[Upload, list[Problem]]:
    """The file as it will be sent, and the reasons not to send it."""
    name = path.name
    write_again = tr("write the file again without it")
    if WEIGHTS.fullmatch(name):
        header, size, sha256 = _read_weights(path)
        private = Private(names, cure=write_again)
        problems = find_problems(f"{name}.json", header, environment, private)
        return Upload(name, path, size, sha256=sha256), problems
    content = read_regular(path)
    file = Upload(name, path, len(content), content)
    if name == PLOT:
        return file, find_problems(name, png_text(content), environment, Private(names, cure=write_again))
    if name in BINARY_VOCABULARIES:
        text = content.decode("latin-1")
        return file, find_problems(name, text, environment, _in_vocabulary(names))
    try:
        before = content.decode("utf-8")
    except UnicodeDecodeError:
        return file, [Problem(tr("not UTF-8 text"), str(path))]
    if name in VOCABULARIES:
        return file, find_problems(name, before, environment, _in_vocabulary(names))
    if name in TRAINED:
        cure = tr(
            "the model is trained with this text: train it with another, or take it out and say so "
            "on the card"
        )
        private = Private(names, paths=False, words=False, cure=cure)
        return file, find_problems(name, before, environment, private)
    text = before
    if base is not None and base_model is not None:
        text = with_other_base(name, text, base, base_model)
        if name == CARD:
            text = with_other_base(name, text, folder_stand_in(base), base_model)
    hidden_names = names if name in EDITED else ()
    if hide_paths:
        text = without_paths(name, text, hidden_names)
    cure = write_again if hide_paths else HIDE
    problems = find_problems(name, text, environment, Private(hidden_names, cure=cure))
    if name == CARD and base_model is not None:  # after the problems, whose lines are those of the file here
        text = _card_with_base(text, base or "", base_model)
    if text != before:
        content = text.encode()
        file = replace(file, content=content, size=len(content), edited=True)
    return file, problems


def _card_with_base(text: str, base: str, base_model: str) -> str:
    """The card of a model whose base was a local folder, with the base's name on the hub in its front matter, and
    without the note about a folder that this name has replaced."""
    for note in in_every_language(LOCAL_BASE, base=code(folder_stand_in(base))):
        text = text.replace(f"{note.replace(folder_stand_in(base), base_model)}\n\n", "")
    front, end, rest = text.partition("\n---\n")
    if not end or not front.startswith("---\n") or "\nbase_model:" in front:
        return text
    return "---\n" + write_item("base_model", base_model) + front.removeprefix("---\n") + end + rest


def _in_vocabulary(names: Collection[str]) -> Private:
    """Of words and their pieces, only the home directories of this machine's own user are private."""
    return Private(
        names, paths=False, homes_of_names=True, words=False, cure=tr("train the tokenizer without this text")
    )


def _read_weights(path: Path) -> tuple[str, int, str]:
    """The header of a safetensors file, its size and SHA-256, read through one descriptor."""
    digest = hashlib.sha256()
    with open(path, "rb", opener=open_regular) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = file.read(length) if 0 < length <= min(_LONGEST_HEADER, size - 8) else b""
        if not header:
            raise UserError(tr("damaged (no header of safetensors)"), place=str(path))
        digest.update(start + header)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    try:
        text = header.decode("utf-8")
        ends = [entry["data_offsets"][1] for key, entry in json.loads(text).items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(tr("damaged ({error})", error=error), place=str(path)) from None
    if 8 + length + max(ends, default=0) != size:
        what = tr("damaged (it holds more or fewer bytes than its tensors)")
        raise UserError(what, place=str(path), cure=tr("write the file again"))
    return text, size, digest.hexdigest()


def upload(repo: str, uploads: Sequence[Upload], message: str, public: bool, log: Log) -> str:
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
        raise UserError(str(error), place=f"repo {repo}", cure=tr("write owner/name")) from None
    if get_token() is None:
        raise UserError(tr("no token for the hub"), cure=tr("run `hf auth login`, or set HF_TOKEN"))
    api = HfApi(library_name="yeonma")
    try:
        if "/" not in repo:
            repo = f"{api.whoami()['name']}/{repo}"
        try:
            private = bool(api.repo_info(repo).private)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=not public)
            private = bool(api.repo_info(repo).private)
            if private:
                log(tr("{repo} is new, and private", repo=repo))
            else:
                log(tr("{repo} is new, and public", repo=repo))
        if private == public:
            raise _visibility_error(repo, public)
        operations = [
            CommitOperationAdd(file.name, file.path if file.content is None else file.content)
            for file in uploads
        ]
        _check_unchanged(uploads, [operation.upload_info.sha256.hex() for operation in operations])
        commit = api.create_commit(repo, operations, commit_message=message)
        received = {
            info.path: info
            for info in api.get_paths_info(repo, [file.name for file in uploads], revision=commit.oid)
        }
    except HfHubHTTPError as error:
        raise _hub_error(error, repo) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            tr("upload failed: {error}", error=_first_line(error)), place=f"repo {repo}"
        ) from error
    except Exception as error:
        if not _is_connection(error):
            raise
        cure = tr("check the connection and HF_ENDPOINT, and push again")
        raise UserError(
            tr("the hub cannot be reached: {error}", error=_first_line(error)),
            place=f"repo {repo}",
            cure=cure,
        ) from error
    _compare(repo, uploads, received)
    return str(commit.commit_url)


def _visibility_error(repo: str, public: bool) -> UserError:
    """The repository exists, or was created by its owner's rules, with the other visibility."""
    if public:
        what, cure = tr("it is private"), tr("change that in its settings on the hub, or leave out --public")
    else:
        what, cure = (
            tr("it is public"),
            tr("give --public true, make it private on the hub, or choose another name"),
        )
    return UserError(what, place=f"repo {repo}", cure=cure)


def _compare(repo: str, uploads: Iterable[Upload], received: Mapping[str, Any]) -> None:
    """Raises UserError if size or hash of a file on the hub is not that of the file sent."""
    problems = []
    for file in uploads:
        place = f"{repo}/{file.name}"
        info = received.get(file.name)
        if info is None:
            problems.append(Problem(tr("it did not arrive"), place, tr("check the repository's .gitignore")))
        elif info.size != file.size or not _has_hash_of(info, file):
            problems.append(Problem(tr("it differs from the file sent"), place, tr("push again")))
    if problems:
        raise UserError(problems)


def _check_unchanged(uploads: Sequence[Upload], hashes: Sequence[str]) -> None:
    """Raises UserError if what would be sent is not what was scanned: a file was changed or replaced since."""
    problems = [
        Problem(
            tr("it has changed since it was scanned"),
            str(file.path),
            tr("push again when nothing writes to it"),
        )
        for file, sha256 in zip(uploads, hashes, strict=True)
        if file.content is None and (sha256 != file.sha256 or kind_of(file.path) != "file")
    ]
    if problems:
        raise UserError(problems)


def _has_hash_of(info: Any, file: Upload) -> bool:
    """Git LFS names a file by its SHA-256, git by the SHA-1 of its blob."""
    if info.lfs is not None:
        sha256 = file.sha256 if file.content is None else hashlib.sha256(file.content).hexdigest()
        return bool(info.lfs.sha256 == sha256)
    content = read_regular(file.path) if file.content is None else file.content
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return bool(info.blob_id == blob)


def _hub_error(error: Any, repo: str) -> UserError:
    status = int(error.response.status_code)
    cures = {
        401: tr("log in again with `hf auth login`, or set HF_TOKEN"),
        403: tr("use a token that may write there"),
        404: tr("check the name, and use a token that may write there"),
        409: tr("somebody else pushed meanwhile: push again"),
        429: tr("wait, and push again"),
    }
    what = tr("the hub refused the upload ({status}): {error}", status=status, error=_first_line(error))
    return UserError(what, place=f"repo {repo}", cure=cures.get(status, ""))


def _is_connection(error: Exception) -> bool:
    """Whether it is an error of the HTTP library that huggingface_hub uses, whichever that is."""
    return any(kind.__name__ in ("HTTPError", "TransportError") for kind in type(error).__mro__)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
