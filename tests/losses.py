"""Every preference loss, and what changes losses, as settings of `yeonma dpo` on small data."""

from __future__ import annotations

from pathlib import Path

from tests.pairs import labelled, pairs
from tests.runs import write_jsonl
from yeonma.data.task import PAIRS, task_for_loss
from yeonma.train.preference_losses import LOSSES, preference_loss

LOSS_SETTINGS: dict[str, dict[str, object]] = {
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.001},
    "cpo": {"sft_weight": 0},
    "discopop": {"discopop_tau": 1.0},  # with the default it rises with the margin near 0
}
FEATURES: dict[str, dict[str, object]] = {
    **{name: {"loss": name, **LOSS_SETTINGS.get(name, {})} for name in LOSSES},
    "sum of pairs": {"loss": "sigmoid:1,aot:0.5,aot_unpaired:0.5,sft:0.25"},
    "sum of labels": {"loss": "kto:1,bco:0.5"},
    "wpo": {"wpo_weights": True},
    "js": {"f_divergence": "js"},
    "forward_kl": {"f_divergence": "forward_kl"},
    "alpha": {"f_divergence": "alpha", "f_alpha": 0.3},
}
"""Every loss, and what changes losses, with settings that it needs."""


def rows_for(folder: Path, settings: dict[str, object]) -> Path:
    """Pairs or labelled answers, as the loss wants them."""
    task = task_for_loss(str(settings.get("loss", "sigmoid")))
    return write_jsonl(folder / "rows.jsonl", pairs(21) if task is PAIRS else labelled(21))


def compares(settings: dict[str, object]) -> bool:
    """Whether the loss has a reference."""
    return preference_loss(str(settings.get("loss", "sigmoid"))).needs_reference
