"""What the reference model gives every answer: computed once before training, kept on disk, never a second model.

The reference is the base without its adapter or, where an adapter is continued, that adapter as it was at the start.
One file in the cache holds the log-probabilities of a token store's examples; those not needed so far are NaN there, so
that a run which needs more of them computes the rest alone. A run that is killed meanwhile keeps what it has.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from yeonma.adapter.adapter_folder import WEIGHTS, BaseIdentity
from yeonma.config.settings import Quantization
from yeonma.errors import Log, UserError
from yeonma.files import file_hash, sync
from yeonma.model.forest_support import in_eval_mode
from yeonma.model.logprobs import ForestSupport
from yeonma.model.quantization import quantised_by
from yeonma.model.source import BaseSource
from yeonma.tokenization.store import TokenStore
from yeonma.train.distributed import Processes, sum_over
from yeonma.train.losses import answer_logprobs
from yeonma.train.oom_retry import MicroBatchLimit
from yeonma.train.step import RankInfo, micro_batch_passes, pass_logprobs

FORMAT = 1
"""Raised whenever the same rows would get other numbers or another file."""

ROUND_TOKENS = 100_000
"""Tokens a process computes between two meetings of all processes; what is done by then is on disk."""


def reference_identity(
    source: BaseSource,
    base: BaseIdentity,
    continued: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = "none",
) -> str:
    """SHA-256 of all that decides what the reference gives some tokens: weights, config, adapter, number format and the
    versions of the libraries.

    Reads the weight files of a local model; a model of the hub is known by its commit.
    """
    folder = Path(source.name)
    weights = [file_hash(path) for path in sorted(folder.glob("*.safetensors"))] if folder.is_dir() else []
    named = None if weights else [base.name, base.revision]
    adapter = (
        [file_hash(Path(continued) / name) for name in (WEIGHTS, "adapter_config.json")]
        if continued
        else None
    )
    versions = [version(package) for package in ("torch", "transformers", "peft")]
    content = [FORMAT, weights, named, base.config_sha256, adapter, str(dtype), device.type, versions]
    content += [quantised_by(quantization)] if quantization != "none" else []
    return sha256(json.dumps(content).encode()).hexdigest()


def reference_path(cache_dir: Path, identity: str, store: TokenStore) -> Path:
    return cache_dir / f"{sha256(f'{identity}{store.key}'.encode()).hexdigest()}.reference"


def reference_logprobs(
    model: Any,
    how: ForestSupport,
    store: TokenStore,
    units: np.ndarray,
    *,
    identity: str,
    cache_dir: Path,
    room: MicroBatchLimit,
    group: Processes,
    say: Log,
) -> np.ndarray:
    """float64 (examples,): the log-probability of the answers of the examples of `units`; NaN for others.

    `model` is the reference as it stands; it is asked with dropout off. What the cache does not hold is computed, every
    process its share, and written there by the first. What the cache holds may come from a run with other
    micro-batches, and is then equal to rounding only. Only the first process needs `identity` and `cache_dir`.
    Raises UserError where the cache cannot be written.
    """
    path = reference_path(cache_dir, identity, store)
    known = np.zeros(len(store))
    if group.first:
        found = _read(path, len(store))
        known = np.full(len(store), np.nan) if found is None else found
    known = summed(known, group, model.device)  # the others' zeros: all know what the first knows
    missing = units[np.isin(units, store.units[np.isnan(known)])]
    if not len(missing):
        return known
    done, company = 0, RankInfo(group.rank, group.count, not room.alone)
    with torch.no_grad(), in_eval_mode(model):
        # the borders are those of all, so that a pass which was killed goes on with the same micro-batches
        for whole in _rounds(units, store.unit_lengths, ROUND_TOKENS * group.count):
            part = whole[np.isin(whole, missing)]
            if not len(part):
                continue
            of_part = store.examples_of(part)

            def mine(part: np.ndarray = part, spare: int = int(of_part[0])) -> np.ndarray:
                fresh = np.zeros(len(store))
                for turn in micro_batch_passes(
                    store, part, store.examples_of, room.micro, company, how.forest
                ):
                    logprob_N = pass_logprobs(model, how, store, turn, spare, room.micro.share_prefix)
                    if len(turn.examples):
                        sums = answer_logprobs(logprob_N.double(), store.trained_counts[turn.examples])
                        fresh[turn.examples] = sums.cpu().numpy()
                return fresh

            fresh = room.fit(mine, store, part)
            known[of_part] = summed(fresh, group, model.device)[of_part]
            done += len(part)
            if group.first:
                write_reference(path, known)
            say(f"reference: {done:,} of {len(missing):,} computed")
    return known


def _rounds(units: np.ndarray, unit_lengths: np.ndarray, most_tokens: int) -> Iterator[np.ndarray]:
    """The units in parts of about so many tokens."""
    ends = np.cumsum(unit_lengths[units], dtype=np.int64)
    numbers = ends // most_tokens
    yield from np.split(units, np.flatnonzero(np.diff(numbers)) + 1)


def summed(values: np.ndarray, group: Processes, device: torch.device) -> np.ndarray:
    """Over all processes."""
    if group.count == 1:
        return values
    return sum_over(group, torch.from_numpy(values).to(device)).cpu().numpy()


def _read(path: Path, count: int) -> np.ndarray | None:
    """What a file holds; None where there is none, or it is damaged."""
    try:
        with safe_open(path, "np") as file:
            values: np.ndarray = file.get_tensor("logprobs")
            whole = file.metadata().get("crc32") == str(zlib.crc32(values.tobytes()))
    except (OSError, SafetensorError, KeyError, AttributeError):
        return None
    return values if whole and values.shape == (count,) and values.dtype == np.float64 else None


def write_reference(path: Path, values: np.ndarray) -> None:
    """Raises UserError where it cannot be kept. Beside its place, flushed to the disk, renamed."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logprobs": values}, beside, {"crc32": str(zlib.crc32(values.tobytes()))})
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        what = f"the reference's log-probabilities cannot be kept here: {error}"
        raise UserError(what, place=str(path.parent), cure="name another folder with --cache_dir") from error
    finally:
        beside.unlink(missing_ok=True)
