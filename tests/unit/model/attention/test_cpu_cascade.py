from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.unit.model.attention.test_attention import CPU, WIDTH, dense
from yeonma.batch.forest import Forest, lay_out
from yeonma.model.attention.backend import ForestShape, LayerCall
from yeonma.model.attention.cpu_cascade import (
    CHUNK,
    CPU_CASCADE,
    CascadeLayout,
    cascade_attention,
    cascade_layout,
)
from yeonma.model.attention.dispatch import (
    forest_attention,
    forest_shape,
    lay_out_for_backends,
    layout,
    reference_mask,
)


def branching_forest(seed: int, examples: int, longest: int) -> Forest:
    """A forest, perhaps several levels deep, of examples that share prefixes."""
    random = np.random.default_rng(seed)
    sequences: list[np.ndarray] = []
    for _ in range(examples):
        start = (
            sequences[random.integers(len(sequences))]
            if sequences and random.random() < 0.8
            else np.array([], int)
        )
        prefix = start[: random.integers(len(start) + 1)]
        sequences.append(np.concatenate([prefix, random.integers(0, 1000, random.integers(1, longest))]))
    ids = [sequence.astype(np.int32) for sequence in sequences]
    return lay_out(ids, [np.ones(len(sequence), dtype=bool) for sequence in ids], units=[0] * len(ids))


def states(
    forest: Forest, heads: int, key_heads: int, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = len(forest.token_ids_T)
    shapes = [(1, tokens, count, WIDTH) for count in (heads, key_heads, key_heads, heads)]
    *inputs, upstream = (2 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    as_in_models = [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in inputs]
    return [*as_in_models, upstream.to(dtype)]


def cascade_layout_of(forest: Forest, chunk: int = CHUNK) -> CascadeLayout:
    shape = forest_shape(forest)
    cascade = cascade_layout(shape.lengths, shape.paths, CPU, chunk)
    assert cascade is not None
    return cascade


FORESTS = [
    branching_forest(seed, examples, longest)
    for seed, (examples, longest) in enumerate([(6, 40), (9, 25), (4, 500)])
]


@pytest.mark.parametrize("heads, key_heads", [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("chunk", [16, 40, CHUNK])
@pytest.mark.parametrize("forest", FORESTS, ids=["wide", "deep", "long"])
def test_values_and_gradients_equal_a_dense_masked_softmax(
    forest: Forest, chunk: int, heads: int, key_heads: int
) -> None:
    *inputs, upstream = states(forest, heads, key_heads)
    ours = cascade_attention(*inputs, cascade_layout_of(forest, chunk), 0.4)  # type: ignore[call-arg]
    theirs = dense(forest, *inputs, scaling=0.4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    pairs = (torch.autograd.grad((output * upstream).sum(), inputs) for output in (ours, theirs))
    for gradient, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-11)


def test_example_forests_have_several_depths_and_chunks() -> None:
    depths = {len(path) for forest in FORESTS for path in forest_shape(forest).paths}
    assert {1, 2, 3, 4} <= depths
    assert any(len(keys.chunks) > 2 for keys in cascade_layout_of(FORESTS[2]).segments)


@pytest.mark.parametrize("forest", FORESTS, ids=["wide", "deep", "long"])
def test_calls_cover_every_visible_query_and_key_pair_once(forest: Forest) -> None:
    """The mask of a chunk hides all other pairs."""
    covered = np.zeros(reference_mask(forest).shape, dtype=int)
    cascade = cascade_layout_of(forest, 16)
    for keys in cascade.segments:
        assert [keys.own.start, *(chunk.stop for chunk in keys.chunks)][-1] == keys.own.stop
        assert all(first.stop == second.start for first, second in pairwise(keys.chunks))
        for rows in keys.chunks:
            height, width = rows.stop - rows.start, rows.stop - keys.own.start
            corner = cascade.mask[len(cascade.mask) - height :, cascade.mask.shape[1] - width :]
            covered[rows, keys.own.start : rows.stop] += (corner == 0).numpy()
        if keys.below is not None:
            covered[keys.below, keys.own] += 1
    assert (covered == reference_mask(forest).numpy()).all()


def test_forest_attention_saves_no_tensor_twice_for_backward() -> None:
    """It saves queries, keys, values, the output, and one number per head and token."""
    forest = FORESTS[1]
    *inputs, _ = states(forest, 6, 2, torch.float32)
    saved: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output, _ = forest_attention(torch.nn.Module(), *inputs, None, forest=layout(forest))
    tokens = len(forest.token_ids_T)
    assert sum(saved.values()) == 4 * tokens * (WIDTH * (6 + 2 + 2 + 6) + 6)
    torch.testing.assert_close(output, dense(forest, *inputs), rtol=0, atol=1e-5)


def test_gradients_with_strided_inputs_and_an_expanded_upstream() -> None:
    forest = FORESTS[0]
    *inputs, _ = states(forest, 6, 2)
    strided = [torch.stack([tensor, tensor], -1)[..., 0].detach().requires_grad_() for tensor in inputs]
    assert strided[0].stride(-1) == 2
    outputs = cascade_attention(*strided, cascade_layout_of(forest), None), dense(forest, *inputs)  # type: ignore[call-arg]
    gradients = torch.autograd.grad(outputs[0].sum(), strided), torch.autograd.grad(outputs[1].sum(), inputs)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "dtype, value_width, dropout, window, supported",
    [
        (torch.float32, WIDTH, 0.0, None, True),
        (torch.float32, WIDTH, 0.0, "all", True),
        (torch.float32, WIDTH, 0.0, "one less", False),
        (torch.float32, WIDTH, 0.1, None, False),
        (torch.float32, WIDTH - 4, 0.0, None, False),
        (torch.bfloat16, WIDTH, 0.0, None, False),
    ],
)
def test_backend_refuses_layers_it_cannot_compute(
    dtype: torch.dtype, value_width: int, dropout: float, window: str | None, supported: bool
) -> None:
    cascade = cascade_layout_of(FORESTS[1])
    shape = forest_shape(FORESTS[1])
    longest_path = max(sum(shape.lengths[i] for i in path) for path in shape.paths)
    query, value = torch.ones(1, 2, 3, WIDTH, dtype=dtype), torch.ones(1, 2, 3, value_width, dtype=dtype)
    sliding_window = {None: None, "all": longest_path, "one less": longest_path - 1}[window]
    call = LayerCall(query, query, value, dropout=dropout, sliding_window=sliding_window)
    assert CPU_CASCADE.supports(call, cascade) is supported
    assert not CPU_CASCADE.supports(replace(call, softcap=30.0), cascade)
    assert not CPU_CASCADE.supports(replace(call, sinks=torch.ones(2)), cascade)


def test_forest_with_scattered_branches_is_computed_segment_by_segment() -> None:
    lengths, paths = (3, 4, 2, 5), ((0,), (0, 1), (2,), (0, 3))
    assert cascade_layout(lengths, paths, CPU) is None
    layouts = lay_out_for_backends(ForestShape(lengths, paths, CPU, "cpu", None))
    assert layouts.by_backend.keys() == {"sdpa", "plain"}
    *inputs, _ = (torch.randn(1, 2, 14, WIDTH, dtype=torch.float64) for _ in range(4))
    ours, _ = forest_attention(torch.nn.Module(), *inputs, None, forest=layouts)
    visible = torch.ones(14, 14, dtype=torch.bool).tril()
    visible[7:9, :7], visible[9:, 3:9] = False, False
    scores = (inputs[0] @ inputs[1].transpose(2, 3) * WIDTH**-0.5).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(ours, (scores.softmax(-1) @ inputs[2]).transpose(1, 2), rtol=0, atol=1e-12)
