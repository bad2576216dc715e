"""Attention over a forest in one varlen call on CUDA. The kernel needs a GPU, so most tests replace it on the CPU with
plain operations that follow its documentation. All other code is the real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from tests.models import FOREST_FAMILIES, tiny_model, with_lora
from tests.unit.model.attention.test_attention import CPU, HEADS, WIDTH, chosen, dense, example_forest, states
from tests.unit.model.test_logprobs import assert_as_expected, head_of, small_forest
from yeonma.batch.forest import Forest, lay_out
from yeonma.model.attention.backend import LayerCall
from yeonma.model.attention.dispatch import (
    FOREST,
    choose,
    forest_attention,
    layout,
    reference_mask,
)
from yeonma.model.attention.varlen import VarlenLayout, varlen_attention, varlen_forest_attention
from yeonma.model.forest_support import check_forest_support
from yeonma.model.load import checkpoint_activations
from yeonma.model.logprobs import ForestSupport, trained_logprobs

H100 = (9, 0)
VARLEN_ON_CPU = "ragged_on_the_cpu"


def documented_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn` as documented there and by FlashAttention: query row i of t sees key j of
    k if i + k - t - left <= j <= i + k - t + right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert int(cu_seq_q[-1]) == len(query) and int(cu_seq_k[-1]) == len(key) == len(value)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    (left, right), outputs = window_size, []
    groups = query.shape[1] // key.shape[1]
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    for n in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[n] : cu_seq_q[n + 1]].transpose(0, 1)
        k, v = (
            states[cu_seq_k[n] : cu_seq_k[n + 1]].transpose(0, 1).repeat_interleave(groups, 0)
            for states in (key, value)
        )
        query_position = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        key_position = torch.arange(k.shape[1])[None, :]
        visible = (key_position <= query_position + right) & (
            (left == -1) | (key_position >= query_position - left)
        )
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


def varlen_layout(forest: Forest) -> VarlenLayout:
    return layout(forest, CPU, H100).by_backend["varlen"]


def attend(
    forest: Forest, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any
) -> torch.Tensor:
    arguments = {"scaling": None, "sliding_window": None, **arguments}
    return varlen_forest_attention(q, k, v, varlen_layout(forest), kernel=documented_varlen, **arguments)


OPTIONS = {
    "plain": {},
    "scale": {"scaling": 0.7},
    "window": {"sliding_window": 5},
    "window of one token": {"sliding_window": 1},
    "window one short of all": {"sliding_window": 36},
    "window as wide as all": {"sliding_window": 37},
    "both": {"scaling": 0.2, "sliding_window": 7},
}


@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_values_and_gradients_match_a_dense_masked_softmax(options: dict, key_heads: int) -> None:
    forest, results = example_forest(), []
    assert varlen_layout(forest).max_keys == 37
    for attention in (attend, dense):
        inputs = states(key_heads)[:3]
        output = attention(forest, *inputs, **options)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=output.dtype)
        results.append([output, *torch.autograd.grad((output * weight).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    """Rows over two tokens, with shared prefixes, nested or not, from the first token on."""
    count = draw(st.integers(1, 7))
    rows = [
        np.array([9, *draw(st.lists(st.integers(0, 1), min_size=1, max_size=7))], dtype=np.int32)
        for _ in range(count)
    ]
    share = draw(st.booleans())
    return lay_out(
        rows, [np.ones(len(row), dtype=bool) for row in rows], share_prefix=share, units=[0] * count
    )


@settings(max_examples=60)
@given(forest=forests(), window=st.one_of(st.none(), st.integers(1, 9)))
def test_varlen_matches_segment_by_segment_attention_for_any_forest(
    forest: Forest, window: int | None
) -> None:
    rng = torch.Generator().manual_seed(1)
    shape = (1, 2, len(forest.token_ids_T), WIDTH)
    tensors = [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(4)]
    *inputs, weight = tensors
    results = []
    for one_by_one in (False, True):
        q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
        if one_by_one:
            output = forest_attention(
                torch.nn.Module(), q, k, v, None, forest=layout(forest), sliding_window=window
            )[0]
        else:
            output = attend(forest, q, k, v, sliding_window=window)
        gradients = torch.autograd.grad((output * weight.transpose(1, 2)).sum(), (q, k, v))
        results.append([output, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_copies_map_to_their_tokens_and_gradients_sum_in_float32() -> None:
    forest = example_forest()
    copies = varlen_layout(forest).copies
    assert copies is not None
    copy_counts = torch.bincount(copies.token_K, minlength=len(forest.token_ids_T))
    assert torch.equal(copies.token_K[copies.own_T], torch.arange(len(forest.token_ids_T)))
    assert torch.equal(
        copies.shared_S, copy_counts.argsort(descending=True, stable=True)[: int((copy_counts > 1).sum())]
    )
    for indices in copies.rounds:
        assert torch.equal(copies.token_K[indices], copies.shared_S[: len(indices)])
    copied = torch.cat([copies.own_T, *copies.rounds]).sort().values
    assert torch.equal(copied, torch.arange(len(copies.token_K)))  # each copy occurs once

    rows = [np.array([5, 6, 7 + n], dtype=np.int32) for n in range(9)]
    forest = lay_out(rows, [np.ones(3, dtype=bool)] * 9, units=[0] * 9)
    assert len(forest.segments) == 10
    states = torch.zeros(1, 1, 11, 8, dtype=torch.bfloat16, requires_grad=True)
    copied: list[torch.Tensor] = []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        copied.append(k)
        return k

    arguments = {"scaling": None, "sliding_window": None, "kernel": kernel}
    varlen_forest_attention(states, states, states, varlen_layout(forest), **arguments)
    upstream = torch.full_like(copied[0], 2**-9)
    upstream[0:2] = 1  # the first copies of the two shared tokens
    (gradient,) = torch.autograd.grad(copied[0], states, upstream)
    exact = 1 + 9 * 2**-9  # a sum in bfloat16 would lose all nine small terms
    assert gradient[0, 0, 0, 0] == torch.tensor(exact).bfloat16() != 1


def test_forest_without_shared_segments_needs_no_copies() -> None:
    rows = [np.arange(5, dtype=np.int32), np.arange(10, 13, dtype=np.int32)]
    varlen = varlen_layout(lay_out(rows, [np.ones(len(row), dtype=bool) for row in rows]))
    assert varlen.copies is None and varlen.query_ends.tolist() == varlen.key_ends.tolist() == [0, 5, 8]
    assert varlen.pairs == 15 + 6
    assert varlen_layout(example_forest()).pairs == int(reference_mask(example_forest()).sum())


# Models


def varlen_if_supported(*args: Any, **keywords: Any) -> tuple[torch.Tensor, None]:
    """`forest_attention` as on an H100, treating float32 as bfloat16."""
    _, query, key, value, mask = args
    assert mask is None
    call = LayerCall(
        *(states.to("meta", torch.bfloat16) for states in (query, key, value)),
        dropout=keywords.get("dropout", 0.0),
        softcap=keywords.get("softcap"),
        sinks=keywords.get("s_aux"),
    )
    backend = choose(call, keywords["forest"]).name
    BACKENDS_USED.append(backend)
    if backend != "varlen":
        return forest_attention(*args, **keywords)
    arguments = {name: keywords.get(name) for name in ("scaling", "sliding_window")}
    varlen = keywords["forest"].by_backend["varlen"]
    return varlen_forest_attention(query, key, value, varlen, kernel=documented_varlen, **arguments), None


BACKENDS_USED: list[str] = []
AttentionInterface.register(VARLEN_ON_CPU, varlen_if_supported)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FOREST_FAMILIES)
def test_model_logprobs_and_lora_gradients_match_separate_sequences(family: str, checkpointing: bool) -> None:
    model = with_lora(tiny_model(family))
    model.set_attn_implementation(VARLEN_ON_CPU)
    if checkpointing:
        checkpoint_activations(model)
        model.train()
    BACKENDS_USED.clear()
    # only the layout is that of a GPU; `forest_attention` itself would compute float32 as on the CPU
    logprob = trained_logprobs(model, small_forest()[0], head_of(model, "plain"), H100)
    assert_as_expected(family, model, logprob)
    assert set(BACKENDS_USED) == {"plain" if family in ("gemma2", "gpt_oss") else "varlen"}
    recurrent = {"qwen3_next": 1, "lfm2": 1}.get(family, 0)  # of its two layers
    assert len(BACKENDS_USED) == (2 - recurrent) * (2 if checkpointing else 1)


# Choice of the backend


def test_backend_choice_depends_on_gpu_dtype_and_layer_options() -> None:
    supported: dict[str, Any] = {
        "capability": H100,
        "dtype": torch.bfloat16,
        "query_width": 128,
        "value_width": 128,
    }
    assert chosen(**supported) == "varlen"
    assert chosen(**{**supported, "dtype": torch.float16}) == "varlen"
    assert chosen(**{**supported, "capability": (8, 0)}) == "varlen"
    for changed in (
        {"capability": None},  # the CPU, and torch without the function
        {"capability": (7, 5)},
        {"dtype": torch.float32},
        {"dropout": 0.1},
        {"value_width": 64},
        {"query_width": 100, "value_width": 100},
        {"query_width": 512, "value_width": 512},
    ):
        assert chosen(**{**supported, **changed}) == "sdpa", changed
    for capability, expected in (((8, 0), "varlen"), ((9, 0), "varlen"), ((8, 9), "sdpa"), ((12, 0), "sdpa")):
        wide = {"capability": capability, "query_width": 256, "value_width": 256}
        assert chosen(**{**supported, **wide}) == expected
    for changed in ({"softcap": 30.0}, {"sinks": True}):
        assert chosen(**{**supported, **changed}) == "plain"
        assert chosen(**{**supported, **changed, "capability": None}) == "plain"


def test_cpu_layout_has_no_varlen_entry() -> None:
    assert "varlen" not in layout(example_forest()).by_backend
    model = tiny_model("llama").bfloat16()
    assert check_forest_support(model).capability is None


def test_installed_torch_varlen_attention_has_scale_and_window() -> None:
    assert varlen_attention() is not None


# On a GPU


def close(ours: torch.Tensor, theirs: torch.Tensor, share: float) -> None:
    """Compares norms, because single numbers in half precision can be far off and zeros are not exact."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    assert float((ours - theirs).norm()) <= share * float(theirs.norm()) + 0.01 * theirs.numel() ** 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_gpu_kernel_matches_its_documented_semantics(options: dict, key_heads: int, dtype: Any) -> None:
    forest, results = example_forest(), []
    gpu = torch.device("cuda")
    arguments = {"scaling": None, "sliding_window": None, **options}
    for device, kernel in ((gpu, None), (CPU, documented_varlen)):
        inputs = [tensor.detach().to(device, dtype).requires_grad_() for tensor in states(key_heads)[:3]]
        kernel_inputs = (
            inputs if kernel is None else [tensor.detach().double().requires_grad_() for tensor in inputs]
        )
        varlen = layout(forest, device, torch.cuda.get_device_capability()).by_backend["varlen"]
        output = varlen_forest_attention(*kernel_inputs, varlen, kernel=kernel, **arguments)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(dtype).to(output)
        results.append([output, *torch.autograd.grad((output * weight).sum(), kernel_inputs)])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, 0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
def test_gpu_model_matches_segment_by_segment_attention(family: str) -> None:
    model = with_lora(tiny_model(family)).to("cuda", torch.bfloat16)
    base = model.get_base_model()
    support: ForestSupport = check_forest_support(base)
    assert support.forest and support.capability == torch.cuda.get_device_capability()
    assert base.config._attn_implementation == FOREST
    results = []
    for capability in (support.capability, None):
        logprob = trained_logprobs(base, small_forest()[0], support.head, capability)
        trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
        results.append([logprob, *torch.autograd.grad(logprob.sum(), trained)])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, 0.1)
