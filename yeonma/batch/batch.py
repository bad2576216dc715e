"""Batch: the examples of a step and all numbers that a loss reads, from a token store or made in memory.

Shapes: E examples in U units, N trained tokens, counted once per example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.batch.forest import Forest, lay_out
from yeonma.tokenization.example import AnswerRole, Example
from yeonma.tokenization.store import TokenStore

Extras = Mapping[str, NDArray[np.float64]]
"""Name -> numbers that a loss reads."""
TOKEN_WEIGHT = "weight"
"""Token extra: the weight of a trained token in the supervised loss."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples, unit by unit. Made by `Batch.from_store` and `Batch.of`.

    The tokens of example i are `flat_token_ids[starts_E[i] : starts_E[i] + lengths_E[i]]`, at positions 0, 1, 2, ...
    The flat arrays are shared with the store and with parts of the batch, without copying.
    """

    flat_token_ids: NDArray[np.int32]
    flat_trained: NDArray[np.bool_]
    """Whether the token is a training target. The first token of an example never is."""
    starts_E: NDArray[np.int64]
    lengths_E: NDArray[np.int32]
    prompt_lengths_E: NDArray[np.int32]
    """Tokens before the answer."""
    trained_counts_E: NDArray[np.int32]
    index_E: NDArray[np.int64]
    """The position of the example in the store, or in the list of `Batch.of`."""
    units_E: NDArray[np.int64]
    """The unit of the example: an index into U, ascending."""
    roles_E: NDArray[np.uint8]
    """Values of `AnswerRole`."""
    rows_E: NDArray[np.int64]
    """Row numbers, from 1."""
    unit_lengths_U: NDArray[np.int64]
    """Tokens of the unit's examples, with their common prompt counted once."""
    unit_rows_U: NDArray[np.int64]
    """The row number of the unit."""
    example_extras: Extras = field(default_factory=dict)
    """Shape (E,), such as reference log-probabilities or advantages."""
    token_extras: Extras = field(default_factory=dict)
    """Shape (N,), in the order of logprob_N, such as log-probabilities at the time of sampling."""
    flat_input_keys: NDArray[np.int64] | None = None
    """Integers that stand for what the model sees at a token besides its id, such as the hash of an image patch. Equal
    keys mean equal input. None: the model sees ids alone."""

    @staticmethod
    def from_store(
        store: TokenStore, units: NDArray[np.int64], example_extras: Extras | None = None
    ) -> Batch:
        """The given units of a store, in this order. `example_extras`: arrays over all examples of the store."""
        examples = store.examples_of(units)
        sizes = np.ones(len(units), dtype=np.int64)
        if store.counts.units != len(store):
            sizes = store.unit_starts[units + 1] - store.unit_starts[units]
        rows = store.row_numbers[examples]
        weights = store.weights_of(examples)
        return Batch(
            flat_token_ids=store.token_ids,
            flat_trained=store.trained,
            starts_E=store.starts[examples],
            lengths_E=store.lengths[examples],
            prompt_lengths_E=store.prompt_lengths[examples],
            trained_counts_E=store.trained_counts[examples],
            index_E=examples,
            units_E=np.repeat(np.arange(len(units)), sizes),
            roles_E=store.roles[examples],
            rows_E=rows,
            unit_lengths_U=store.unit_lengths[units].astype(np.int64),
            unit_rows_U=rows[np.cumsum(sizes) - sizes],
            example_extras={name: values[examples] for name, values in (example_extras or {}).items()},
            token_extras={} if weights is None else {TOKEN_WEIGHT: weights},
        )

    @staticmethod
    def of(
        examples: Sequence[Example],
        *,
        units: Sequence[int] | None = None,
        roles: Sequence[AnswerRole] | None = None,
        example_extras: Mapping[str, Any] | None = None,
        token_extras: Mapping[str, Any] | None = None,
        input_keys: Sequence[NDArray[np.int64]] | None = None,
    ) -> Batch:
        """A batch of examples in memory (at least one), such as sampled answers.

        `units`: a number per example, equal within a unit, whose examples must be adjacent; by default, every example
        is a unit of its own. `roles` are ANSWER by default. The extras are sequences of numbers of shape (E,) and (N,).
        Raises ValueError if shapes do not match, a unit is not contiguous, or a first token is trained.
        """
        count = len(examples)
        unit_numbers = np.arange(count) if units is None else np.asarray(units)
        begins_unit = np.ones(count, dtype=np.bool_)
        begins_unit[1:] = unit_numbers[1:] != unit_numbers[:-1]
        firsts = np.flatnonzero(begins_unit)
        if len(firsts) != len(set(unit_numbers.tolist())):
            raise ValueError("the examples of a unit must be adjacent")
        if any(example.trained[:1].any() for example in examples):
            raise ValueError("the first token of an example cannot be trained: no token precedes it")
        lengths = np.array([len(example.token_ids) for example in examples], dtype=np.int32)
        prompt_lengths = np.array([example.prompt_length for example in examples], dtype=np.int32)
        trained_counts = np.array([np.count_nonzero(example.trained) for example in examples], dtype=np.int32)
        rows = np.array([example.row for example in examples], dtype=np.int64)
        weights = _weights_of(examples)
        token_extras = {**({} if weights is None else {TOKEN_WEIGHT: weights}), **(token_extras or {})}
        roles_E = np.full(count, AnswerRole.ANSWER, np.uint8) if roles is None else np.array(roles, np.uint8)
        return Batch(
            flat_token_ids=np.concatenate([example.token_ids for example in examples]),
            flat_trained=_flat([example.trained for example in examples], lengths),
            starts_E=np.cumsum(lengths, dtype=np.int64) - lengths,
            lengths_E=lengths,
            prompt_lengths_E=prompt_lengths,
            trained_counts_E=trained_counts,
            index_E=np.arange(count),
            units_E=np.cumsum(begins_unit) - 1,
            roles_E=_check_shape(roles_E, count, "roles"),
            rows_E=rows,
            unit_lengths_U=(
                np.add.reduceat(lengths - prompt_lengths, firsts) + prompt_lengths[firsts]
            ).astype(np.int64),
            unit_rows_U=rows[firsts],
            example_extras=_numbers(example_extras, count),
            token_extras=_numbers(token_extras, int(trained_counts.sum())),
            flat_input_keys=None if input_keys is None else _flat(input_keys, lengths),
        )

    def __len__(self) -> int:
        """The number of examples, E."""
        return len(self.lengths_E)

    @property
    def unit_count(self) -> int:
        """The number of units, U."""
        return len(self.unit_lengths_U)

    @property
    def trained_tokens(self) -> int:
        """The number of trained tokens, N."""
        return int(self.trained_counts_E.sum())

    @property
    def trained_weight(self) -> float:
        """The sum of the trained tokens' weights; N if all weigh 1."""
        weights = self.token_extras.get(TOKEN_WEIGHT)
        return self.trained_tokens if weights is None else float(weights.sum())

    @property
    def token_ids(self) -> list[NDArray[np.int32]]:
        """One view per example of its token ids; `trained` and `input_keys` likewise."""
        return self._by_example(self.flat_token_ids)

    @property
    def trained(self) -> list[NDArray[np.bool_]]:
        return self._by_example(self.flat_trained)

    @property
    def input_keys(self) -> list[NDArray[np.int64]] | None:
        return None if self.flat_input_keys is None else self._by_example(self.flat_input_keys)

    def select_units(self, units: Sequence[int] | NDArray[np.int64]) -> Batch:
        """A batch of the given units, which are indices into U."""
        indices = np.asarray(units, dtype=np.int64)
        starts, ends = (np.searchsorted(self.units_E, indices, side) for side in ("left", "right"))
        return replace(
            self._select(_ranges(starts, ends)),
            units_E=np.repeat(np.arange(len(indices)), ends - starts),
            unit_lengths_U=self.unit_lengths_U[indices],
            unit_rows_U=self.unit_rows_U[indices],
        )

    def with_example_extras(self, extras: Extras) -> Batch:
        """The batch with more extras."""
        return replace(self, example_extras={**self.example_extras, **extras})

    def with_token_extras(self, extras: Extras) -> Batch:
        return replace(self, token_extras={**self.token_extras, **extras})

    def with_answers_of(self, others: NDArray[np.int64], most_tokens: int) -> Batch:
        """Examples in memory, each a unit of its own: the prompt of example i with the answer of example `others[i]`,
        cut to `most_tokens`, one answer token at least. Roles, rows and example extras are those of the prompts'
        examples."""
        prompts = np.arange(len(others))
        keys = self.flat_input_keys
        token_ids, trained, input_keys = list[Any](), list[Any](), list[Any]()
        for prompt, other in zip(prompts.tolist(), others.tolist(), strict=True):
            start, other_start = int(self.starts_E[prompt]), int(self.starts_E[other])
            split, other_split = int(self.prompt_lengths_E[prompt]), int(self.prompt_lengths_E[other])
            other_end = other_start + int(self.lengths_E[other])
            most = max(most_tokens, split + 1)

            def joined(
                flat: NDArray[Any],
                prompt: slice = slice(start, start + split),
                answer: slice = slice(other_start + other_split, other_end),
                most: int = most,
            ) -> NDArray[Any]:
                return np.concatenate([flat[prompt], flat[answer]])[:most]

            token_ids.append(joined(self.flat_token_ids))
            trained.append(joined(self.flat_trained))
            trained[-1][: max(split, 1)] = False
            input_keys += [] if keys is None else [joined(keys)]
        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int32)
        empty = np.zeros(0, dtype=np.int32)
        rows = self.rows_E[prompts]
        return Batch(
            flat_token_ids=np.concatenate([empty, *token_ids]),
            flat_trained=np.concatenate([empty.astype(np.bool_), *trained]),
            starts_E=np.cumsum(lengths, dtype=np.int64) - lengths,
            lengths_E=lengths,
            prompt_lengths_E=self.prompt_lengths_E[prompts],
            trained_counts_E=np.array([mask.sum() for mask in trained], dtype=np.int32),
            index_E=prompts,
            units_E=prompts,
            roles_E=self.roles_E[prompts],
            rows_E=rows,
            unit_lengths_U=lengths.astype(np.int64),
            unit_rows_U=rows,
            example_extras={name: values[prompts] for name, values in self.example_extras.items()},
            flat_input_keys=None if keys is None else np.concatenate([np.zeros(0, np.int64), *input_keys]),
        )

    def forest(self, *, share_prefix: bool) -> Forest:
        return lay_out(
            self.token_ids,
            self.trained,
            share_prefix=share_prefix,
            units=self.units_E,
            input_keys=self.input_keys,
        )

    def _by_example(self, flat: NDArray[Any]) -> list[NDArray[Any]]:
        ends = self.starts_E + self.lengths_E
        return [flat[start:end] for start, end in zip(self.starts_E.tolist(), ends.tolist(), strict=True)]

    def _select(self, examples: NDArray[np.int64]) -> Batch:
        token_extras: Extras = {}
        if self.token_extras:
            ends = np.cumsum(self.trained_counts_E, dtype=np.int64)
            tokens = _ranges((ends - self.trained_counts_E)[examples], ends[examples])
            token_extras = {name: values[tokens] for name, values in self.token_extras.items()}
        return replace(
            self,
            starts_E=self.starts_E[examples],
            lengths_E=self.lengths_E[examples],
            prompt_lengths_E=self.prompt_lengths_E[examples],
            trained_counts_E=self.trained_counts_E[examples],
            index_E=self.index_E[examples],
            units_E=self.units_E[examples],
            roles_E=self.roles_E[examples],
            rows_E=self.rows_E[examples],
            example_extras={name: values[examples] for name, values in self.example_extras.items()},
            token_extras=token_extras,
        )


def _weights_of(examples: Sequence[Example]) -> NDArray[np.float64] | None:
    """The weights of the trained tokens, shape (N,); None if all are 1."""
    if all(example.weights is None for example in examples):
        return None
    parts = [
        np.ones(np.count_nonzero(example.trained))
        if example.weights is None
        else example.weights[example.trained]
        for example in examples
    ]
    return np.concatenate(parts).astype(np.float64)


def _ranges(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The concatenated ranges start, start + 1, ..., end - 1."""
    pieces = [np.arange(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces])


def _check_shape(values: NDArray[Any], count: int, name: str) -> NDArray[Any]:
    if values.shape != (count,):
        raise ValueError(f"{name} has shape {values.shape}; expected ({count},)")
    return values


def _numbers(extras: Mapping[str, Any] | None, count: int) -> Extras:
    items = (extras or {}).items()
    return {name: _check_shape(np.asarray(values, dtype=np.float64), count, name) for name, values in items}


def _flat(arrays: Sequence[NDArray[Any]], lengths: NDArray[np.int32]) -> NDArray[Any]:
    if [len(array) for array in arrays] != lengths.tolist():
        raise ValueError("expected one value per token")
    return np.concatenate(arrays)
