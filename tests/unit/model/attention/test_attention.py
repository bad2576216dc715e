from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from yeonma.batch.forest import MIN_SHARED_TOKENS, Forest, lay_out
from yeonma.model.attention import dispatch, flex, varlen
from yeonma.model.attention.backend import Backend, Capability, ForestLayout, ForestShape, LayerCall
from yeonma.model.attention.dispatch import (
    BACKENDS,
    choose,
    forest_attention,
    forest_shape,
    lay_out_for_backends,
    layout,
    reference_mask,
)
from yeonma.model.attention.flex import FLEX

CPU = torch.device("cpu")
HEADS, WIDTH = 4, 8


def example_forest() -> Forest:
    """Seven segments: four rows share a frame, three of them also an article, and one row shares nothing."""
    frame, article = np.arange(MIN_SHARED_TOKENS), np.arange(30, 30 + MIN_SHARED_TOKENS + 2)
    ends = [[*article, 1, 2, 3], [*article, 4], [5, 6], [*article, 1, 2, 9]]
    examples = [np.concatenate([frame, end]).astype(np.int32) for end in ends] + [
        np.arange(60, 67, dtype=np.int32)
    ]
    forest = lay_out(examples, [np.ones(len(example), dtype=bool) for example in examples])
    assert len(forest.segments) == 7
    return forest


def states(key_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    length = len(example_forest().token_ids_T)
    shapes = [
        (1, HEADS, length, WIDTH),
        (1, key_heads, length, WIDTH),
        (1, key_heads, length, WIDTH),
        (HEADS,),
    ]
    return [
        (2 * torch.randn(s, generator=rng, dtype=torch.float64)).to(dtype).requires_grad_() for s in shapes
    ]


def dense(
    forest: Forest,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax over the flat sequence, head by head, with an explicit mask: (1, T, heads, D)."""
    position = torch.from_numpy(forest.position_T)
    visible = reference_mask(forest)
    if sliding_window is not None:
        visible &= position[:, None] - position[None, :] < sliding_window
    outputs = []
    for head in range(query.shape[1]):
        group = head * key.shape[1] // query.shape[1]
        scores = query[0, head] @ key[0, group].T * (scaling or query.shape[-1] ** -0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        exponents = torch.where(visible, scores.exp(), torch.zeros_like(scores))
        total = exponents.sum(1, keepdim=True)
        if s_aux is not None:
            total = total + s_aux[head].exp()
        outputs.append(exponents / total @ value[0, group])
    return torch.stack(outputs, dim=1).unsqueeze(0)


def chosen(
    *,
    capability: Capability | None,
    dtype: torch.dtype,
    query_width: int,
    value_width: int,
    has_varlen: bool = True,
    has_flex: bool = False,
    sinks: bool = False,
    **options: Any,
) -> str:
    """The name of the backend chosen for a layer on a GPU; no GPU is needed."""
    shape = forest_shape(example_forest(), CPU, capability, "cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "has_flex", lambda: has_flex)
        patch.setattr(varlen, "varlen_attention", lambda: object() if has_varlen else None)
        # FlexAttention creates its tensors later, so this layout needs no GPU
        layouts = {
            backend.name: backend.lay_out(
                replace(shape, device=torch.device("cuda")) if backend is FLEX else shape
            )
            for backend in BACKENDS
        }
    tokens = sum(shape.lengths)
    query = torch.empty(1, HEADS, tokens, query_width, dtype=dtype, device="meta")
    value = torch.empty(1, HEADS, tokens, value_width, dtype=dtype, device="meta")
    call = LayerCall(query, query, value, sinks=torch.empty(HEADS) if sinks else None, **options)
    return choose(
        call, ForestLayout({name: result for name, result in layouts.items() if result is not None})
    ).name


def test_backend_added_to_the_list_computes_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend needs only a module with a record like this one."""

    def lay_out(shape: ForestShape) -> int | None:
        return len(shape.lengths) if shape.computed_on == "cpu" else None

    def supports(call: LayerCall, segments: int) -> bool:
        return call.softcap is None

    def attend(call: LayerCall, segments: int) -> torch.Tensor:
        return call.value.transpose(1, 2) * segments

    counting = Backend("counting", lay_out, supports, attend)
    monkeypatch.setattr(dispatch, "BACKENDS", (counting, *BACKENDS))
    query, key, value, _ = states(HEADS)
    names: list[str] = []

    def attend_on(computed_on: str, **options: Any) -> torch.Tensor:
        forest_layout = layout(example_forest(), computed_on=computed_on)
        return forest_attention(
            torch.nn.Module(), query, key, value, None, forest=forest_layout, on_layer=on_layer, **options
        )[0]

    def on_layer(layer: torch.nn.Module, window: int | None, backend: str) -> None:
        names.append(backend)

    assert torch.equal(attend_on("cpu"), 7 * value.transpose(1, 2))
    torch.testing.assert_close(
        attend_on("cpu", softcap=1.5),
        dense(example_forest(), query, key, value, softcap=1.5),
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(
        attend_on("cuda"), dense(example_forest(), query, key, value), rtol=0, atol=1e-12
    )
    assert names == ["counting", "plain", "sdpa"]


OPTIONS = {
    "plain": {},
    "scale": {"scaling": 0.7},
    "window": {"sliding_window": 5},
    "window one short of a segment": {"sliding_window": MIN_SHARED_TOKENS - 1},
    "window of one token": {"sliding_window": 1},
    "window wider than all": {"sliding_window": 1000},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": True},
    "all": {"scaling": 0.2, "sliding_window": 7, "softcap": 2.0, "s_aux": True},
}


@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_values_and_gradients_match_a_dense_masked_softmax(options: dict, key_heads: int) -> None:
    forest = example_forest()
    results = []
    for attend in (
        lambda q, k, v, **arguments: forest_attention(
            torch.nn.Module(), q, k, v, None, forest=layout(forest), **arguments
        )[0],
        lambda q, k, v, **arguments: dense(forest, q, k, v, **arguments),
    ):
        *inputs, sinks = states(key_heads)
        arguments = dict(options)
        if "s_aux" in arguments:
            arguments["s_aux"] = sinks
            inputs.append(sinks)
        output = attend(*inputs[:3], **arguments)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=output.dtype)
        results.append([output, *torch.autograd.grad((output * weight).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        # with softcap or sinks the softmax is in float32, as in the model's own attention
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=1e-5 if {"softcap", "s_aux"} & {*options} else 1e-12
        )


def test_bfloat16_attention_is_close_to_a_dense_softmax() -> None:
    forest = example_forest()
    for arguments in ({}, {"softcap": 5.0}):
        query, key, value, _ = states(2, torch.bfloat16)
        ours, _ = forest_attention(
            torch.nn.Module(), query, key, value, None, forest=layout(forest), **arguments
        )
        assert ours.dtype == torch.bfloat16
        expected = dense(forest, query.double(), key.double(), value.double(), **arguments)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=0.05)


def test_the_reference_mask_of_a_small_forest() -> None:
    frame = np.arange(MIN_SHARED_TOKENS)
    examples = [np.append(frame, end).astype(np.int32) for end in ([20, 21], [22])]
    visible = reference_mask(lay_out(examples, [np.ones(len(e), dtype=bool) for e in examples])).int()
    assert torch.equal(visible[:16, :16], torch.ones(16, 16).tril().int())
    assert visible[16:, :16].all() and not visible[:16, 16:].any()
    assert visible[16:, 16:].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_segment_paths_list_ancestors_from_the_root() -> None:
    frame, article = range(MIN_SHARED_TOKENS), range(30, 30 + MIN_SHARED_TOKENS)
    examples = [
        np.array([*frame, *end], dtype=np.int32) for end in ([*article, 50, 51], [60], [*article, 70])
    ]
    shape = forest_shape(lay_out(examples, [np.ones(len(e), dtype=bool) for e in examples]))
    assert shape.lengths == (16, 16, 1, 2, 1)
    assert shape.paths == ((0,), (0, 1), (0, 2), (0, 1, 3), (0, 1, 4))


def test_attention_mask_from_the_model_is_refused() -> None:
    query, key, value, _ = states(2)
    mask = torch.zeros(1, 1, query.shape[2], query.shape[2])
    with pytest.raises(ValueError, match="its own attention mask"):
        forest_attention(torch.nn.Module(), query, key, value, mask, forest=layout(example_forest()))


def test_dropout_changes_the_attention_output() -> None:
    query, key, value, _ = states(2)
    one_segment = lay_out_for_backends(ForestShape((query.shape[2],), ((0,),), CPU, "cpu", None))
    for arguments in ({}, {"softcap": 1e6}):
        outputs = []
        for dropout in (0.0, 0.5):
            torch.manual_seed(0)
            outputs.append(
                forest_attention(
                    torch.nn.Module(),
                    query,
                    key,
                    value,
                    None,
                    forest=one_segment,
                    dropout=dropout,
                    **arguments,
                )[0]
            )
        assert not torch.allclose(*outputs)
