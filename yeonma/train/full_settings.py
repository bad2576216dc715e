"""What does not go with full fine-tuning, said before anything costs time. No torch here."""

from __future__ import annotations

from typing import Any

from yeonma.config.settings import ADAPTER_SETTINGS, ModelSettings, RunConfig
from yeonma.errors import Problem, UserError
from yeonma.messages import tr
from yeonma.model.published import Published

PLACE = "train full"


def check_full(config: RunConfig, continued: str | None) -> None:
    """Raises UserError with all settings that do not go with `train` full. `continued`: the folder of the adapter to
    continue, if any."""
    model = config.model
    if model.train != "full":
        return
    problems = [
        Problem(
            tr("it shapes an adapter, and full fine-tuning has none"),
            name,
            tr("leave it out, or use --train lora"),
        )
        for name in sorted(ADAPTER_SETTINGS & config.given)
    ]
    if continued is not None:
        what = tr(
            "{continued} is an adapter, and full fine-tuning trains the weights of a model",
            continued=continued,
        )
        problems.append(
            Problem(what, PLACE, tr("merge it with `yeonma merge`, and give the result as --base_model"))
        )
    if model.quantization != "none":
        what = tr("quantised weights cannot be trained")
        problems.append(
            Problem(what, f"quantization {model.quantization}", tr("leave it out, or use --train lora"))
        )
    if model.shard and config.preference is not None and "kto" in str(config.preference.loss):
        what = tr("kto keeps a copy of the weights as they were, which is not sharded in this version")
        problems.append(Problem(what, "shard true", tr("leave it out, or choose another --loss")))
    if model.shard and config.step.optimizer != "adamw":
        what = tr("8-bit averages of sharded weights are not supported in this version")
        problems.append(
            Problem(what, f"optimizer {config.step.optimizer}", tr("use adamw, or leave out shard"))
        )
    if model.dtype == "float16":
        what = tr("in float16 the gradients of weights are lost, because they are too small for it")
        problems.append(Problem(what, "dtype float16", tr("use bfloat16 or float32")))
    if problems:
        raise UserError(problems)


def check_full_base(model: ModelSettings, model_config: Any, published: Published | None) -> None:
    """Raises UserError for a base whose weights cannot all be trained. `published`: how its files are quantised."""
    if model.train != "full":
        return
    from yeonma.model.language_part import multimodal_class

    problems = []
    if multimodal_class(model_config) is not None:
        what = tr(
            "it also reads images or sound; only its language model is loaded, so a model written "
            "anew lacks them"
        )
        problems.append(
            Problem(what, model.base_model, tr("use --train lora; yeonma merge keeps all of the checkpoint"))
        )
    if published is not None:
        what = tr(
            "its weights are published as {published}, and full fine-tuning trains whole weights",
            published=published,
        )
        problems.append(
            Problem(what, model.base_model, tr("give the unquantised model, or use --train lora"))
        )
    if getattr(model_config, "auto_map", None):
        what = tr("it comes with its own Python code, which a model written anew would lack in this version")
        problems.append(Problem(what, model.base_model, tr("use --train lora")))
    if problems:
        raise UserError(problems)
