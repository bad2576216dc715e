"""The memory of a micro-batch, traced in the run's own forward and backward pass on PyTorch's meta device.

Tensors on that device have a shape but no contents. The model is built there from its config, PEFT adds its layers as
in the run, and every tensor of the forward and backward pass is recorded, with the moment at which it is freed. So
nothing is guessed from the name of an architecture. Memory that an operator uses internally is not seen. A model whose
computation depends on the contents of tensors, or whose code takes no forest, has no trace.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from yeonma.batch.forest import Forest
from yeonma.errors import UserError, first_line
from yeonma.model.attention.backend import Capability
from yeonma.model.attention.dispatch import layout
from yeonma.model.attention.varlen import VARLEN, VarlenLayout
from yeonma.model.logprobs import Head, trained_logprobs


@dataclass(frozen=True)
class Blueprint:
    """The base model with its adapter on the meta device, built as in the run."""

    model: Any  # the transformers model with its LoRA layers
    head: Head | None
    trained: int
    """Number of trained parameters."""
    frozen: int
    """Number of frozen parameters."""
    dense: int
    """Frozen parameters of dense layers other than the head, which quantisation shrinks."""
    weight_bytes: int
    """Bytes of frozen parameters and buffers. Tied ones count once."""
    trained_bytes: int
    """Bytes of what the optimizer updates, which is in float32."""
    gathered_bytes: int
    """Bytes of weights that are gathered in a process at a time if they are sharded."""
    capability: Capability | None = None
    """Of the CUDA device that computes attention in one call."""
    on_cpu: bool = True


@dataclass(frozen=True)
class Trace:
    """The memory of one micro-batch in addition to the weights, at its peak, in bytes by kind; and its computation."""

    tokens: int
    """Tokens in the forest: shared prefixes count once."""
    activations: int
    """Bytes saved by the forward pass for the backward pass."""
    logits: int
    gradients: int
    workspace: int
    """Bytes of everything else: short-lived temporary tensors."""
    flops: int
    """Floating point operations of products and attention in both passes."""
    forward_shapes: int
    """Distinct shapes of products in the forward pass."""
    shapes: int
    """Distinct shapes of products in both passes."""
    operators: int
    """Calls of operators in both passes."""

    @property
    def peak(self) -> int:
        return self.activations + self.logits + self.gradients + self.workspace


def trace(model_blueprint: Blueprint, forest: Forest, *, has_gradients: bool) -> Trace:
    """Trace the forward and backward pass of a forest. `has_gradients`: gradients of an earlier micro-batch exist.

    Raises UserError if the model cannot be traced, because its computation depends on the contents of tensors or its
    code takes no forest.
    """
    if model_blueprint.head is not None and not _has_decoder(model_blueprint.model):
        model_blueprint = replace(model_blueprint, head=None)
    model, capability = model_blueprint.model, model_blueprint.capability
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if has_gradients else None
    attention = layout(forest, model.device, capability, "cpu" if model_blueprint.on_cpu else "cuda")
    varlen: VarlenLayout | None = attention.by_backend.get(VARLEN.name)
    record = _TracedStorage(model.get_output_embeddings().weight.shape[0], varlen.pairs if varlen else 0)
    record.add([*model.parameters(), *model.buffers()], counted=False)
    record.add([parameter.grad for parameter in trained if parameter.grad is not None])
    try:
        with _recording(record), _without_autocast_on_meta():
            loss = trained_logprobs(model, forest, model_blueprint.head, capability, attention).sum()
            forward, forward_shapes = len(record.events), len(record.shapes)
            loss.backward()
    except UserError:
        raise
    except Exception as error:  # a model's code may raise anything
        for parameter in trained:
            parameter.grad = None
        kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        what = f"this model's memory cannot be forecast ({kind}{first_line(error)})"
        raise UserError(what, place="base_model") from error
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    record.add(gradients, counted=False)
    gradient_numbers = {record.number_of(gradient) for gradient in gradients}
    parts = _at_the_peak(record, forward, gradient_numbers)
    if any(parameter.dtype != torch.float32 for parameter in trained):  # they are summed in float32
        sizes = sum(parameter.nbytes for parameter in trained)
        numbers = sum(parameter.numel() for parameter in trained)
        parts["gradients"] = parts["gradients"] * torch.float32.itemsize * numbers // sizes
    for parameter in trained:
        parameter.grad = None
    return Trace(
        len(forest.token_ids_T),
        **parts,
        flops=record.flops,
        forward_shapes=forward_shapes,
        shapes=len(record.shapes),
        operators=record.calls,
    )


def _at_the_peak(record: _TracedStorage, forward: int, gradients: set[int]) -> dict[str, int]:
    """Bytes by kind at the peak. `forward`: the number of events in the forward pass."""
    live = peak = at = 0
    for index, (number, freed) in enumerate(record.events):
        live += -record.sizes[number] if freed else record.sizes[number]
        if live > peak:
            peak, at = live, index
    alive = _alive_after(record, at + 1)
    saved = _alive_after(record, forward)
    kinds = {"activations": 0, "logits": 0, "gradients": 0, "workspace": 0}
    for number in alive:
        if number in gradients:
            kind = "gradients"
        elif number in record.logits:
            kind = "logits"
        else:
            kind = "activations" if number in saved else "workspace"
        kinds[kind] += record.sizes[number]
    return kinds


def _alive_after(record: _TracedStorage, events: int) -> set[int]:
    """The storages that are alive after the first `events` events."""
    alive: set[int] = set()
    for number, freed in record.events[:events]:
        (alive.discard if freed else alive.add)(number)
    return alive


class _TracedStorage:
    """The storages that operators allocate, with the moments at which they are allocated and freed; the shapes and the
    floating point operations of products."""

    def __init__(self, vocabulary: int, pairs: int) -> None:
        self.vocabulary = vocabulary
        self.pairs = pairs  # of a query and a key that it sees, if attention is one call
        self.sizes: list[int] = []  # bytes of each storage, by number
        self.events: list[tuple[int, bool]] = []  # a storage's number, and whether it is freed
        self.logits: set[int] = set()
        self.shapes: set[tuple[Any, ...]] = set()
        self.flops = 0
        self.calls = 0
        self._numbers: dict[int, int] = {}  # id of a living storage -> its number

    def add(self, tensors: Sequence[torch.Tensor], *, counted: bool = True) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) in self._numbers:
                continue
            number = self._numbers[id(storage)] = len(self.sizes)
            self.sizes.append(storage.nbytes() if counted else 0)
            self.events.append((number, False))
            if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
                self.logits.add(number)
            weakref.finalize(storage, self._freed, id(storage))

    def number_of(self, tensor: torch.Tensor) -> int:
        return self._numbers[id(tensor.untyped_storage())]

    def _freed(self, storage_id: int) -> None:
        self.events.append((self._numbers.pop(storage_id), True))

    def run(self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operator, record it, and return its result."""
        name = str(operator)
        self.calls += 1
        if name == "aten._local_scalar_dense.default":
            return 0  # for code that looks for padding and packed sequences; there are none
        grouped = _grouped(args) if name == _GROUPED else None
        if grouped is not None and args[0].device.type == "meta":  # where it has rules for bfloat16 alone
            result = torch.empty(grouped[0], dtype=args[0].dtype, device="meta")
        else:
            result = operator(*args, **kwargs)
        self.add(list(_tensors(result)))
        if grouped is not None:
            self.flops += grouped[1]
        if name in _FACTORS:
            a, b = (args[index] for index in _FACTORS[name])
            self.flops += 2 * a.numel() * b.shape[-1]
        if name in ("aten.mm.default", "aten.addmm.default"):
            self.shapes.add((*a.shape, *b.shape, a.stride(-1) == 1, b.stride(-1) == 1))
        if name in _ATTENTION:
            query, products, causal = _ATTENTION[name]
            q, k = args[query], args[query + 1]
            masked = kwargs.get("attn_mask") is not None or args[causal : causal + 1] == (True,)
            pairs = q.shape[2] * (k.shape[2] - q.shape[2] / 2 * masked)  # if lengths are equal, half are seen
            self.flops += int(2 * products * q.shape[1] * q.shape[3] * pairs)
        if name in _ONE_CALL:
            query, products = _ONE_CALL[name]
            self.flops += 2 * products * args[query].shape[1] * args[query].shape[2] * self.pairs
        return result


def _grouped(args: Sequence[Any]) -> tuple[tuple[int, ...], int]:
    """The shape of a product in which every group of rows (experts, of which each has some of the tokens) has a matrix
    of its own, and its floating point operations."""
    a, b, groups = args[0], args[1], args[2]
    rows, columns = a.shape[-2], b.shape[-1]
    operations = 2 * rows * a.shape[-1] * columns
    both_in_groups = a.ndim == b.ndim == 2  # the gradient of the matrices
    return (len(groups), rows, columns) if both_in_groups else (rows, columns), operations


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """The tensors in an operator's result: a tensor, or tuples and lists of them."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)


def _has_decoder(model: Any) -> bool:
    """Whether the model names its decoder, so that it can be called without the head. The trial at loading calls it; on
    the meta device there is none. A few models return themselves, or a layer within their head."""
    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()
    return decoder is not model and any(module is embeddings for module in decoder.modules())


@contextmanager
def _without_autocast_on_meta() -> Iterator[None]:
    """Within the block, `torch.autocast` does nothing on the meta device, which has none. PEFT's layers turn it off
    around an adapter within a parameter."""
    original: Any = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else original(device_type, *args, **kwargs)

    torch.autocast = autocast  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


def _recording(record: _TracedStorage) -> AbstractContextManager[object]:
    """Records every operator called within the block.

    Raises UserError if this version of PyTorch has no such hook.
    """
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError as error:
        problem = f"PyTorch {torch.__version__} does not allow tracing the operators that a model calls"
        cure = "install the version of PyTorch in requirements.txt, or replace auto by values"
        raise UserError(problem, place="memory", cure=cure) from error

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            return record.run(func, args, kwargs or {})

    return Recording()


# Operators by name, because some are private and may be missing.
_GROUPED = "aten._grouped_mm.default"
_FACTORS = {  # the positions of the two factors among the arguments
    "aten.mm.default": (0, 1),
    "aten._scaled_mm.default": (0, 1),
    "aten.bmm.default": (0, 1),
    "aten.addmm.default": (1, 2),
    "aten.addmm_.default": (1, 2),
    "aten.baddbmm.default": (1, 2),
}
_ATTENTION = {  # the position of the query, the number of products, the position of `is_causal`
    "aten._scaled_dot_product_flash_attention_for_cpu.default": (0, 2, 4),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": (1, 5, 7),
}
_ONE_CALL = {  # attention over a whole forest, (T, heads, D): the position of the query, the number of products
    "torch_attn._varlen_attn.default": (0, 2),
    "torch_attn._varlen_attn_backward.default": (1, 5),
}
