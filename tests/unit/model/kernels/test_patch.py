"""The report of what was patched: a class or attribute that the next transformers renames shows as a lower count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models import tiny_model, with_lora
from yeonma.model.forest_support import check_forest_support
from yeonma.model.kernels import lora
from yeonma.model.kernels.elementwise import PLAIN, compiled
from yeonma.model.kernels.patch import KernelCount, KernelReport, patch_kernels

REPORTS = {
    "llama": "RMSNorm 5/5, SwiGLU 2/2, rotary 2/2, LoRA 14/14, last layer 1/1, attention cpu_cascade",
    "qwen3": "RMSNorm 9/9, SwiGLU 2/2, rotary 2/2, LoRA 14/14, last layer 1/1, attention cpu_cascade",
    "qwen3_moe": "RMSNorm 9/9, rotary 2/2, LoRA 8/14, last layer 1/1, attention cpu_cascade",
    # its MLPs are GeGLU, its attention has soft-capping
    "gemma2": "RMSNorm 9/9, SwiGLU 0/2, rotary 2/2, LoRA 14/14, last layer 1/1, attention plain",
    # its positions are rotated by another function
    "gpt_oss": "RMSNorm 5/5, rotary 0/2, LoRA 8/8, last layer 1/1, attention plain",
    # gate and up are one layer
    "phi3": "RMSNorm 5/5, SwiGLU 0/2, rotary 2/2, LoRA 8/8, last layer 1/1, attention sdpa",
    "gpt2": "LoRA 0/8, last layer 0/1, attention cpu_cascade",
}


@pytest.fixture(autouse=True)
def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same counts on every machine."""
    monkeypatch.setattr(lora, "has_onednn", lambda: False)


def report_of(model: Any) -> str:
    base = model.get_base_model()
    return str(patch_kernels(base, support=check_forest_support(base), trim_last=True))


@pytest.mark.parametrize("family", REPORTS)
def test_what_was_patched_of_each_kind_out_of_how_many(family: str) -> None:
    assert report_of(with_lora(tiny_model(family))) == REPORTS[family]


def test_an_attribute_of_another_name_shows() -> None:
    class TinyRMSNorm(nn.Module):
        def __init__(self, epsilon_name: str) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8) + 0.5, requires_grad=False)
            setattr(self, epsilon_name, 1e-5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            epsilon = self.__dict__.get("eps", self.__dict__.get("tolerance"))
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * self.weight

    model = nn.ModuleList([TinyRMSNorm("eps"), TinyRMSNorm("tolerance")])
    assert str(patch_kernels(model)) == "RMSNorm 1/2"


def test_a_class_and_layers_of_other_names_show() -> None:
    class DenseFeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))

    assert str(patch_kernels(DenseFeedForward())) == "SwiGLU 0/1"


def test_on_the_cpu_oneDNN_and_without_a_forward_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "has_onednn", lambda: True)
    report = patch_kernels(tiny_model("llama"))
    assert str(report) == "RMSNorm 5/5, SwiGLU 2/2, rotary 2/2, oneDNN 15/15"


def test_layers_of_several_backends_are_counted_and_compiled_kernels_are_named() -> None:
    counts = (KernelCount("RMSNorm", 3, 4),)
    report = KernelReport(counts, ("varlen", "flex", "varlen"), is_compiled=True)
    assert str(report) == "RMSNorm 3/4, attention varlen 2/3, attention flex 1/3, compiled by PyTorch"
    assert patch_kernels(tiny_model("llama"), compiled()).is_compiled
    assert not patch_kernels(tiny_model("llama"), PLAIN).is_compiled
