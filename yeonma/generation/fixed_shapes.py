"""Decoding steps whose tensors keep their shapes, so that a CUDA graph can replay a step as one launch.

With one token for each row, a step of a large model has about a thousand kernels, and a GPU is often done with them
sooner than the host has launched them. Within `fixed_shapes`, a step in which no row starts runs on a number of rows
rounded up to a power of two, and on slots for the rows' own tokens rounded up as their buffers are. The rows that are
only there for the shape compute numbers that nobody reads.

The shapes run on every device, and tests compare them with the ordinary step on the CPU. The capture of a graph needs a
GPU and has not run on one: until it has, nothing but `benchmarks/one_decoding.py` asks for it. A capture is compared
with the plain step the first time it is replayed, and where it fails or differs, steps run without one.

Shapes: B rows that continue, R rows of a step with fixed shapes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from yeonma.model.transfer import to_device

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""token_ids (1, R), position ids (1, R), own tokens before the step (R,), rows to keep (R,) -> logits (R, V)."""
TOLERANCE = 2.5e-2
"""The largest difference between a captured step's logits and the plain one's, as a fraction of the largest logit."""

_modes: ContextVar[FixedShapes | None] = ContextVar("fixed_shapes", default=None)


@dataclass(eq=False)
class FixedShapes:
    """What has happened within a `fixed_shapes` block."""

    capture: bool
    """Whether to capture graphs. It ends when a capture fails or differs."""
    steps: int = 0
    """Steps with fixed shapes."""
    replayed: int = 0
    """Those of them that a graph replayed."""
    failures: list[str] = field(default_factory=list)
    """Why captures ended."""


@contextmanager
def fixed_shapes(*, capture: bool = False) -> Iterator[FixedShapes]:
    """Within the block, this thread decodes with fixed shapes where it can. `capture`: as CUDA graphs."""
    mode = FixedShapes(capture)
    token = _modes.set(mode)
    try:
        yield mode
    finally:
        _modes.reset(token)


def current_fixed_shapes() -> FixedShapes | None:
    """The innermost block that this thread is in."""
    return _modes.get()


def rounded_rows(rows: int) -> int:
    """The number of rows of a step with fixed shapes: the next power of two."""
    return 1 << (rows - 1).bit_length()


@dataclass(eq=False)
class _Step:
    """The tensors that a step of one shape reads, always at the same addresses."""

    token_ids_R: torch.Tensor
    position_R: torch.Tensor
    own_R: torch.Tensor
    keep_R: torch.Tensor
    runs: int = 0
    graph: Any = None
    logits_RV: torch.Tensor | None = None
    """Of the graph, which writes them anew in every replay."""

    @classmethod
    def of(cls, rows: int, device: torch.device) -> _Step:
        token_ids, positions, own = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        return cls(token_ids, positions, own, torch.arange(rows, device=device))

    def fill(self, token_ids: Sequence[int], positions: Sequence[int], own: Sequence[int]) -> None:
        """Copy a step's numbers in. The rows behind them have token 0 at position 0 and write into slot 0."""
        missing = [0] * (len(self.token_ids_R) - len(token_ids))
        for tensor, numbers in (
            (self.token_ids_R, token_ids),
            (self.position_R, positions),
            (self.own_R, own),
        ):
            tensor.copy_(to_device([*numbers, *missing], tensor.device, torch.long), non_blocking=True)


class FixedSteps:
    """The steps with fixed shapes of one call of `decode`."""

    def __init__(self, mode: FixedShapes, device: torch.device) -> None:
        self._mode, self._device = mode, device
        self._steps: dict[tuple[int, ...], _Step] = {}

    def logits(
        self,
        compute: Compute,
        shape: tuple[int, ...],
        token_ids: Sequence[int],
        positions: Sequence[int],
        own: Sequence[int],
    ) -> torch.Tensor:
        """logits_BV of a step.

        shape: R, and whatever else decides where and how large the tensors are that `compute` reads. Steps of equal
        shape may be replayed.
        """
        if shape not in self._steps:
            self._steps.clear()  # slots only grow, and graphs hold memory
            self._steps[shape] = _Step.of(shape[0], self._device)
        step = self._steps[shape]
        step.fill(token_ids, positions, own)
        step.runs += 1
        self._mode.steps += 1
        inputs = (step.token_ids_R[None], step.position_R[None], step.own_R, step.keep_R)
        if step.graph is None and (not self._mode.capture or step.runs == 1):  # the first run is the warm-up
            return compute(*inputs)[: len(token_ids)]
        if step.graph is None:
            expected = compute(*inputs)
            if not self._captures(step, compute, inputs, expected):
                return expected[: len(token_ids)]
        else:
            step.graph.replay()
        self._mode.replayed += 1
        assert step.logits_RV is not None
        return step.logits_RV[: len(token_ids)].clone()

    def _captures(self, step: _Step, compute: Compute, inputs: Any, expected: torch.Tensor) -> bool:
        """Capture a step's graph and replay it once; whether it gives the numbers of the plain step."""
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits_RV = compute(*inputs)
            graph.replay()
            difference = float((logits_RV - expected).abs().max() / expected.abs().max())
        except RuntimeError as error:
            return self._without_capture(f"{type(error).__name__}: {error}")
        if not difference <= TOLERANCE:
            return self._without_capture(
                f"the captured step differs by {difference:.1e} of the largest logit"
            )
        step.graph, step.logits_RV = graph, logits_RV
        return True

    def _without_capture(self, why: str) -> bool:
        self._mode.capture = False
        self._mode.failures.append(why)
        return False
