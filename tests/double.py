"""Everything that a model and the project compute in float32, in float64: rounding is told from other differences."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Within it, each call that names float32 gets float64. The model must be in float64 already."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        return function(
            *(wide.get(x, x) if isinstance(x, torch.dtype) else x for x in args),
            **{
                name: wide.get(x, x) if isinstance(x, torch.dtype) else x
                for name, x in (kwargs or {}).items()
            },
        )
