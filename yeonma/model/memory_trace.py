"""The memory of a micro-batch without its numbers: the run's own forward and backward on PyTorch's meta device.

Tensors on that device have a shape and no contents. The model is built there from its config alone, PEFT puts its
layers on it as it will in the run, and every tensor that the forward and the backward make is written down with the
moment at which it goes. So nothing is guessed from an architecture's name. What a single operation holds inside
itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from yeonma.batch.forest import Forest
from yeonma.errors import UserError
from yeonma.model.attention.backend import Capability
from yeonma.model.attention.dispatch import layout
from yeonma.model.attention.varlen import VARLEN, VarlenLayout
from yeonma.model.logprobs import Head, trained_logprobs


@dataclass(frozen=True)
class Blueprint:
    """The base model with its adapter on the meta device, as the run will have it."""

    model: Any  # the transformers model, its LoRA layers in place
    head: Head | None
    trained: int
    """Parameters."""
    frozen: int
    dense: int
    """Frozen parameters of dense layers other than the head: what quantisation shrinks."""
    weight_bytes: int
    """Frozen parameters and buffers; a tied one counts once."""
    trained_bytes: int
    gathered_bytes: int
    """What of the weights a process holds whole at a time where they are sharded."""
    capability: Capability | None = None
    """Of the CUDA device that will compute attention in one call."""
    on_cpu: bool = True


@dataclass(frozen=True)
class Trace:
    """What one micro-batch holds beyond the weights, at the moment when it holds most, and what it computes."""

    tokens: int
    """In the forest: shared beginnings counted once."""
    activations: int
    """Bytes of what the forward keeps for the backward."""
    logits: int
    gradients: int
    workspace: int
    """Bytes of what comes and goes."""
    flops: int
    """Floating point operations of the forward and the backward, in products and attention."""
    forward_shapes: int
    """Distinct shapes of products in the forward."""
    shapes: int
    """In forward and backward."""

    @property
    def peak(self) -> int:
        return self.activations + self.logits + self.gradients + self.workspace


def trace(drawn: Blueprint, forest: Forest, *, has_gradients: bool) -> Trace:
    """Forward and backward of one forest. `has_gradients`: an earlier micro-batch of the step has left some.

    Raises UserError where the model computes something that depends on numbers, so that it cannot be traced.
    """
    model = drawn.model
    trained = [each for each in model.parameters() if each.requires_grad]
    for each in trained:
        each.grad = torch.zeros_like(each) if has_gradients else None
    laid = layout(forest, model.device, drawn.capability, "cpu" if drawn.on_cpu else "cuda")
    varlen: VarlenLayout | None = laid.by_backend.get(VARLEN.name)
    record = _Record(model.get_output_embeddings().weight.shape[0], varlen.pairs if varlen else 0)
    record.hold([*model.parameters(), *model.buffers()], counted=False)
    record.hold([each.grad for each in trained if each.grad is not None])
    try:
        with _recording(record):
            loss = trained_logprobs(model, forest, drawn.head, drawn.capability, laid).sum()
            forward, forward_shapes = len(record.events), len(record.shapes)
            loss.backward()
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"this model's memory cannot be forecast ({first})", place="base_model") from error
    record.hold([each.grad for each in trained if each.grad is not None], counted=False)
    gradients = {record.number_of(each.grad) for each in trained if each.grad is not None}
    parts = _at_the_peak(record, forward, gradients)
    for each in trained:
        each.grad = None
    return Trace(
        len(forest.token_ids_T),
        **parts,
        flops=record.flops,
        forward_shapes=forward_shapes,
        shapes=len(record.shapes),
    )


def _at_the_peak(record: _Record, forward: int, gradients: set[int]) -> dict[str, int]:
    """Bytes by kind at the moment when most is held; `forward` is the count of events in the forward."""
    live = peak = at = 0
    for index, (number, freed) in enumerate(record.events):
        live += -record.sizes[number] if freed else record.sizes[number]
        if live > peak:
            peak, at = live, index
    held = _held(record, at + 1)
    kept = _held(record, forward)
    kinds = {"activations": 0, "logits": 0, "gradients": 0, "workspace": 0}
    for number in held:
        if number in gradients:
            kind = "gradients"
        elif number in record.logits:
            kind = "logits"
        else:
            kind = "activations" if number in kept else "workspace"
        kinds[kind] += record.sizes[number]
    return kinds


def _held(record: _Record, events: int) -> set[int]:
    held: set[int] = set()
    for number, freed in record.events[:events]:
        (held.discard if freed else held.add)(number)
    return held


class _Record:
    """Every storage that operations make, when it came and when it went; products and their operations."""

    def __init__(self, vocabulary: int, pairs: int) -> None:
        self.vocabulary = vocabulary
        self.pairs = pairs  # of queries and keys, where attention is one call
        self.sizes: list[int] = []  # bytes, by number
        self.events: list[tuple[int, bool]] = []  # a storage's number, and whether it goes
        self.logits: set[int] = set()
        self.shapes: set[tuple[Any, ...]] = set()
        self.flops = 0
        self._numbers: dict[int, int] = {}  # id of a living storage -> its number

    def hold(self, tensors: Sequence[torch.Tensor], *, counted: bool = True) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) in self._numbers:
                continue
            number = self._numbers[id(storage)] = len(self.sizes)
            self.sizes.append(storage.nbytes() if counted else 0)
            self.events.append((number, False))
            if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
                self.logits.add(number)
            weakref.finalize(storage, self._gone, id(storage))

    def number_of(self, tensor: torch.Tensor) -> int:
        return self._numbers[id(tensor.untyped_storage())]

    def _gone(self, storage_id: int) -> None:
        self.events.append((self._numbers.pop(storage_id), True))

    def run(self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An operator's result, recorded."""
        name = str(operator)
        if name == "aten._local_scalar_dense.default":
            return 0  # asked by code that looks for padding and packed sequences, of which there are none
        result = operator(*args, **kwargs)
        self.hold(list(_tensors(result)))
        if name in _FACTORS:
            a, b = (args[at] for at in _FACTORS[name])
            self.flops += 2 * a.numel() * b.shape[-1]
        if name in ("aten.mm.default", "aten.addmm.default"):
            self.shapes.add((*a.shape, *b.shape, a.stride(-1) == 1, b.stride(-1) == 1))
        if name in _ATTENTION:
            at, products, causal = _ATTENTION[name]
            q, k = args[at], args[at + 1]
            masked = kwargs.get("attn_mask") is not None or args[causal : causal + 1] == (True,)
            pairs = q.shape[2] * (k.shape[2] - q.shape[2] / 2 * masked)  # of equal lengths, half are seen
            self.flops += int(2 * products * q.shape[1] * q.shape[3] * pairs)
        if name in _ONE_CALL:
            at, products = _ONE_CALL[name]
            self.flops += 2 * products * args[at].shape[1] * args[at].shape[2] * self.pairs
        return result


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """An operator returns a tensor, several, lists of them, or none."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)


def _recording(record: _Record) -> AbstractContextManager[object]:
    """Sends every operator called within through `record`.

    Raises UserError where this version of PyTorch has no such hook.
    """
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError as error:
        what = f"PyTorch {torch.__version__} does not show the operators that a model calls"
        cure = "install the version of PyTorch in requirements.txt, or set what is auto"
        raise UserError(what, place="memory", cure=cure) from error

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            return record.run(func, args, kwargs or {})

    return Recording()


# Operators by name: some are private, and none is looked up that the model does not call.
_FACTORS = {
    "aten.mm.default": (0, 1),
    "aten._scaled_mm.default": (0, 1),
    "aten.bmm.default": (0, 1),
    "aten.addmm.default": (1, 2),
    "aten.addmm_.default": (1, 2),
    "aten.baddbmm.default": (1, 2),
}
_ATTENTION = {  # where the query stands, how many products there are, and where it says whether they are causal
    "aten._scaled_dot_product_flash_attention_for_cpu.default": (0, 2, 4),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": (1, 5, 7),
}
_ONE_CALL = {  # of a whole forest, (T, heads, D)
    "torch_attn._varlen_attn.default": (0, 2),
    "torch_attn._varlen_attn_backward.default": (1, 5),
}
