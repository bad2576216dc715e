"""The reference's log-probabilities of the answers: computed before training, without a second model, and cached on
disk.

The reference is the base without an adapter or, if training continues an adapter, that adapter as it was at the start.
The cache has one file per token store and reference, with NaN for examples that are not computed yet. A run computes
only what is missing, and a killed run keeps what it has computed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from yeonma.adapter.adapter_folder import BaseIdentity
from yeonma.batch.batch import Batch
from yeonma.config.settings import Quantization
from yeonma.errors import Log, UserError, system_reason
from yeonma.files import sync
from yeonma.messages import tr
from yeonma.model.base_content import known_hash
from yeonma.model.forest_support import in_eval_mode
from yeonma.model.logprobs import ForestSupport
from yeonma.model.source import BaseSource
from yeonma.model.weights_identity import identity_of
from yeonma.tokenization.store import TokenStore
from yeonma.train.distributed import Processes, sum_over
from yeonma.train.losses import answer_logprobs
from yeonma.train.oom_retry import MicroBatchLimit
from yeonma.train.step import RankInfo, micro_batch_passes, pass_logprobs

FORMAT = 2
"""Increase it when the numbers for the same rows, or the file, change."""

ROUND_TOKENS = 100_000
"""Tokens per process after which all processes exchange their results and rank 0 writes them to disk."""


def reference_identity(
    source: BaseSource,
    base: BaseIdentity,
    continued: str | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization = "none",
    cache_dir: Path | None = None,
) -> str:
    """SHA-256 of everything that the reference's log-probabilities depend on besides the tokens: weights, config,
    adapter, number format and library versions.

    Reads the weight files of a local model, unless their SHA-256 is known; a hub model is identified by its commit.
    `cache_dir`: where such sums are kept, by default in the user's cache.
    """
    folder = Path(source.name)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    weights = [known_hash(path, cache_dir) for path in files]
    hub_name = None if weights else [base.name, base.revision]
    named = [FORMAT, weights, hub_name, base.config_sha256]
    return identity_of(named, continued or None, dtype, device, quantization)


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
    log: Log,
) -> np.ndarray:
    """The log-probability of the whole answer of each example of `units`, without dropout: float64, of shape (examples
    of the store,). Other examples are NaN, unless the cache has them.

    `model` is the reference. Each process computes its share of what the cache does not have; rank 0, which alone needs
    `identity` and `cache_dir`, writes the results there. Cached numbers may come from a run with other micro-batches,
    and are then equal only to rounding. Raises UserError if the cache cannot be written.
    """
    path = reference_path(cache_dir, identity, store)
    known = np.zeros(len(store))
    if group.first:
        cached = _read(path, len(store))
        known = np.full(len(store), np.nan) if cached is None else cached
    known = _summed(known, group, model.device)  # the other ranks add zeros, and get what rank 0 has read
    missing = units[np.isin(units, store.units[np.isnan(known)])]
    if not len(missing):
        return known
    done, ranks = 0, RankInfo(group.rank, group.count, limit.sharded)
    with torch.no_grad(), in_eval_mode(model):
        # rounds contain cached units too, so that a resumed run forms the same rounds
        for whole_round in _rounds(units, store.unit_lengths, ROUND_TOKENS * group.count):
            part = whole_round[np.isin(whole_round, missing)]
            if not len(part):
                continue
            batch = Batch.from_store(store, part)

            def compute_share(batch: Batch = batch) -> np.ndarray:
                computed = np.zeros(len(store))
                sums: list[tuple[np.ndarray, torch.Tensor]] = []
                for micro_pass in micro_batch_passes(batch, limit.bounds, ranks, support.forest):
                    logprob_N = pass_logprobs(model, support, micro_pass, limit.bounds.share_prefix)
                    if len(micro_pass.batch):
                        sum_E = answer_logprobs(logprob_N.double(), micro_pass.batch.trained_counts_E)
                        sums.append((micro_pass.batch.index_E, sum_E))
                for index_E, sum_E in sums:  # at the end, because every read waits for the GPU
                    computed[index_E] = sum_E.cpu().numpy()
                return computed

            computed = _summed(limit.fit(compute_share, batch), group, model.device)
            known[batch.index_E] = computed[batch.index_E]
            done += len(part)
            if group.first:
                write_reference(path, known)
            log(tr("reference: {done:,} of {missing:,} computed", done=done, missing=len(missing)))
    return known


def _rounds(units: np.ndarray, unit_lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Splits the units into rounds of about `max_tokens` tokens."""
    ends = np.cumsum(unit_lengths[units], dtype=np.int64)
    round_numbers = ends // max_tokens
    yield from np.split(units, np.flatnonzero(np.diff(round_numbers)) + 1)


def _summed(values: np.ndarray, group: Processes, device: torch.device) -> np.ndarray:
    """The sum over all processes."""
    if group.count == 1:
        return values
    return sum_over(group, torch.from_numpy(values).to(device)).cpu().numpy()


def _read(path: Path, count: int) -> np.ndarray | None:
    """The log-probabilities in the file; None if it is missing or damaged."""
    try:
        with safe_open(path, "np") as file:
            values: np.ndarray = file.get_tensor("logprobs")
            is_intact = file.metadata().get("crc32") == str(zlib.crc32(values.tobytes()))
    except (OSError, SafetensorError, KeyError, AttributeError):
        return None
    return values if is_intact and values.shape == (count,) and values.dtype == np.float64 else None


def write_reference(path: Path, values: np.ndarray) -> None:
    """Writes the file atomically and syncs it to disk. Raises UserError if that fails."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # a link of that name would be followed
        save_file({"logprobs": values}, partial, {"crc32": str(zlib.crc32(values.tobytes()))})
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        what = tr(
            "the reference's log-probabilities cannot be written here: {error}", error=system_reason(error)
        )
        raise UserError(
            what, place=str(path.parent), cure=tr("give another folder with --cache_dir")
        ) from error
    finally:
        partial.unlink(missing_ok=True)
