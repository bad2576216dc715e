"""The log-probabilities that the reference gives the answers: computed before training, without a second model, and
cached on disk.

The reference is the base without its adapter or, where training continues an adapter, that adapter as it was at the
start. The cache has one file per token store and reference. Examples that no run has needed are NaN there; a run that
needs more computes only the rest. A killed run keeps what it has computed.
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
from yeonma.batch.batch import Batch
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
"""Increased whenever the same rows would get other numbers or another file."""

ROUND_TOKENS = 100_000
"""Tokens that each process computes before all exchange their results and the first process writes them to disk."""


def reference_identity(
    source: BaseSource,
    base: BaseIdentity,
    continued: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = "none",
) -> str:
    """SHA-256 of everything that the reference's log-probabilities depend on besides the tokens: weights, config,
    adapter, number format and library versions.

    Reads the weight files of a local model; a hub model is identified by its commit.
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
    support: ForestSupport,
    store: TokenStore,
    units: np.ndarray,
    *,
    identity: str,
    cache_dir: Path,
    limit: MicroBatchLimit,
    group: Processes,
    say: Log,
) -> np.ndarray:
    """float64 (examples of the store,): the log-probability of the whole answer of each example of `units`, with
    dropout off; NaN for other examples, unless the cache holds them.

    `model` is the reference as it stands. What the cache lacks is computed, each process its share, and written there
    by the first process, which alone needs `identity` and `cache_dir`. Cached numbers may come from a run with other
    micro-batches, and are then equal to rounding only. Raises UserError where the cache cannot be written.
    """
    path = reference_path(cache_dir, identity, store)
    known = np.zeros(len(store))
    if group.first:
        cached = _read(path, len(store))
        known = np.full(len(store), np.nan) if cached is None else cached
    known = _summed(known, group, model.device)  # zeros from the others: all know what the first has read
    missing = units[np.isin(units, store.units[np.isnan(known)])]
    if not len(missing):
        return known
    done, ranks = 0, RankInfo(group.rank, group.count, limit.sharded)
    with torch.no_grad(), in_eval_mode(model):
        # rounds of all units, so that a run that was killed continues with the same micro-batches
        for whole_round in _rounds(units, store.unit_lengths, ROUND_TOKENS * group.count):
            part = whole_round[np.isin(whole_round, missing)]
            if not len(part):
                continue
            batch = Batch.from_store(store, part)

            def own_share(batch: Batch = batch) -> np.ndarray:
                computed = np.zeros(len(store))
                for micro_pass in micro_batch_passes(batch, limit.bounds, ranks, support.forest):
                    logprob_N = pass_logprobs(model, support, micro_pass, limit.bounds.share_prefix)
                    if len(micro_pass.batch):
                        sums = answer_logprobs(logprob_N.double(), micro_pass.batch.trained_counts_E)
                        computed[micro_pass.batch.index_E] = sums.cpu().numpy()
                return computed

            computed = _summed(limit.fit(own_share, batch), group, model.device)
            known[batch.index_E] = computed[batch.index_E]
            done += len(part)
            if group.first:
                write_reference(path, known)
            say(f"reference: {done:,} of {len(missing):,} computed")
    return known


def _rounds(units: np.ndarray, unit_lengths: np.ndarray, most_tokens: int) -> Iterator[np.ndarray]:
    """The units in parts of about `most_tokens` tokens."""
    ends = np.cumsum(unit_lengths[units], dtype=np.int64)
    numbers = ends // most_tokens
    yield from np.split(units, np.flatnonzero(np.diff(numbers)) + 1)


def _summed(values: np.ndarray, group: Processes, device: torch.device) -> np.ndarray:
    """The sum over all processes."""
    if group.count == 1:
        return values
    return sum_over(group, torch.from_numpy(values).to(device)).cpu().numpy()


def _read(path: Path, count: int) -> np.ndarray | None:
    """The file's log-probabilities; None where there is no file, or it is damaged."""
    try:
        with safe_open(path, "np") as file:
            values: np.ndarray = file.get_tensor("logprobs")
            whole = file.metadata().get("crc32") == str(zlib.crc32(values.tobytes()))
    except (OSError, SafetensorError, KeyError, AttributeError):
        return None
    return values if whole and values.shape == (count,) and values.dtype == np.float64 else None


def write_reference(path: Path, values: np.ndarray) -> None:
    """Write to a temporary file, flush it to disk, rename it. Raises UserError where that fails."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logprobs": values}, partial, {"crc32": str(zlib.crc32(values.tobytes()))})
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        what = f"the reference's log-probabilities cannot be written here: {error}"
        raise UserError(what, place=str(path.parent), cure="give another folder with --cache_dir") from error
    finally:
        partial.unlink(missing_ok=True)
