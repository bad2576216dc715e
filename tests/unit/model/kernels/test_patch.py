"""The report of patched modules. If a new version of transformers renames a class or attribute, a count is lower."""

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
    # another function rotates its positions
    "gpt_oss": "RMSNorm 5/5, rotary 0/2, LoRA 8/8, last layer 1/1, attention plain",
    # gate and up are one layer
    "phi3": "RMSNorm 5/5, SwiGLU 0/2, rotary 2/2, LoRA 8/8, last layer 1/1, attention sdpa",
    "gpt2": "LoRA 0/8, last layer 0/1, attention cpu_cascade",
}


@pytest.fixture(autouse=True)
def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the same counts on every machine."""
    monkeypatch.setattr(lora, "has_onednn", lambda: False)


def report_of(model: Any) -> str:
    base = model.get_base_model()
    return str(patch_kernels(base, support=check_forest_support(base), trim_last=True))


@pytest.mark.parametrize("family", REPORTS)
def test_report_counts_patched_modules_and_candidates_of_each_kind(family: str) -> None:
    assert report_of(with_lora(tiny_model(family))) == REPORTS[family]


def test_norm_with_an_unknown_epsilon_name_is_counted_but_not_patched() -> None:
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


def test_mlp_with_unknown_layer_names_is_counted_but_not_patched() -> None:
    class DenseFeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))

    assert str(patch_kernels(DenseFeedForward())) == "SwiGLU 0/1"


def test_report_has_onednn_layers_on_the_cpu_and_no_attention_without_support(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora, "has_onednn", lambda: True)
    report = patch_kernels(tiny_model("llama"))
    assert str(report) == "RMSNorm 5/5, SwiGLU 2/2, rotary 2/2, oneDNN 15/15"


def test_report_counts_layers_per_attention_backend_and_names_compilation() -> None:
    counts = (KernelCount("RMSNorm", 3, 4),)
    report = KernelReport(counts, ("varlen", "flex", "varlen"), is_compiled=True)
    assert str(report) == "RMSNorm 3/4, attention varlen 2/3, attention flex 1/3, compiled by PyTorch"
    assert patch_kernels(tiny_model("llama"), compiled()).is_compiled
    assert not patch_kernels(tiny_model("llama"), PLAIN).is_compiled
