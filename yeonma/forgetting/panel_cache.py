"""What a model was asked about general questions, on disk: one file per model in the cache folder.

A base is asked once, whatever is trained on it. The file holds JSON values by keys of `panel.py`; a damaged one counts
as empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from yeonma.files import replace_file
from yeonma.forgetting.panel import Known

FORMAT = 1
"""Increase it when a model's answers to the same tokens, or the file, change."""
ENDING = "general"


@contextmanager
def panel_cache(cache_dir: Path, identity: str) -> Iterator[Known]:
    """What is known of the model with this identity (its weights, number format and libraries). What the block adds is
    written at its end. A cache that cannot be written only costs time."""
    path = cache_dir / f"{sha256(f'{FORMAT} {identity}'.encode()).hexdigest()}.{ENDING}"
    known = _read(path)
    count = len(known)
    yield known
    if len(known) > count:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({**_read(path), **known}).encode())


def _read(path: Path) -> Known:
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if _is_answer(value) or _is_scores(value)}


def _is_answer(value: object) -> bool:
    """Token ids of an answer."""
    return isinstance(value, list) and all(type(number) is int for number in value)


def _is_scores(value: object) -> bool:
    """Counts and log-probabilities, a list of each."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, list) and len(part) == len(value[0]) > 0 for part in value)
        and all(type(number) in (int, float) for part in value for number in part)
    )
