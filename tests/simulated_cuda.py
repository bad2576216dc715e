"""A GPU of the tests' own: tensors that say `cuda:0` and have their numbers in ordinary memory.

All Python code takes the path of a GPU, every operator runs on the CPU, and what a GPU would do is counted: kernels,
and the times that the host waits until all of them are done. A host waits when it reads a number, when it copies
without `non_blocking` or from memory that is not pinned, and in operators whose result has a size that the numbers
decide.

Kernels are operators that write memory, as PyTorch dispatches them; one may be several launches of a real GPU. A
tensor's device is told in Python alone: below it, PyTorch sees the meta device.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
H100 = (9, 0)
aten = torch.ops.aten
optimizer_module = import_module("torch.optim.optimizer")  # `torch.optim` hides its name

SIZED_BY_NUMBERS = {
    "nonzero",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "_unique2",
    "bincount",
    "equal",
    "repeat_interleave",
    "_local_scalar_dense",
    "is_nonzero",
}
"""Operators that a GPU cannot finish without the host, or whose result is for the host."""


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated GPU."""

    numbers: torch.Tensor
    """On the CPU."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, requires_grad: bool = False) -> SimulatedTensor:
        shape = torch.empty_strided(
            numbers.shape, numbers.stride(), dtype=numbers.dtype, device="meta", requires_grad=False
        )
        tensor: SimulatedTensor = torch.Tensor._make_subclass(  # type: ignore[assignment]
            cls, shape, requires_grad, dispatch_device=False, device_for_backend_keys=CUDA
        )
        tensor.numbers = numbers
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function} outside of `simulated_cuda`")


class SimulatedCuda(TorchDispatchMode):
    """Runs operators on the numbers of its tensors, and counts."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # PyTorch then asks for no real GPU

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """The function of the project that made the host wait, and why."""
        self.kernels: Counter[str] = Counter()
        """Operators, and how often each ran on the GPU."""
        self.pinned: dict[int, torch.Tensor] = {}

    def wait(self, why: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if "/yeonma/" in frame.filename]
        place = f"{ours[-1].name} in {ours[-1].filename.rpartition('/yeonma/')[2]}" if ours else "not ours"
        self.waits.append(f"{place}: {why}")

    def tensor(self, numbers: torch.Tensor, requires_grad: bool = False) -> SimulatedTensor:
        with _disable_current_modes():
            return SimulatedTensor(numbers, requires_grad)

    def copies_in_background(self, source: torch.Tensor, non_blocking: bool) -> bool:
        return non_blocking and source.untyped_storage().data_ptr() in self.pinned

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = {id(one.numbers): one for one in tensors if isinstance(one, SimulatedTensor)}
        on_gpu = bool(ours)
        name = function.overloadpacket.__name__
        if kwargs.get("device") is not None:
            on_gpu = torch.device(kwargs["device"]).type in ("cuda", "meta")  # meta is what autograd sees
            kwargs["device"] = CPU
        self._count_waits(name, args, kwargs, on_gpu, bool(ours))
        plain_args, plain_kwargs = tree_map(_numbers, (args, kwargs))
        if function is aten.mm.dtype:
            result = torch.mm(*(one.to(plain_args[2]) for one in plain_args[:2]))
        elif function is aten.histc.default:  # on the CPU, not of integers
            result = function(plain_args[0].float(), *plain_args[1:], **plain_kwargs).to(plain_args[0].dtype)
        else:
            result = function(*plain_args, **plain_kwargs)

        def on_its_device(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) in ours:  # written in place
                return ours[id(value)]
            return SimulatedTensor(value) if on_gpu else value

        if on_gpu and not _is_view(function):
            self.kernels[name] += 1
        return tree_map(on_its_device, result)

    def _count_waits(self, name: str, args: Any, kwargs: Any, on_gpu: bool, from_gpu: bool) -> None:
        if name in ("_to_copy", "copy_"):
            target, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
            to_gpu = isinstance(target, SimulatedTensor) if name == "copy_" else on_gpu
            if to_gpu == isinstance(source, SimulatedTensor) or not source.numel():
                return
            non_blocking = bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            host = source if to_gpu else target
            if host is None or not self.copies_in_background(host, non_blocking):
                self.wait(f"copies {'to' if to_gpu else 'from'} the GPU")
        elif from_gpu and name in SIZED_BY_NUMBERS:
            if name != "repeat_interleave" or kwargs.get("output_size") is None:
                self.wait(name)
        elif from_gpu and name in ("index", "index_put", "index_put_", "_unsafe_index"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.wait("an index of booleans")
                elif index is not None and not isinstance(index, SimulatedTensor):
                    self.wait("an index from the CPU")


def _numbers(value: Any) -> Any:
    return value.numbers if isinstance(value, SimulatedTensor) else value


def _is_view(function: Any) -> bool:
    """Whether the result is its argument's memory, unwritten, or none at all."""
    if function in (aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default):
        return True
    if function in (aten.empty_like.default, aten._local_scalar_dense.default):
        return True
    aliases = [one.alias_info for one in function._schema.returns]
    return bool(aliases) and all(one is not None and not one.is_write for one in aliases)


class _Calls(TorchFunctionMode):
    """Calls that PyTorch answers before an operator runs."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            if torch.device(kwargs["device"]).type == "cuda" and not isinstance(args[0], SimulatedTensor):
                self.cuda.wait("makes a tensor from numbers of the host")
                return self.cuda.tensor(function(*args, **{**kwargs, "device": CPU}))
        if isinstance(args[0] if args else None, SimulatedTensor):
            own: SimulatedTensor = args[0]
            if name == "new_tensor":
                self.cuda.wait("makes a tensor from numbers of the host")
                return self.cuda.tensor(torch.tensor(args[1], dtype=kwargs.get("dtype") or own.dtype))
            if name in ("tolist", "numpy"):
                self.cuda.wait(name)
                return getattr(own.numbers, name)()
        elif name == "pin_memory":
            copied = args[0].clone()
            self.cuda.pinned[copied.untyped_storage().data_ptr()] = copied
            return copied
        return function(*args, **kwargs)


def _weights(
    query: torch.Tensor, key: torch.Tensor, groups: int, scale: float, left: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys as (heads, tokens, D) in float32, and the weights of attention, aligned at the lower right
    corner."""
    q, k = query.transpose(0, 1).float(), key.transpose(0, 1).float().repeat_interleave(groups, 0)
    at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    keys = torch.arange(k.shape[1])[None, :]
    seen = (keys <= at) & ((left == -1) | (keys >= at - left))
    return q, k, (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)


def _slices(query_ends: torch.Tensor, key_ends: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    for queries, keys in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        yield slice(*queries), slice(*keys)


@torch.library.custom_op("yeonma_tests::varlen_attn", mutates_args=())
def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    scale: float,
    left: int,
) -> torch.Tensor:
    groups, outputs = query.shape[1] // key.shape[1], []
    for queries, keys in _slices(query_ends, key_ends):
        *_, weights = _weights(query[queries], key[keys], groups, scale, left)
        v = value[keys].transpose(0, 1).float().repeat_interleave(groups, 0)
        outputs.append((weights @ v).transpose(0, 1).to(query.dtype))
    return torch.cat(outputs)


@torch.library.custom_op("yeonma_tests::varlen_attn_backward", mutates_args=())
def _varlen_backward(
    upstream: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    scale: float,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = query.shape[1] // key.shape[1]
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for queries, keys in _slices(query_ends, key_ends):
        q, k, weights = _weights(query[queries], key[keys], groups, scale, left)
        v = value[keys].transpose(0, 1).float().repeat_interleave(groups, 0)
        up = upstream[queries].transpose(0, 1).float()
        to_weights = up @ v.transpose(1, 2)
        to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdim=True)) * scale
        to_k, to_v = (
            states.unflatten(0, (-1, groups)).sum(1)
            for states in (to_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ up)
        )
        for gradient, place, states in zip(
            gradients, (queries, keys, keys), (to_scores @ k, to_k, to_v), strict=True
        ):
            gradient[place] = states.transpose(0, 1).to(gradient.dtype)
    return gradients


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _gradients(ctx: Any, upstream: torch.Tensor) -> Any:
    return *_varlen_backward(upstream, *ctx.saved_tensors, *ctx.options), None, None, None, None


_varlen.register_autograd(_gradients, setup_context=_save)


def one_varlen_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    *_: int,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """`varlen_attn` as one kernel forward and one backward, as on a GPU."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return _varlen(query, key, value, query_ends, key_ends, factor, window_size[0])


@contextmanager
def simulated_cuda() -> Iterator[SimulatedCuda]:
    """Within the block there is a GPU."""
    cuda = SimulatedCuda()
    grouped = torch._C._group_tensors_by_device_and_dtype

    def grouped_on_gpu(tensors: Any, with_indices: bool = False) -> Any:
        groups = grouped(tensors, with_indices)
        return {(CUDA if on.type == "meta" else on, kind): group for (on, kind), group in groups.items()}

    lists = (_foreach_utils._foreach_supported_types, optimizer_module._foreach_supported_types)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "get_rng_state", lambda *_: torch.zeros(16)))
        stack.enter_context(mock.patch.object(torch.cuda, "set_rng_state", lambda *_: None))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: H100))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped_on_gpu))
        for supported in lists:
            supported.append(SimulatedTensor)
            stack.callback(supported.remove, SimulatedTensor)
        stack.enter_context(_Calls(cuda))
        stack.enter_context(cuda)
        yield cuda


def move_to_gpu(cuda: SimulatedCuda, model: torch.nn.Module) -> None:
    """The model's parameters and buffers."""
    moved: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if weight not in moved:
                    tensor = cuda.tensor(weight.detach().clone())
                    moved[weight] = torch.nn.Parameter(tensor, requires_grad=weight.requires_grad)
                module._parameters[name] = moved[weight]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = cuda.tensor(buffer.clone())
