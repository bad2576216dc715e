"""Patched norms, SwiGLU and rotary positions give the modules' own values and gradients, plain and compiled."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models import FOREST_FAMILIES, OTHER_FAMILIES, VOCABULARY, tiny_model, with_lora
from yeonma.errors import UserError
from yeonma.model.forest_support import check_forest_support
from yeonma.model.kernels.elementwise import (
    FIRST_ROWS,
    MIN_ROWS,
    PLAIN,
    Kernels,
    compiled,
    norm,
    rotate,
    swiglu,
)
from yeonma.model.kernels.lora import patch_linear
from yeonma.model.kernels.patch import patch_elementwise, pick_kernels
from yeonma.model.load import LoraShape, add_lora, checkpoint_activations
from yeonma.model.logprobs import ForestSupport, example_logprobs

PATCHED_COUNTS = {  # norms, MLPs and attentions of a model with two layers
    "llama": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "qwen3_moe": (9, 0, 2),
    "gemma2": (9, 0, 2),
    "gemma3_text": (13, 0, 2),
    "mistral": (5, 2, 2),
    "gpt_oss": (5, 0, 0),
    "phi3": (5, 0, 2),
    "granite": (5, 2, 2),
    "exaone4": (9, 2, 2),
    "gpt2": (0, 0, 0),
    "qwen3_next": (7, 2, 1),
    "lfm2": (7, 0, 1),
    "bloom": (0, 0, 0),
    "phimoe": (0, 0, 2),
}

has_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def patched_counts(model: nn.Module) -> tuple[int, ...]:
    names = Counter(
        module.__dict__["forward"].func.__name__ for module in model.modules() if "forward" in module.__dict__
    )
    return tuple(names[name] for name in ("_norm", "_mlp", "_attention"))


@pytest.mark.parametrize("family", [*FOREST_FAMILIES, *OTHER_FAMILIES])
def test_expected_modules_of_each_family_are_patched(family: str) -> None:
    model = tiny_model(family)
    assert patch_elementwise(model).total() == sum(PATCHED_COUNTS[family])
    assert patched_counts(model) == PATCHED_COUNTS[family]


def adapted(family: str) -> tuple[Any, ForestSupport]:
    model = with_lora(tiny_model(family))
    support = check_forest_support(model.get_base_model())
    assert support.forest
    return model, support


def logprobs_and_gradients(model: Any, support: ForestSupport) -> tuple[torch.Tensor, list[torch.Tensor]]:
    random = np.random.default_rng(3)
    prefix = random.integers(3, VOCABULARY, 20)
    ids = [np.concatenate([prefix, random.integers(3, VOCABULARY, n)]).astype(np.int32) for n in (9, 14, 11)]
    trained = [np.arange(len(sequence)) >= 20 for sequence in ids]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    result = example_logprobs(model.get_base_model(), support, ids, trained, share_prefix=True)
    return result.detach(), list(torch.autograd.grad(result.sum(), weights))


@pytest.mark.parametrize("short_lora", [False, True])
@pytest.mark.parametrize("family", FOREST_FAMILIES)
def test_patched_model_gives_the_same_logprobs_and_gradients(family: str, short_lora: bool) -> None:
    model, support = adapted(family)
    expected, gradients = logprobs_and_gradients(model, support)
    if short_lora:
        patch_linear(model)
    patch_elementwise(model)
    result, gradients_after = logprobs_and_gradients(model, support)
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for ours, theirs in zip(gradients_after, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * largest, rtol=1e-4)


def test_gradient_checkpointing_gives_identical_gradients() -> None:
    model, support = adapted("qwen3")
    patch_elementwise(model)
    _, expected = logprobs_and_gradients(model, support)
    checkpoint_activations(model.get_base_model())
    model.train()
    _, result = logprobs_and_gradients(model, support)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patching_does_not_increase_half_precision_error(dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    layer, attention = model.model.layers[0], model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 32, generator=generator)
    positions = torch.arange(64).unsqueeze(0)
    upstream = torch.randn(1, 64, 32, generator=generator)

    def output_and_gradient(model_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        model.to(model_dtype)
        hidden = x.to(model_dtype).requires_grad_()
        position = model.model.rotary_emb(hidden, positions)
        result = layer(hidden, position_embeddings=position, attention_mask=None)
        (gradient,) = torch.autograd.grad(result, hidden, upstream.to(model_dtype))
        return result.detach().float(), gradient.float()

    x, upstream = x.to(dtype).float(), upstream.to(dtype).float()
    model.to(dtype)
    model.float()
    exact = output_and_gradient(torch.float32)
    original = output_and_gradient(dtype)
    assert patch_elementwise(layer).total() == 4
    assert attention.forward.func.__name__ == "_attention"
    patched = output_and_gradient(dtype)
    for expected, patched_result, original_result in zip(exact, patched, original, strict=True):
        assert (patched_result - expected).norm() < 1.1 * (original_result - expected).norm()
        assert (original_result - expected).norm() > 0


class Norm(nn.Module):
    """A norm as in transformers; a test may change its input."""

    def __init__(self, twist: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5, requires_grad=False)
        self.eps = 1e-5
        self.twist = twist

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            self.twist(x) * torch.rsqrt(self.twist(x).pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        )


class Mlp(nn.Module):
    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.activation, self.dropout = activation, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(F.dropout(inner, self.dropout, self.training))


def test_modules_that_compute_something_else_are_not_patched() -> None:
    assert patch_elementwise(Norm()).total() == 1
    assert patch_elementwise(Norm(lambda x: x - x.mean(-1, keepdim=True))).total() == 0  # a layer norm
    trainable = Norm()
    trainable.weight.requires_grad_()
    assert patch_elementwise(trainable).total() == 0
    biased = Norm()
    biased.bias = nn.Parameter(torch.zeros(8), requires_grad=False)
    assert patch_elementwise(biased).total() == 0
    other_epsilon = Norm()
    other_epsilon.eps = 1e-5 + 1e-6 * other_epsilon.eps  # the norm reads this value, so that the trial agrees
    assert patch_elementwise(other_epsilon).total() == 1
    assert patch_elementwise(Mlp(F.silu)).total() == 1
    assert patch_elementwise(Mlp(F.gelu)).total() == 0
    assert patch_elementwise(Mlp(F.silu, dropout=0.1).eval()).total() == 0  # dropout is active in training


def test_norm_with_epsilon_outside_the_root_is_not_patched() -> None:
    class Outside(Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight

    assert patch_elementwise(Outside()).total() == 0


def test_module_with_a_replaced_forward_is_not_patched() -> None:
    module = Norm()
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert patch_elementwise(module).total() == 0


def test_patched_float32_norm_of_bfloat16_input_is_unchanged() -> None:
    module = tiny_model("llama").model.norm
    x = torch.randn(2, 20, 32, dtype=torch.bfloat16)
    expected = module(x)
    patch_elementwise(module)
    assert module(x).dtype == expected.dtype == torch.float32
    assert torch.equal(module(x), expected)


def test_patched_model_gives_the_same_logits_for_a_batch() -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    patch_elementwise(model)
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-5)


def test_rotate_gradient_is_exact_for_different_sines_of_the_halves() -> None:
    """As with scaled or interpolated positions, where the gradient is not the rotation by the negative angle."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 3, 20, 8, generator=generator, dtype=torch.float32).requires_grad_()
    k = torch.randn(1, 1, 20, 8, generator=generator).requires_grad_()
    cos, sin = torch.randn(2, 1, 20, 8, generator=generator)
    upstream = [torch.randn_like(states) for states in (q, k)]

    def plain(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)

    expected = torch.autograd.grad([plain(q), plain(k)], [q, k], upstream)
    result = torch.autograd.grad(rotate(q, k, cos, sin), [q, k], upstream)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)


def saved_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Bytes saved for the backward pass."""
    storages: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        result = run()
    return sum(storages.values()) + 0 * len(result)


def test_patched_mlp_saves_less_for_backward() -> None:
    layer = tiny_model("llama").model.layers[0]
    x = torch.randn(1, 128, 32, requires_grad=True)
    before = saved_bytes(lambda: layer.mlp(layer.input_layernorm(x)))
    patch_elementwise(layer)
    after = saved_bytes(lambda: layer.mlp(layer.input_layernorm(x)))
    assert before - after == 128 * 48 * 4  # silu(gate)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_mlp_with_lora_saves_the_gate_up_product_only_with_dropout(dropout: float) -> None:
    model = add_lora(tiny_model("llama"), LoraShape(4, 8, dropout, ["down_proj"]), seed=1)
    patch_linear(model)
    mlp = model.get_base_model().model.layers[0].mlp.train()
    x = torch.randn(1, 128, 32, requires_grad=True)
    before = saved_bytes(lambda: mlp(x))
    patch_elementwise(mlp)
    # silu(gate), and without dropout the product too
    assert before - saved_bytes(lambda: mlp(x)) == 128 * 48 * 4 * (1 if dropout else 2)


# compiled


def outputs_and_gradients(count: int, kernels: Kernels) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    x, up = (torch.randn(count, 48, generator=generator).requires_grad_() for _ in "xu")
    q, k = (torch.randn(1, heads, count, 8, generator=generator).requires_grad_() for heads in (4, 2))
    cos, sin = torch.randn(2, 1, count, 8, generator=generator)
    rotated = rotate(q, k, cos, sin, kernels)
    results = [norm(x, torch.linspace(0.5, 2, 48), 1e-6, kernels), swiglu(x, up, kernels), *rotated]
    upstream = [torch.randn(result.shape, generator=generator) for result in results]
    recomputed = kernels.swiglu_backward_recomputing(upstream[1], x.detach(), up.detach())
    gradients = torch.autograd.grad(results, [x, up, q, k], upstream)
    return [*(result.detach() for result in results), *gradients, *recomputed]


@pytest.mark.slow
@has_compiler
def test_compiled_kernels_equal_plain_for_any_row_count_in_any_order() -> None:
    """Results are bitwise equal in any order: a resumed run may start with other row counts than the original run."""
    counts = (MIN_ROWS - 1, MIN_ROWS, 333, 48, FIRST_ROWS)
    kernels = compiled.__wrapped__()
    first = {count: outputs_and_gradients(count, kernels) for count in counts}
    torch._dynamo.reset()
    kernels = compiled.__wrapped__()
    torch._dynamo.utils.counters.clear()
    for count in reversed(counts):
        for result, first_result, plain in zip(
            outputs_and_gradients(count, kernels),
            first[count],
            outputs_and_gradients(count, PLAIN),
            strict=True,
        ):
            assert torch.equal(result, first_result)
            torch.testing.assert_close(result, plain, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 7  # one per function, for all row counts


@pytest.mark.slow
@has_compiler
def test_compiled_kernels_give_the_same_logprobs_and_gradients() -> None:
    model, support = adapted("qwen3")
    patch_elementwise(model)
    expected, gradients = logprobs_and_gradients(model, support)
    patch_elementwise(model, pick_kernels(True, torch.device("cpu"), torch.float32, print))
    result, gradients_after = logprobs_and_gradients(model, support)
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-5)
    for ours, theirs in zip(gradients_after, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_kernel_that_fails_to_compile_runs_plain_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.warns(RuntimeWarning, match="fails at norm_forward"):
        result = outputs_and_gradients(20, compiled.__wrapped__())
    assert all(torch.equal(a, b) for a, b in zip(result, outputs_and_gradients(20, PLAIN), strict=True))
    with pytest.raises(RuntimeError, match="no such instruction"):
        outputs_and_gradients(20, compiled.__wrapped__(strict=True))


def test_auto_compiles_only_on_a_gpu_and_falls_back_to_plain() -> None:
    lines: list[str] = []
    assert pick_kernels("auto", torch.device("cpu"), torch.float32, lines.append) is PLAIN
    assert pick_kernels(False, torch.device("cuda"), torch.float32, lines.append) is PLAIN
    assert not lines
    if not torch.cuda.is_available():  # with a GPU it may succeed
        assert pick_kernels("auto", torch.device("cuda"), torch.bfloat16, lines.append) is PLAIN
        assert "compiler fails here" in lines[0]
        with pytest.raises(UserError) as caught:
            pick_kernels(True, torch.device("cuda"), torch.bfloat16, lines.append)
        assert caught.value.problems[0].place == "torch_compile"
