"""Forests through recurrent layers: the log-probabilities and gradients of separate sequences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.lfm2.modeling_lfm2 import causal_conv1d_fn
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from tests.double import InDouble
from tests.models import ALL_RECURRENT, VOCABULARY, tiny_model, with_lora
from yeonma.batch.forest import Segment, lay_out
from yeonma.model.forest_support import attention, check_forest_support
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.load import checkpoint_activations
from yeonma.model.logprobs import ForestSupport, example_logprobs
from yeonma.model.recurrence import layout as layout_module
from yeonma.model.recurrence.convolution import causal_convolution, lay_out_taps
from yeonma.model.recurrence.layout import RecurrentLayout
from yeonma.model.recurrence.pieces import MAX_PIECE, Pieces, lay_out_pieces
from yeonma.model.recurrence.rules import delta_rule, mamba2_scan

QUICK = ["qwen3_5_text", "bamba", "lfm2"]
SOME = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ALL_RECURRENT]
AMPLIFYING = {"qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid"}
"""Their norm behind the recurrence divides by numbers that become small with the wide weights of `tests.models`: in
float32, processors differ by several 1e-5 there. In float64, they are equal as the others are."""

Tree = list[tuple[int, "Tree"]]
TREES: dict[str, Tree] = {
    "borders": [(64, [(64, []), (65, [(2, []), (1, [])])]), (63, [(1, []), (2, [])]), (130, [])],
    "beginnings shorter than the convolution": [
        (2, [(1, []), (3, [(1, []), (70, [])])]),
        (3, []),
        (1, [(1, [(1, []), (2, [])]), (9, [])]),
    ],
    "one": [(67, [])],
}


def segments_of(tree: Tree, parent: int | None = None, start: int = 0) -> list[Segment]:
    """In an order with parents first, depth first."""
    found: list[Segment] = []

    def add(nodes: Tree, above: int | None) -> None:
        for length, children in nodes:
            at = found[-1].start + found[-1].length if found else 0
            found.append(Segment(at, length, above))
            add(children, len(found) - 1)

    add(tree, None)
    return found


def rows_of(tree: Tree, seed: int = 1) -> list[np.ndarray]:
    """A sequence for every leaf."""
    draw, rows = np.random.default_rng(seed), list[np.ndarray]()

    def add(nodes: Tree, before: np.ndarray) -> None:
        for length, children in nodes:
            path = np.concatenate([before, draw.integers(0, VOCABULARY, length)]).astype(np.int32)
            add(children, path)
            if not children:
                rows.append(path)

    add(tree, np.zeros(0, dtype=np.int32))
    return rows


def path_to(segments: Sequence[Segment], index: int) -> torch.Tensor:
    """The flat positions of a segment's tokens and its ancestors'."""
    positions: list[int] = []
    at: int | None = index
    while at is not None:
        segment = segments[at]
        positions[:0] = range(segment.start, segment.start + segment.length)
        at = segment.parent
    return torch.tensor(positions)


# The rules, against transformers' own over every path from a root


def delta_inputs(tokens: int, *, by_channel: bool) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    keys, heads, wide = (4 if by_channel else 2), 4, 6
    q, k = (torch.randn(1, tokens, keys, wide, generator=draw) for _ in "qk")
    v = torch.randn(1, tokens, heads, 5, generator=draw)
    g = -torch.rand(1, tokens, heads, *([wide] if by_channel else []), generator=draw) * 0.3
    return [q, k, v, g, torch.rand(1, tokens, heads, generator=draw)]


def mamba_inputs(tokens: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, dt = torch.randn(1, tokens, 4, 5, generator=draw), torch.rand(1, tokens, 4, generator=draw)
    a, d = -torch.rand(4, generator=draw), torch.randn(4, generator=draw)
    b, c = (torch.randn(1, tokens, 2, 6, generator=draw) for _ in "bc")
    return [x, dt, a, b, c, d]


def _delta(q: Any, k: Any, v: Any, g: Any, beta: Any) -> torch.Tensor:
    # in older versions of transformers the layer repeats the heads of the keys, now the rule does
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    return torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]


def _kimi(q: Any, k: Any, v: Any, g: Any, beta: Any) -> torch.Tensor:
    return chunk_kimi_delta_attention(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]


def _mamba(x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> torch.Tensor:
    return mamba2_chunk_scan(x, dt, a, b, c, chunk_size=16, D=d)


RULES: dict[str, tuple[Callable[[int], list[torch.Tensor]], Callable[..., Any], Callable[..., torch.Tensor]]]
RULES = {
    "gated delta": (
        lambda tokens: delta_inputs(tokens, by_channel=False),
        lambda pieces, *inputs: delta_rule(*inputs, pieces, normed=True)[0],
        _delta,
    ),
    "kimi delta": (
        lambda tokens: delta_inputs(tokens, by_channel=True),
        lambda pieces, *inputs: delta_rule(*inputs, pieces, normed=True)[0],
        _kimi,
    ),
    "mamba2": (mamba_inputs, lambda pieces, *inputs: mamba2_scan(*inputs, pieces)[0], _mamba),  # type: ignore[call-arg]
}


def assert_equal_outputs(
    output: torch.Tensor,
    along: Callable[[torch.Tensor], torch.Tensor],
    segments: Sequence[Segment],
    inputs: Sequence[torch.Tensor],
) -> None:
    """The output of a forest (1, T, ...) and its gradients are those over every path. `along`: positions of a path ->
    (1, path, ...)."""
    separate = torch.cat(
        [along(path_to(segments, index))[:, -segment.length :] for index, segment in enumerate(segments)],
        dim=1,
    )
    torch.testing.assert_close(output, separate, rtol=1e-5, atol=1e-5)
    weight = torch.randn(separate.shape, generator=torch.Generator().manual_seed(3))
    found, expected = (torch.autograd.grad((x * weight).sum(), inputs) for x in (output, separate))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rule", RULES)
def test_rules_have_the_outputs_and_gradients_of_transformers_over_each_path(rule: str, tree: str) -> None:
    make, ours, theirs = RULES[rule]
    segments = segments_of(TREES[tree])
    tokens = sum(segment.length for segment in segments)
    inputs = [x.requires_grad_() for x in make(tokens)]
    parents = [segment.parent for segment in segments]
    pieces = lay_out_pieces([segment.length for segment in segments], parents, torch.device("cpu"))
    output = ours(pieces, *inputs)

    def along(path: torch.Tensor) -> torch.Tensor:
        return theirs(*(x[:, path] if x.ndim > 1 else x for x in inputs))

    assert_equal_outputs(output, along, segments, inputs)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("width", [2, 4])
def test_convolution_has_the_outputs_and_gradients_of_transformers_over_each_path(
    width: int, tree: str
) -> None:
    segments = segments_of(TREES[tree])
    lengths, parents = [s.length for s in segments], [s.parent for s in segments]
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=draw).requires_grad_()
        for shape in ((1, 3, sum(lengths)), (3, width), (3,))
    ]
    taps = lay_out_taps(lengths, parents, width, torch.device("cpu"))
    output = causal_convolution(*inputs, "silu", taps).transpose(1, 2)  # type: ignore[call-arg]

    def along(path: torch.Tensor) -> torch.Tensor:
        x, weight, bias = inputs
        return causal_conv1d_fn(x[:, :, path], weight, bias, activation="silu").transpose(1, 2)

    assert_equal_outputs(output, along, segments, inputs)


# The layout


def test_levels_hold_all_pieces_of_a_depth_those_that_are_continued_first() -> None:
    #  130 tokens, continued by 1 and by 64; and 20 alone
    pieces = lay_out_pieces([130, 1, 64, 20], [None, 0, 0, None], torch.device("cpu"), length=64)
    assert [level.pieces for level in pieces.levels] == [2, 1, 1, 2]
    assert [level.kept for level in pieces.levels] == [1, 1, 1, 0]
    assert [level.parent is None for level in pieces.levels] == [True, False, False, False]
    assert pieces.levels[-1].parent is not None and pieces.levels[-1].parent.tolist() == [0, 0]
    assert len(set(pieces.place_T.tolist())) == 215


@pytest.mark.parametrize(
    ("lengths", "length"), [([16] * 9, 16), ([30, 31], 32), ([1] * 5, 1), ([8 * MAX_PIECE], MAX_PIECE)]
)
def test_pieces_are_as_short_as_the_segments_allow(lengths: list[int], length: int) -> None:
    assert lay_out_pieces(lengths, [None] * len(lengths), torch.device("cpu")).length == length


# Whole models


def model_with_adapter(family: str) -> Any:
    model = tiny_model(family)
    if family in AMPLIFYING:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    mamba = (
        any("mamba" in type(module).__name__.lower() for module in model.modules()) or family == "falcon_h1"
    )
    targets = ["in_proj", "q_proj", "v_proj", "o_proj", "down_proj"] if mamba else "all-linear"
    return with_lora(model, target_modules=targets)


def logprobs_and_gradients(
    model: Any, support: ForestSupport, rows: Sequence[np.ndarray], parts: int = 1
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum of the gradients of `parts` micro-batches."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logprobs, sums = list[torch.Tensor](), [torch.zeros_like(parameter) for parameter in trained]
    weights = np.random.default_rng(5).random(sum(map(len, rows)))
    for part in np.array_split(np.arange(len(rows)), parts):
        own = [rows[index] for index in part]
        masks = [np.arange(len(row)) > 0 for row in own]
        logprob = example_logprobs(
            model.get_base_model(), support, own, masks, share_prefix=True, units=[0] * len(own)
        )
        first = sum(len(row) - 1 for row in rows[: part[0]])
        weight = torch.from_numpy(weights[first : first + len(logprob)]).float()
        found = torch.autograd.grad((logprob * weight).sum(), trained, allow_unused=True)
        sums = [total if one is None else total + one for total, one in zip(sums, found, strict=True)]
        logprobs.append(logprob.detach())
    return torch.cat(logprobs), sums


def assert_equal(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    largest = max(float(gradient.abs().max()) for gradient in expected[1])
    assert largest > 0.01
    for ours, theirs in zip(found[1], expected[1], strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=tolerance, atol=tolerance)


def one_by_one(model: Any, plain: str, rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with attention(model.get_base_model(), plain):
        return logprobs_and_gradients(model, ForestSupport(False, None, plain, ""), rows)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("tree", list(TREES)[:2])
def test_forests_have_the_logprobs_and_gradients_of_separate_sequences(family: str, tree: str) -> None:
    rows, model = rows_of(TREES[tree]), model_with_adapter(family)
    base = model.get_base_model()
    plain = base.config._attn_implementation
    expected = one_by_one(model, plain, rows)
    support = check_forest_support(base)
    assert support.forest, support.why_not
    rounding = 1e-4 if family in AMPLIFYING else 3e-5
    assert_equal(logprobs_and_gradients(model, support, rows), expected, rounding)
    assert_equal(logprobs_and_gradients(model, support, rows, parts=3), expected, rounding)


@pytest.mark.parametrize(
    ("tree", "family"),
    [
        *(("borders", family) for family in ALL_RECURRENT),
        *(
            pytest.param("beginnings shorter than the convolution", *some.values, marks=some.marks)
            for some in SOME
        ),
    ],
)
def test_in_float64_forests_equal_separate_sequences_to_the_last_digits(family: str, tree: str) -> None:
    rows, model = rows_of(TREES[tree]), model_with_adapter(family).double()
    base = model.get_base_model()
    plain = base.config._attn_implementation
    if base._can_set_experts_implementation():
        base.set_experts_implementation("eager")  # the grouped product knows no float64
    with InDouble():
        expected = one_by_one(model, plain, rows)
        found = logprobs_and_gradients(model, check_forest_support(base), rows, parts=3)
    assert found[0].dtype == expected[0].dtype == torch.float64
    assert_equal(found, expected, 1e-12)


@pytest.mark.parametrize("family", SOME)
def test_patched_and_recomputed_layers_have_the_same_numbers(family: str) -> None:
    rows, model = rows_of(TREES[list(TREES)[1]]), model_with_adapter(family)
    base = model.get_base_model()
    support = check_forest_support(base)
    expected = logprobs_and_gradients(model, support, rows)
    rounding = 1e-4 if family in AMPLIFYING else 3e-5
    patch_kernels(base, support=support, trim_last=True)
    assert_equal(logprobs_and_gradients(model, support, rows), expected, rounding)
    checkpoint_activations(base)
    base.enable_input_require_grads()
    for module in base.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
    assert_equal(logprobs_and_gradients(model, support, rows), expected, rounding)


def test_a_forward_pass_without_a_forest_is_transformers_own() -> None:
    ids = torch.from_numpy(rows_of(TREES["one"])[0]).long().unsqueeze(0)
    with torch.no_grad():
        for family in ("qwen3_5_text", "lfm2", "bamba"):
            model = tiny_model(family)
            before = model(ids, use_cache=False).logits
            support = check_forest_support(model)
            with attention(model, support.plain_attention):
                assert torch.equal(model(ids, use_cache=False).logits, before)


def test_a_forest_that_does_not_carry_states_on_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_nothing(lengths: Sequence[int], parents: Sequence[int | None], device: torch.device) -> Pieces:
        return lay_out_pieces(lengths, [None] * len(lengths), device)

    monkeypatch.setattr(layout_module, "lay_out_pieces", from_nothing)
    support = check_forest_support(tiny_model("granitemoehybrid"))
    assert not support.forest and "differ by" in support.why_not


def test_a_convolution_that_loses_short_beginnings_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_parent(
        lengths: Sequence[int], parents: Sequence[int | None], width: int, device: torch.device
    ) -> Any:
        """As if the parent of a short segment had nothing before it."""
        own = [p if p is None or lengths[p] >= width - 1 else None for p in parents]
        return lay_out_taps(lengths, own, width, device)

    monkeypatch.setattr(layout_module, "lay_out_taps", only_the_parent)
    support = check_forest_support(tiny_model("bamba"))
    assert not support.forest
    assert support.why_not.startswith("its recurrent layers differ by")


@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid"])
def test_bfloat16_is_as_close_to_float32_as_the_models_own_forward_is(family: str) -> None:
    rows = rows_of([(20, [(9, []), (70, [])]), (5, [])])
    masks = [np.arange(len(row)) > 0 for row in rows]
    exact, model = tiny_model(family), tiny_model(family).bfloat16()

    def logprobs(model: Any, support: ForestSupport) -> torch.Tensor:
        with torch.no_grad():
            return example_logprobs(model, support, rows, masks, share_prefix=True)

    plain = ForestSupport(False, None, "sdpa", "")
    expected, own = logprobs(exact, plain), logprobs(model, plain)
    support = check_forest_support(model)
    assert support.forest, support.why_not
    error = (logprobs(model, support) - expected).abs().mean()
    assert float(error) <= 1.5 * float((own - expected).abs().mean())


def test_a_layout_is_made_once_for_all_layers() -> None:
    rows = rows_of(TREES["one"])
    forest = lay_out(rows, [np.arange(len(row)) > 0 for row in rows])
    recurrence = RecurrentLayout([s.length for s in forest.segments], [None], torch.device("cpu"))
    x, weight = torch.randn(1, 3, 67), torch.randn(3, 4)
    recurrence.convolve(x, weight, None, None)
    first = copy.copy(recurrence._taps)
    recurrence.convolve(x, weight, None, None)
    assert recurrence._taps[4] is first[4] and len(first) == 1
