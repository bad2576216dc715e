"""Examples on disk: a folder of flat arrays, written once, then memory-mapped. No pickle."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from yeonma.data.columns import UnusedColumn
from yeonma.data.text_checks import Notes
from yeonma.files import sync
from yeonma.tokenization.chat_remarks import ChatRemarks
from yeonma.tokenization.example import AnswerRole, Example, LeftOut, Unit
from yeonma.tokenization.store_lock import META, BeingDeleted, StoreInUse, use_store

# One value per trained token of the examples that have weights.
_WEIGHT_ARRAYS: dict[str, str] = {"weights": "<f4"}
# One value per token.
_TOKEN_ARRAYS: dict[str, str] = {"token_ids": "<i4", "trained": "?"}
# One value per example.
_EXAMPLE_ARRAYS: dict[str, str] = {
    "starts": "<i8",
    "lengths": "<i4",
    "prompt_lengths": "<i4",
    "trained_counts": "<i4",
    "row_numbers": "<i8",
    "variants": "<i4",
    "cut_characters": "<i8",
    "dropped_turns": "<i4",
    "straddles": "?",
    "special_text": "<i4",
    "weight_starts": "<i8",
    "units": "<i8",
    "roles": "|u1",
}
# One value per row read, left out or not.
_ROW_ARRAYS: dict[str, str] = {
    "row_flags": "<u4",
    "row_scripts": "<u4",
    "row_digests": "<u8",
    "prompt_digests": "<u8",
}
_ARRAYS = {**_WEIGHT_ARRAYS, **_TOKEN_ARRAYS, **_EXAMPLE_ARRAYS, **_ROW_ARRAYS}
_LEFT_OUT = "left_out.jsonl"
_BYTES_PER_READ = 1 << 20
_VALUES_PER_PIECE = 1 << 18


@dataclass(frozen=True)
class Counts:
    """Totals of a store."""

    rows: int = 0
    examples: int = 0
    units: int = 0
    """What a step counts: examples or, in preference data, pairs or labelled answers."""
    tokens: int = 0
    trained_tokens: int = 0
    shortened: int = 0
    """Examples with a shortened prompt field, or without old turns."""
    cut_characters: int = 0
    dropped_turns: int = 0
    """Old turns of conversations that were dropped."""
    left_out: int = 0
    straddles: int = 0
    special_text: int = 0
    """Special-token texts in the data that were encoded as ordinary text."""
    variants: tuple[int, ...] = ()
    """Number of examples by variant of the template."""


@dataclass(frozen=True)
class TokenStore:
    """Examples on disk. The arrays are memory-mapped: reading an example reads only its pages."""

    folder: Path
    key: str
    counts: Counts
    number_columns: tuple[tuple[str, str], ...]
    """(column, `numbers` or `booleans`) for the columns of texts that hold such values, written as text."""
    remarks: ChatRemarks
    """What the chat template adds and ignores."""
    unused: tuple[UnusedColumn, ...]
    """The columns of prompts that the template does not use, and that some rows fill."""
    in_use: StoreInUse = field(repr=False, compare=False)
    """Keeps other processes from deleting the folder."""
    token_ids: NDArray[np.int32]
    """Shape (tokens of all examples,); example i begins at `starts[i]`."""
    trained: NDArray[np.bool_]
    """Shape (tokens of all examples,)."""
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    """Number of tokens. Shape (examples,), like the arrays below."""
    prompt_lengths: NDArray[np.int32]
    trained_counts: NDArray[np.int32]
    row_numbers: NDArray[np.int64]
    variants: NDArray[np.int32]
    cut_characters: NDArray[np.int64]
    dropped_turns: NDArray[np.int32]
    straddles: NDArray[np.bool_]
    special_text: NDArray[np.int32]
    weight_starts: NDArray[np.int64]
    """Where an example's weights begin in `weights`; -1 if all its tokens weigh 1."""
    weights: NDArray[np.float32]
    """Shape (trained tokens of the examples with weights,)."""
    units: NDArray[np.int64]
    """The unit of an example, from 0; the examples of a unit are adjacent."""
    roles: NDArray[np.uint8]
    """Values of `AnswerRole`."""
    row_flags: NDArray[np.uint32]
    """Shape (rows read,), like the arrays below; row n is at index n - 1. Bits: see `yeonma.data.text_checks`."""
    row_scripts: NDArray[np.uint32]
    row_digests: NDArray[np.uint64]
    prompt_digests: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        return self.example(index)

    def example(self, index: int) -> Example:
        """The example at `index`, from 0; its arrays are read-only views of the store."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start = int(self.starts[index])
        end = start + int(self.lengths[index])
        return Example(
            token_ids=self.token_ids[start:end],
            trained=self.trained[start:end],
            prompt_length=int(self.prompt_lengths[index]),
            row=int(self.row_numbers[index]),
            variant=int(self.variants[index]),
            cut_characters=int(self.cut_characters[index]),
            dropped_turns=int(self.dropped_turns[index]),
            weights=self._weights_of(index, start, end),
            straddles=bool(self.straddles[index]),
            special_text=int(self.special_text[index]),
        )

    def _weights_of(self, index: int, start: int, end: int) -> NDArray[np.float32] | None:
        first = int(self.weight_starts[index])
        if first < 0:
            return None
        weights = np.ones(end - start, dtype=np.float32)
        trained = self.trained[start:end]
        weights[trained] = self.weights[first : first + int(self.trained_counts[index])]
        return weights

    def weights_of(self, examples: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """The weights of these examples' trained tokens, example by example, shape (N,); None if all are 1."""
        firsts = self.weight_starts[examples]
        if not (firsts >= 0).any():
            return None
        counts = self.trained_counts[examples]
        parts = [
            np.ones(count) if first < 0 else self.weights[first : first + count]
            for first, count in zip(firsts.tolist(), counts.tolist(), strict=True)
        ]
        return np.concatenate(parts).astype(np.float64)

    @cached_property
    def unit_starts(self) -> NDArray[np.int64]:
        """Shape (units + 1,): the first example of every unit, then the number of examples."""
        return np.searchsorted(self.units, np.arange(self.counts.units + 1)).astype(np.int64)

    @cached_property
    def unit_lengths(self) -> NDArray[np.int32]:
        """Shape (units,): tokens of a unit's examples, with the shared prompt counted once."""
        if self.counts.units == len(self):
            return self.lengths
        answers, starts = self.lengths - self.prompt_lengths, self.unit_starts[:-1]
        return np.add.reduceat(answers, starts) + self.prompt_lengths[starts]

    def examples_of(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of the examples of these units, unit by unit."""
        if self.counts.units == len(self):
            return units
        starts = self.unit_starts
        members = [np.arange(starts[unit], starts[unit + 1]) for unit in units]
        return np.concatenate([np.empty(0, np.int64), *members])

    def rows_of(self, units: NDArray[np.int64]) -> list[int]:
        """The row numbers of these units. A row may have several units: a turn list may have one per answer."""
        firsts = units if self.counts.units == len(self) else self.unit_starts[units]
        return [int(row) for row in self.row_numbers[firsts]]

    @property
    def left_out(self) -> list[LeftOut]:
        """The rows left out. Every access reads them from disk."""
        with open(self.folder / _LEFT_OUT, encoding="utf-8") as lines:
            return [LeftOut(**json.loads(line)) for line in lines]


@dataclass
class StoreWriter:
    """Appends examples to the files of a folder; `finish` makes the folder a store.

    `number_columns`: as in TokenStore, without an order; add to it. `remarks`: as in TokenStore; set it.
    `unused`: by their names; add to it, also columns that turn out to be empty.

    Raises OSError if it cannot write.
    """

    folder: Path
    files: dict[str, BinaryIO]
    sums: dict[str, int]
    counts: Counts
    number_columns: set[tuple[str, str]] = field(default_factory=set)
    remarks: ChatRemarks = field(default_factory=ChatRemarks)
    unused: dict[str, UnusedColumn] = field(default_factory=dict)

    @staticmethod
    def open(folder: Path) -> StoreWriter:
        """Create `folder`, which must not exist."""
        folder.mkdir(parents=True)
        names = [*(f"{name}.bin" for name in _ARRAYS), _LEFT_OUT]
        files: dict[str, BinaryIO] = {name: open(folder / name, "wb") for name in names}  # noqa: SIM115
        return StoreWriter(folder, files, dict.fromkeys(names, 0), Counts())

    def add(self, notes: Sequence[Notes], outcomes: Sequence[Example | Unit | LeftOut]) -> None:
        """Append the outcomes of some rows; `notes` has one entry per row. An Example becomes a unit of its own."""
        units = [
            ((AnswerRole.ANSWER, outcome),) if isinstance(outcome, Example) else outcome.members
            for outcome in outcomes
            if not isinstance(outcome, LeftOut)
        ]
        left_out = [outcome for outcome in outcomes if isinstance(outcome, LeftOut)]
        examples = [example for unit in units for _, example in unit]
        columns = {
            **_columns(examples, self._written("token_ids")),
            **_weight_columns(examples, self._written("weights")),
        }
        numbers = np.arange(self.counts.units, self.counts.units + len(units))
        columns["units"] = np.repeat(numbers, [len(unit) for unit in units])
        columns["roles"] = np.array([role for unit in units for role, _ in unit], dtype=np.uint8)
        for name, values in {**columns, **_row_columns(notes)}.items():
            self._append(f"{name}.bin", values.astype(_ARRAYS[name]).tobytes())
        self._add_left_out(left_out)
        self.counts = _added(self.counts, len(notes), len(units), columns, len(left_out))

    def add_store(self, store: TokenStore) -> None:
        """Append all examples and rows of a store. The numbers of its rows, from 1, go on after the rows before."""
        shift: dict[str, int] = {
            "starts": self._written("token_ids"),
            "row_numbers": self.counts.rows,
            "units": self.counts.units,
            "weight_starts": self._written("weights"),
        }
        for name, dtype in _ARRAYS.items():
            for part in _pieces(store.folder / f"{name}.bin", dtype):
                if name in shift:  # a weight's start of -1 means that there are no weights
                    part = np.where(part < 0, part, part + shift[name])
                self._append(f"{name}.bin", part.astype(dtype).tobytes())
        left_out = [replace(row, row=row.row + self.counts.rows) for row in store.left_out]
        self._add_left_out(left_out)
        self.number_columns.update(store.number_columns)
        self.counts = _sum_of(self.counts, store.counts)

    def finish(self, description: dict[str, Any]) -> None:
        """Write the description, flush everything to disk and close the files."""
        files = {name: {"bytes": file.tell(), "crc32": self.sums[name]} for name, file in self.files.items()}
        numbers = sorted(self.number_columns)
        unused = [asdict(column) for _, column in sorted(self.unused.items()) if column.count]
        facts = {"number_columns": numbers, "remarks": asdict(self.remarks), "unused": unused}
        meta = {**description, "counts": asdict(self.counts), **facts, "files": files}
        with open(self.folder / META, "w", encoding="utf-8") as file:
            file.write(_canonical({"meta": meta, "crc32": zlib.crc32(_canonical(meta).encode())}))
            _flush(file)
        for data in self.files.values():
            _flush(data)
            data.close()
        sync(self.folder)

    def _written(self, name: str) -> int:
        """The number of values in the file of this array."""
        return self.files[f"{name}.bin"].tell() // np.dtype(_ARRAYS[name]).itemsize

    def _add_left_out(self, rows: Sequence[LeftOut]) -> None:
        lines = "".join([json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows])
        self._append(_LEFT_OUT, lines.encode())

    def _append(self, name: str, content: bytes) -> None:
        self.files[name].write(content)
        self.sums[name] = zlib.crc32(content, self.sums[name])


def open_store(folder: Path, key: str) -> TokenStore | None:
    """The store in `folder`; None if there is none with this key, or if a file is damaged."""
    try:
        in_use = use_store(folder)
        content = json.loads((folder / META).read_text(encoding="utf-8"))
        meta, files = content["meta"], content["meta"]["files"]
        valid = zlib.crc32(_canonical(meta).encode()) == content["crc32"] and meta["key"] == key
        if not valid or any(
            _size_and_crc32(folder / name) != (file["bytes"], file["crc32"]) for name, file in files.items()
        ):
            return None
        counts = Counts(**{**meta["counts"], "variants": tuple(meta["counts"]["variants"])})
        number_columns = tuple((str(column), str(kind)) for column, kind in meta["number_columns"])
        ignored = tuple((int(bit), str(what)) for bit, what in meta["remarks"]["ignored"])
        remarks = ChatRemarks(**{**meta["remarks"], "ignored": ignored})
        unused = tuple(UnusedColumn(**column) for column in meta["unused"])
    except (OSError, BeingDeleted, ValueError, KeyError, TypeError, AttributeError):
        return None
    arrays: dict[str, Any] = {name: _mapped(folder / f"{name}.bin", dtype) for name, dtype in _ARRAYS.items()}
    return TokenStore(folder, key, counts, number_columns, remarks, unused, in_use, **arrays)


def _pieces(path: Path, dtype: str) -> Iterator[NDArray[Any]]:
    """The values in a file, piece by piece. They are read and not mapped, so that no pages of the file add up."""
    with open(path, "rb") as file:
        while (part := np.fromfile(file, dtype=dtype, count=_VALUES_PER_PIECE)).size:
            yield part


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _columns(examples: Sequence[Example], start: int) -> dict[str, NDArray[Any]]:
    def column(value: Callable[[Example], int]) -> NDArray[np.int64]:
        return np.array([value(example) for example in examples], dtype=np.int64)

    lengths = column(lambda example: len(example.token_ids))
    trained = [example.trained for example in examples]
    return {
        "token_ids": np.concatenate([np.empty(0, np.int32), *(example.token_ids for example in examples)]),
        "trained": np.concatenate([np.empty(0, np.bool_), *trained]),
        "starts": start + np.cumsum(lengths) - lengths,
        "lengths": lengths,
        "prompt_lengths": column(lambda example: example.prompt_length),
        "trained_counts": np.array([np.count_nonzero(mask) for mask in trained], dtype=np.int64),
        "row_numbers": column(lambda example: example.row),
        "variants": column(lambda example: example.variant),
        "cut_characters": column(lambda example: example.cut_characters),
        "dropped_turns": column(lambda example: example.dropped_turns),
        "straddles": column(lambda example: example.straddles),
        "special_text": column(lambda example: example.special_text),
    }


def _weight_columns(examples: Sequence[Example], start: int) -> dict[str, NDArray[Any]]:
    starts, parts = [], [np.empty(0, np.float32)]
    for example in examples:
        starts.append(-1 if example.weights is None else start)
        if example.weights is not None:
            parts.append(example.weights[example.trained])
            start += len(parts[-1])
    return {"weight_starts": np.array(starts, dtype=np.int64), "weights": np.concatenate(parts)}


def _row_columns(notes: Sequence[Notes]) -> dict[str, NDArray[Any]]:
    return {
        "row_flags": np.array([row.flags for row in notes], dtype="<u4"),
        "row_scripts": np.array([row.scripts for row in notes], dtype="<u4"),
        "row_digests": np.array([row.digest for row in notes], dtype="<u8"),
        "prompt_digests": np.array([row.prompt_digest for row in notes], dtype="<u8"),
    }


def _added(counts: Counts, rows: int, units: int, columns: dict[str, NDArray[Any]], left_out: int) -> Counts:
    variants = np.bincount(columns["variants"], minlength=len(counts.variants))
    variants[: len(counts.variants)] += np.array(counts.variants, dtype=np.int64)
    return Counts(
        rows=counts.rows + rows,
        examples=counts.examples + len(columns["lengths"]),
        units=counts.units + units,
        tokens=counts.tokens + int(columns["lengths"].sum()),
        trained_tokens=counts.trained_tokens + int(columns["trained_counts"].sum()),
        shortened=counts.shortened
        + int(np.count_nonzero(columns["cut_characters"] + columns["dropped_turns"])),
        cut_characters=counts.cut_characters + int(columns["cut_characters"].sum()),
        dropped_turns=counts.dropped_turns + int(columns["dropped_turns"].sum()),
        left_out=counts.left_out + left_out,
        straddles=counts.straddles + int(columns["straddles"].sum()),
        special_text=counts.special_text + int(columns["special_text"].sum()),
        variants=tuple(int(count) for count in variants),
    )


def _sum_of(counts: Counts, more: Counts) -> Counts:
    """The sums of the counts; variants of different templates are not added."""
    sums = {name: value + getattr(more, name) for name, value in asdict(counts).items() if name != "variants"}
    return Counts(**sums)


def _size_and_crc32(path: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file, which is read piece by piece."""
    size = total = 0
    with open(path, "rb") as file:
        while piece := file.read(_BYTES_PER_READ):
            size, total = size + len(piece), zlib.crc32(piece, total)
    return size, total


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
