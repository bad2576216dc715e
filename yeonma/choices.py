"""The words that settings take, where they are many."""

from __future__ import annotations

from typing import Literal

LrScheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
PreferenceLoss = Literal[
    "sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "simpo", "cpo", "orpo", "kto"
]
Checkpointing = bool | Literal["selective"]
AskedCheckpointing = bool | Literal["selective", "auto"]
Compiling = bool | Literal["auto"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Quantization = Literal["none", "int8", "nf4", "fp8"]
AskedQuantization = Literal["auto", "none", "int8", "nf4", "fp8"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
