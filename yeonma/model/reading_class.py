"""The class of a model that is changed as soon as it is built, before transformers reads weights into what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def class_with(model_class: Any, change: Callable[[Any], None]) -> Any:
    """A class of the same name and module, each of whose models is given to `change` when it has been built."""

    def make(self: Any, config: Any, *args: Any, **options: Any) -> None:
        model_class.__init__(self, config, *args, **options)
        change(self)

    return type(
        model_class.__name__, (model_class,), {"__init__": make, "__module__": model_class.__module__}
    )
