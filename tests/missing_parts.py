"""The package as it would be on Windows, and with a version of PyTorch that has none of its private parts.

Run in a fresh process by tests/unit/test_missing_parts.py. Only Yeonma's own imports fail: what other packages do where
something is missing is theirs.
"""

from __future__ import annotations

import builtins
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

POSIX_ONLY = ("fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
UNSTABLE = (
    "torch._inductor",
    "torch.distributed.distributed_c10d",
    "torch.distributed.fsdp",
    "torch.distributed.rendezvous",
    "torch.nn.attention.flex_attention",
    "torch.nn.attention.varlen",
    "torch.utils._python_dispatch",
    "torch.utils._pytree",
)
OPERATORS = (
    "_linear_pointwise",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "silu_backward",
)


def hide_from_yeonma(names: Sequence[str]) -> None:
    """Imports of these modules fail where Yeonma's code makes them."""
    before = builtins.__import__

    def without(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        importer = str((globals or {}).get("__name__", ""))
        if importer.partition(".")[0] == "yeonma" and name in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return before(name, globals, locals, fromlist or (), level)

    builtins.__import__ = without


def hide_operators(names: Sequence[str]) -> None:
    import torch

    del torch._scaled_mm
    spaces: Any = type(torch.ops.aten)
    before = spaces.__getattr__

    def without(space: Any, name: str) -> Any:
        if name in names:
            raise AttributeError(f"'_OpNamespace' object has no attribute '{name}'")
        return before(space, name)

    for space in (torch.ops.aten, torch.ops.mkldnn):
        for name in names:
            vars(space).pop(name, None)  # looked up before
    spaces.__getattr__ = without


def import_everything() -> int:
    import yeonma

    modules = [module.name for module in pkgutil.walk_packages(yeonma.__path__, "yeonma.")]
    for name in modules:
        if not name.endswith("__main__"):  # runs the command line
            importlib.import_module(name)
    return len(modules)


def train_and_trace() -> None:
    """What private parts make faster goes on without them; what cannot be done is refused in words."""
    import numpy as np
    import pytest
    import torch

    from tests.models import tiny_model, with_lora
    from yeonma.batch.forest import lay_out
    from yeonma.errors import UserError
    from yeonma.model.attention.cpu_cascade import cpu_kernels
    from yeonma.model.attention.flex import has_flex
    from yeonma.model.attention.varlen import varlen_attention
    from yeonma.model.forest_support import check_forest_support, tiny_sequences
    from yeonma.model.kernels.elementwise import PLAIN, swiglu
    from yeonma.model.kernels.linear import has_onednn
    from yeonma.model.kernels.patch import patch_kernels, pick_kernels
    from yeonma.model.load import LoraShape
    from yeonma.model.logprobs import trained_logprobs
    from yeonma.model.memory_trace import trace
    from yeonma.model.quantized import multiplies_fp8
    from yeonma.policy import blueprint

    assert cpu_kernels() is None and not has_onednn() and not has_flex() and varlen_attention() is None
    assert not multiplies_fp8(torch.device("cuda"))
    remarks: list[str] = []
    assert pick_kernels("auto", torch.device("cuda"), torch.float32, remarks.append) == PLAIN and remarks

    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: swiglu(x.float(), x.float()), x, eps=1e-2, atol=1e-2)

    model = with_lora(tiny_model("llama")).get_base_model()
    how = check_forest_support(model)
    assert how.forest and how.head is not None, how.why_not
    sequences = tiny_sequences(model.config.vocab_size, 0)
    forest = lay_out(sequences, [np.ones(len(sequence), dtype=bool) for sequence in sequences])
    expected = trained_logprobs(model, forest, None)
    patch_kernels(model)
    found = trained_logprobs(model, forest, how.head)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    found.sum().backward()
    assert all(each.grad.isfinite().all() for each in model.parameters() if each.requires_grad)

    drawn = blueprint(model.config, torch.float32, LoraShape(4, 8, 0.0, "all-linear"))
    with pytest.raises(UserError, match="does not allow tracing the operators that a model calls"):
        trace(drawn, forest, has_gradients=False)


def main() -> None:
    hide_from_yeonma((*POSIX_ONLY, *UNSTABLE))
    hide_operators(OPERATORS)
    print(import_everything(), "modules imported")
    train_and_trace()
    print("trained without private operators")


if __name__ == "__main__":
    main()
