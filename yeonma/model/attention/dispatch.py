"""Attention over a forest, as transformers calls it: the first backend in `BACKENDS` that supports a layer computes it.

A model with the attention implementation `FOREST` calls `forest_attention` in every layer. Scale, grouped heads,
sliding window (in positions), soft-capping and attention sinks are honoured. What a model does with its mask instead
(ALiBi, chunks) is invisible here; the check at loading detects such models. The forest's layout is a keyword argument
of the model's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface

from yeonma.batch.forest import Forest
from yeonma.model.attention.backend import (
    HALF,
    MIN_CAPABILITY,
    Backend,
    Capability,
    ForestLayout,
    ForestShape,
    LayerCall,
)
from yeonma.model.attention.cpu_cascade import CPU_CASCADE
from yeonma.model.attention.flex import FLEX, has_flex
from yeonma.model.attention.sdpa import PLAIN_OPERATIONS, SDPA
from yeonma.model.attention.varlen import VARLEN, varlen_attention
from yeonma.model.recurrence.layout import RecurrentLayout

FOREST = "yeonma_forest"
"""The name of `forest_attention` among transformers' attention implementations."""

BACKENDS: tuple[Backend, ...] = (VARLEN, FLEX, CPU_CASCADE, SDPA, PLAIN_OPERATIONS)
"""In order of preference. The last one supports every layer."""

OnLayer = Callable[[torch.nn.Module, int | None, str], None]
"""Called with a layer, its sliding window and the name of its backend."""


def layout(
    forest: Forest,
    device: torch.device | None = None,
    capability: Capability | None = None,
    computed_on: str | None = None,
) -> ForestLayout:
    """The layouts of all backends for a forest, with tensors on `device` (default: the CPU).

    `capability`: see `capability_of`; None to compute segment by segment. `computed_on`: the device type that a
    forecast on the meta device simulates, by default the CPU.
    """
    return lay_out_for_backends(forest_shape(forest, device, capability, computed_on))


def forest_shape(
    forest: Forest,
    device: torch.device | None = None,
    capability: Capability | None = None,
    computed_on: str | None = None,
) -> ForestShape:
    """The shape of a forest. Arguments as for `layout`."""
    paths: list[tuple[int, ...]] = []
    for index, segment in enumerate(forest.segments):
        paths.append((*paths[segment.parent], index) if segment.parent is not None else (index,))
    lengths = tuple(segment.length for segment in forest.segments)
    device = device or torch.device("cpu")
    computed_on = computed_on or ("cpu" if device.type == "meta" else device.type)
    return ForestShape(lengths, tuple(paths), device, computed_on, capability)


def lay_out_for_backends(shape: ForestShape) -> ForestLayout:
    layouts = {backend.name: backend.lay_out(shape) for backend in BACKENDS}
    parents = [path[-2] if len(path) > 1 else None for path in shape.paths]
    return ForestLayout(
        {name: result for name, result in layouts.items() if result is not None},
        RecurrentLayout(shape.lengths, parents, shape.device),
    )


def choose(call: LayerCall, layout: ForestLayout) -> Backend:
    """The first backend that supports the forest and the layer."""
    for backend in BACKENDS:
        backend_layout = layout.by_backend.get(backend.name)
        if backend_layout is not None and backend.supports(call, backend_layout):
            return backend
    raise ValueError("no attention backend supports this layer")


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    forest: ForestLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    on_layer: OnLayer | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, D), key (1, key heads, T, D), value (1, key heads, T, E) -> (1, T, heads, E).

    `s_aux`: attention sinks, (heads,). `on_layer`: for the check at loading.
    Raises ValueError if the model made its own mask, which would not match the forest, and if it lost the forest on the
    way to this layer.
    """
    if forest is None:
        raise ValueError("its layers do not hand the forest on to their attention")
    if attention_mask is not None:
        raise ValueError("the model made its own attention mask")
    call = LayerCall(query, key, value, scaling, dropout, sliding_window, softcap, s_aux)
    backend = choose(call, forest)
    if on_layer is not None:
        on_layer(module, sliding_window, backend.name)
    return backend.attend(call, forest.by_backend[backend.name]), None


def capability_of(
    device: torch.device, dtype: torch.dtype, planned: Capability | None = None
) -> Capability | None:
    """The compute capability of a CUDA device that may compute all segments in one call in this dtype.

    None for other devices, and if there is no kernel. `planned`: that of a device that is not here, for a forecast.
    """
    if device.type != "cuda" or (torch.version.cuda is None and planned is None):
        return None
    dtypes = (*HALF, torch.float32) if has_flex() else HALF if varlen_attention() is not None else ()
    capability = planned or torch.cuda.get_device_capability(device)
    return capability if capability >= MIN_CAPABILITY and dtype in dtypes else None


def reference_mask(forest: Forest) -> torch.Tensor:
    """(T, T), True where a token sees a token: the definition in its simplest form, for tests and readers."""
    length = len(forest.token_ids_T)
    visible = torch.zeros(length, length, dtype=torch.bool)
    for segment in forest.segments:
        own = slice(segment.start, segment.start + segment.length)
        if segment.parent is not None:
            parent = forest.segments[segment.parent]
            visible[own] = visible[parent.start + parent.length - 1]  # what the parent's last token sees
        visible[own, own] = torch.ones(segment.length, segment.length, dtype=torch.bool).tril()
    return visible


# There is no mask function of this name: transformers then makes no mask, and looks for none in the position ids, for
# which it would wait until the GPU has computed them.
AttentionInterface.register(FOREST, forest_attention)
