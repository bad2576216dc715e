"""Attention over a forest by FlexAttention. Its kernels need a GPU, so these tests use torch's reference implementation
(the operator on CPU tensors), including gradients. All other code is the real one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager
from torch._higher_order_ops.flex_attention import flex_attention as operator
from torch.nn.attention.flex_attention import AuxOutput, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from tests.unit.model.attention.test_attention import (
    CPU,
    HEADS,
    OPTIONS,
    chosen,
    dense,
    example_forest,
    states,
)
from tests.unit.model.attention.test_varlen import close, forests
from yeonma.batch.forest import Forest, lay_out
from yeonma.model.attention.dispatch import (
    capability_of,
    forest_attention,
    forest_shape,
    layout,
    reference_mask,
)
from yeonma.model.attention.flex import (
    BLOCK,
    FlexLayout,
    LayerSpec,
    _with_masks,
    compile_for,
    compiled,
    flex_forest_attention,
    has_flex,
    mask_of,
)


def torch_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    score_mod: Any,
    block_mask: Any,
    scale: float,
    enable_gqa: bool,
    kernel_options: dict,
    return_aux: Any,
) -> Any:
    """`flex_attention` on the CPU with gradients, which torch's own function refuses. Log-sum-exps are to base 2,
    as from the kernels."""
    assert enable_gqa == (query.shape[1] != key.shape[1])

    def unchanged(score: Any, *_: Any) -> Any:
        return score

    options = {**kernel_options, "BACKEND": "AUTO", "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False}
    mask = block_mask.as_tuple()
    output, sums, _ = operator(query, key, value, score_mod or unchanged, mask, scale, options)
    return output if return_aux is None else (output, AuxOutput(lse=sums * math.log(2), max_scores=None))


def layout_of(forest: Forest, device: torch.device = CPU) -> FlexLayout:
    shape = forest_shape(forest)
    return FlexLayout(shape.lengths, shape.paths, device)


def visible_and_blocks(forest: Forest, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of the T tokens, and (blocks, blocks): 0 for blocks to skip, 1 for partial and 2 for full blocks."""
    shape = forest_shape(forest)
    mask_tensors = mask_of(shape.lengths, shape.paths, window, CPU)
    total, padded = len(forest.token_ids_T), len(mask_tensors.enter_P)
    assert padded % BLOCK == 0 and padded >= max(total, 2 * BLOCK)
    block_masks: list[Any] = []
    spec = LayerSpec(CPU, torch.float32, 1, 1, 16, 16, 1.0, None, False)
    _with_masks(spec, lambda *_, block_mask, **__: block_masks.append(block_mask))(
        *[torch.zeros(1, 1, padded, 16)] * 3, *mask_tensors.tensors()
    )
    (mask,) = block_masks
    positions = torch.arange(padded)
    visible = mask.mask_mod(0, 0, positions[:, None], positions[None, :])
    assert not visible[:total, total:].any() and visible.diagonal().all()
    blocks = torch.zeros(padded // BLOCK, padded // BLOCK, dtype=torch.int64)
    for transposed, arrays in ((False, mask_tensors.blocks[:4]), (True, mask_tensors.blocks[4:])):
        block_kinds = torch.zeros_like(blocks)
        for block_kind, (count, index) in enumerate((arrays[:2], arrays[2:]), 1):
            for row, block_count in enumerate(count[0, 0].tolist()):
                block_kinds[row, index[0, 0, row, :block_count].long()] += block_kind
        if transposed:
            assert torch.equal(block_kinds.T, blocks)
        else:
            blocks = block_kinds
    torch_mask = create_block_mask(mask.mask_mod, None, None, padded, padded, device="cpu")
    assert torch.equal(torch_mask.to_dense()[0, 0] > 0, blocks > 0)
    full_blocks = visible.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK).all(-1).all(-1)
    assert torch.equal(full_blocks, blocks == 2)
    return visible[:total, :total], blocks


def expected(forest: Forest, window: int | None) -> torch.Tensor:
    visible, position = reference_mask(forest), torch.from_numpy(forest.position_T)
    return visible if window is None else visible & (position[:, None] - position[None, :] < window)


@settings(max_examples=40, deadline=None)
@given(forest=forests(), window=st.one_of(st.none(), st.integers(1, 9)))
def test_mask_equals_the_reference_mask(forest: Forest, window: int | None) -> None:
    assert torch.equal(visible_and_blocks(forest, window)[0], expected(forest, window))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_long_forests_compute_only_blocks_with_visible_tokens(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    prefix = rng.integers(0, 9, data.draw(st.integers(0, 400)))
    rows = []
    for _ in range(data.draw(st.integers(1, 5))):
        start = rows[-1][: rng.integers(len(rows[-1]))] if rows and rng.random() < 0.5 else prefix
        rows.append(np.concatenate([start, rng.integers(0, 9, rng.integers(1, 300))]).astype(np.int32))
    forest = lay_out(rows, [np.ones(len(row), dtype=bool) for row in rows])
    window = data.draw(st.one_of(st.none(), st.sampled_from([1, 100, 128, 129, 300, 5000])))
    visible, _ = visible_and_blocks(forest, window)
    assert torch.equal(visible, expected(forest, window))


def test_blocks_between_independent_rows_are_skipped() -> None:
    rows = [np.full(512, n, dtype=np.int32) for n in range(4)]
    _, blocks = visible_and_blocks(lay_out(rows, [np.ones(512, dtype=bool)] * 4), None)
    assert [int((blocks == n).sum()) for n in range(3)] == [256 - 4 * 10, 4 * 4, 4 * 6]


@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_values_and_gradients_are_those_of_a_dense_masked_softmax(options: dict, key_heads: int) -> None:
    forest, results = example_forest(), []
    for ours in (True, False):
        *inputs, sinks = states(key_heads)
        arguments = dict(options)
        if "s_aux" in arguments:
            arguments["s_aux"] = sinks
            inputs.append(sinks)
        if ours:
            output = flex_forest_attention(
                *inputs[:3], layout_of(forest), kernel=torch_reference, **arguments
            )
        else:
            output = dense(forest, *inputs[:3], **arguments)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=output.dtype)
        results.append([output, *torch.autograd.grad((output * weight).sum(), inputs)])
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-10)


def test_wider_values_match_segment_by_segment_attention() -> None:
    forest, results = example_forest(), []
    for ours in (True, False):
        query, key, value, _ = states(2)
        value = torch.cat([value, 2 * value], dim=-1)
        if ours:
            output = flex_forest_attention(query, key, value, layout_of(forest), kernel=torch_reference)
        else:
            output = forest_attention(torch.nn.Module(), query, key, value, None, forest=layout(forest))[0]
        assert output.shape == (1, len(forest.token_ids_T), HEADS, 16)
        results.append([output, *torch.autograd.grad(output.square().sum(), (query, key))])
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-10)


def test_torch_flex_attention_matches_dense_attention_on_the_cpu() -> None:
    forest = example_forest()
    query, key, value, _ = (tensor.detach() for tensor in states(2))
    arguments: dict[str, Any] = {"scaling": 0.2, "sliding_window": 7, "softcap": 2.0}
    output = flex_forest_attention(query, key, value, layout_of(forest), kernel=flex_attention, **arguments)
    torch.testing.assert_close(output, dense(forest, query, key, value, **arguments), rtol=0, atol=1e-6)


def test_layers_with_equal_windows_share_a_mask() -> None:
    flex_layout = layout_of(example_forest())
    assert flex_layout.mask(5) is flex_layout.mask(5) is not flex_layout.mask(6)
    assert flex_layout.mask(None) is flex_layout.mask(10**6)  # the window covers the whole forest


# Choice of the backend


def test_flex_is_chosen_where_varlen_is_not_supported() -> None:
    usual: dict[str, Any] = {
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "query_width": 128,
        "value_width": 128,
        "has_flex": True,
    }
    assert chosen(**usual) == "varlen"
    for changed, fallback in (
        ({"dtype": torch.float32}, "sdpa"),
        ({"softcap": 30.0}, "plain"),
        ({"sinks": True}, "plain"),
        ({"value_width": 64}, "sdpa"),
        ({"query_width": 100, "value_width": 100}, "sdpa"),
        ({"query_width": 256, "value_width": 256, "capability": (8, 9)}, "sdpa"),
        ({"has_varlen": False}, "sdpa"),
    ):
        case = {**usual, **changed}
        assert chosen(**case) == "flex", changed
        for unsupported in (
            {"has_flex": False},
            {"dropout": 0.1},
            {"capability": None},
            {"capability": (7, 5)},
            {"dtype": torch.float64},
            {"query_width": 8, "value_width": 16},
            {"query_width": 512, "value_width": 512},
        ):
            assert chosen(**{**case, **unsupported}) == fallback, (changed, unsupported)


def test_no_flex_layout_is_made_without_a_gpu() -> None:
    for device in (CPU, torch.device("meta")):
        assert "flex" not in layout(example_forest(), device, (9, 0)).by_backend
    assert capability_of(CPU, torch.float32) is None


# Under torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, {"softcap": 1.5}])
def test_segment_by_segment_attention_compiles_without_graph_breaks(options: dict) -> None:
    """Forests of several lengths and shapes, with fullgraph=True."""
    torch._dynamo.reset()

    def run(query: Any, key: Any, value: Any, forest: Any) -> Any:
        return forest_attention(torch.nn.Module(), query, key, value, None, forest=forest, **options)[0]

    compiled_run = torch.compile(run, backend="aot_eager", fullgraph=True)
    rows = [np.arange(n, dtype=np.int32) for n in (9, 30)]
    unshared = lay_out(rows, [np.ones(len(row), dtype=bool) for row in rows], share_prefix=False)
    for forest in (example_forest(), unshared):
        length, results = len(forest.token_ids_T), []
        for function in (compiled_run, run):
            inputs = [tensor[:, :, :length].detach().requires_grad_() for tensor in states(2)[:3]]
            output = function(*inputs, layout(forest))  # type: ignore[call-arg]
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        for our, their in zip(*results, strict=True):
            torch.testing.assert_close(our, their, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("softcap", "sums"), [(None, False), (2.0, True)])
def test_one_kernel_is_compiled_for_all_lengths_and_windows(softcap: float | None, sums: bool) -> None:
    torch._dynamo.reset()
    graphs = 0

    def count_graphs(graph: Any, examples: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, examples)

    spec = LayerSpec(CPU, torch.float64, 4, 2, 16, 24, 0.3, softcap, sums)
    kernel = compile_for(spec, torch_reference, True, backend=count_graphs)
    generator = torch.Generator().manual_seed(5)
    for blocks, window in ((2, None), (3, 100), (8, 200)):
        shapes = [(1, heads, blocks * BLOCK, width) for heads, width in ((4, 16), (2, 16), (2, 24))]
        inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
        mask_tensors = mask_of((40, blocks * BLOCK - 70, 20), ((0,), (0, 1), (0, 2)), window, CPU)
        results = []
        for function in (kernel, _with_masks(spec, torch_reference)):
            output, total = function(*inputs, *mask_tensors.tensors())
            loss = output.square().sum() + (0 if total is None else total.square().sum())
            results.append([output, *torch.autograd.grad(loss, inputs)])
        for our, their in zip(*results, strict=True):
            torch.testing.assert_close(our, their, rtol=0, atol=1e-12)
    assert graphs == 1


def test_kernel_can_be_compiled_inside_a_checkpointed_layer() -> None:
    torch._dynamo.reset()
    spec, results = LayerSpec(CPU, torch.float64, 4, 2, 16, 16, 0.3, 2.0, True), []
    mask_tensors = mask_of((300, 84), ((0,), (0, 1)), None, CPU).tensors()
    generator = torch.Generator().manual_seed(5)
    originals = [
        torch.randn(1, heads, 384, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    ]
    kernels: list[Any] = []

    def layer(q: Any, k: Any, v: Any) -> Any:
        if not kernels:
            kernels.append(compile_for(spec, torch_reference, True, backend="aot_eager"))
        output, sums = kernels[0](q, k, v, *mask_tensors)
        return output * sums.unsqueeze(-1)

    for checkpointing in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in originals]
        output = checkpoint(layer, *inputs, use_reentrant=False) if checkpointing else layer(*inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for our, their in zip(*results, strict=True):
        assert torch.equal(our, their)


def test_flex_attention_works_inside_a_compiled_model() -> None:
    torch._dynamo.reset()
    forest, results = example_forest(), []

    def layer(q: Any, k: Any, v: Any) -> Any:
        return 2 * flex_forest_attention(3 * q, k, v, layout_of(forest), softcap=2.0, kernel=torch_reference)

    for function in (layer, torch.compile(layer, backend="aot_eager")):
        inputs = states(2)[:3]
        output = function(*inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-12)


# On a GPU


def wide_states(key_heads: int, device: Any, dtype: Any) -> list[torch.Tensor]:
    generator, length = torch.Generator().manual_seed(3), len(example_forest().token_ids_T)
    shapes = [(1, HEADS, length, 32), (1, key_heads, length, 32), (1, key_heads, length, 32), (HEADS,)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_flex_kernel_matches_segment_by_segment_attention(
    options: dict, key_heads: int, dtype: Any, checkpointing: bool
) -> None:
    if not has_flex():
        pytest.skip("there is no Triton")
    forest, gpu, results = example_forest(), torch.device("cuda"), []
    for ours in (True, False):
        *inputs, sinks = wide_states(key_heads, gpu, dtype)
        arguments = dict(options)
        if "s_aux" in arguments:
            arguments["s_aux"] = sinks
            inputs.append(sinks)

        def attend(q: Any, k: Any, v: Any, ours: bool = ours, arguments: dict = arguments) -> Any:
            if ours:
                return flex_forest_attention(q, k, v, layout_of(forest, gpu), **arguments)
            return forest_attention(torch.nn.Module(), q, k, v, None, forest=layout(forest), **arguments)[0]

        if checkpointing:
            output = checkpoint(attend, *inputs[:3], use_reentrant=False)
        else:
            output = attend(*inputs[:3])
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output)
        results.append([output, *torch.autograd.grad((output * weight).sum(), inputs)])
    for our, their in zip(*results, strict=True):
        close(our, their, 0.03 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.gpu
def test_earlier_calls_do_not_change_any_bit() -> None:
    if not has_flex():
        pytest.skip("there is no Triton")
    gpu, outputs = torch.device("cuda"), []
    rows = [np.arange(n, dtype=np.int32) for n in (300, 700)]
    other_forest = lay_out(rows, [np.ones(len(row), dtype=bool) for row in rows], share_prefix=False)
    for is_first in (True, False):
        torch._dynamo.reset()
        compiled.cache_clear()
        if not is_first:
            long_states = [
                torch.randn(1, heads, 1000, 32, device=gpu, requires_grad=True) for heads in (HEADS, 2, 2)
            ]
            flex_forest_attention(*long_states, layout_of(other_forest, gpu), softcap=2.0).sum().backward()
        inputs = wide_states(2, gpu, torch.float32)[:3]
        output = flex_forest_attention(*inputs, layout_of(example_forest(), gpu), softcap=2.0)
        outputs.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)
