"""How a run writes the weights that it trains, and reads them back from a checkpoint: an adapter, or a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from yeonma.adapter import adapter_folder as adapters
from yeonma.adapter.full_model import not_finite_in, stored_shapes, write_full_model
from yeonma.adapter.samples import Samples
from yeonma.data.template import Template
from yeonma.errors import UserError, brief
from yeonma.messages import later, tr
from yeonma.model import adapter_weights, load
from yeonma.model.adapter_config import WEIGHTS_FILE
from yeonma.model.adapter_file import not_finite, read_header
from yeonma.model.sharding import whole_tensor
from yeonma.model.source import BaseSource
from yeonma.run_folder.checkpoint import AdapterWriter
from yeonma.run_folder.output_folder import adapter_bytes, model_bytes
from yeonma.tokenization.chat_template_export import ExportedChatTemplate
from yeonma.tokenization.example import TokenRules, answer_tokens
from yeonma.train.full_weights import load_trained
from yeonma.train.step import TrainState

MODEL = later("model")
DELETE_IT = tr("delete this checkpoint: the same command then continues from the one before")


@dataclass(frozen=True)
class SavedWeights:
    """The weights of a run on disk."""

    checkpoint: AdapterWriter
    """Writes the folder from which training can go on."""
    result: AdapterWriter
    """Writes what a finished run leaves behind. Of a model trained in bfloat16, checkpoints have the weights in
    float32 and the result has them in bfloat16."""
    load: Callable[[Path], None]
    """Loads a checkpoint's weights. Raises UserError if they do not fit this run."""
    check_best: Callable[[Path, Path], None]
    """Raises UserError if the weights of the first checkpoint, the best so far, do not have the shapes of those of the
    second, or numbers that are not finite."""


@dataclass(frozen=True)
class FolderParts:
    """What stands beside the weights in every folder of a run."""

    tokenizer: Any
    template: Template
    details: Mapping[str, Any]
    exported: ExportedChatTemplate
    samples: Samples | None


def saved_adapter(peft_model: Any, parts: FolderParts, trained: int) -> SavedWeights:
    """Of `trained` parameters."""

    def write(folder: Path) -> None:
        adapters.write_adapter(
            folder, peft_model, parts.tokenizer, parts.template, parts.details, parts.exported, parts.samples
        )

    writer = AdapterWriter(write, adapter_bytes(trained, parts.tokenizer))
    return SavedWeights(writer, writer, partial(_load_adapter, peft_model), _check_best_adapter)


def saved_model(state: TrainState, source: BaseSource, rules: TokenRules, parts: FolderParts) -> SavedWeights:
    """Of all weights of the state's model, whose base is `source`, trained with these `rules`."""
    eos = load.eos_tokens(state.model.generation_config)
    stop_ids = answer_tokens(parts.tokenizer, rules if parts.template.has_turns else None, eos).stop_ids
    names = {name: weight for name, weight in state.model.named_parameters()}
    copies = {names[name]: state.parameters[name] for name in state.rounded}
    gathered: dict[torch.Tensor, torch.Tensor] = {}

    def gather(weights: Mapping[torch.Tensor, torch.Tensor]) -> None:
        for weight in names.values() if state.sharded else ():
            whole = whole_tensor(weights.get(weight, weight), keep=state.group.first)
            if whole is not None:
                gathered[weight] = whole

    def write(folder: Path, weights: Mapping[torch.Tensor, torch.Tensor]) -> None:
        write_full_model(
            folder,
            state.model,
            gathered or weights,
            source,
            parts.tokenizer,
            parts.template,
            stop_ids,
            parts.details,
            parts.exported,
            parts.samples,
        )
        gathered.clear()

    in_checkpoint = model_bytes(state.parameters.values(), parts.tokenizer)
    as_result = model_bytes(names.values(), parts.tokenizer)
    return SavedWeights(
        AdapterWriter(partial(write, weights=copies), in_checkpoint, MODEL, partial(gather, copies)),
        AdapterWriter(partial(write, weights={}), as_result, MODEL, partial(gather, {})),
        partial(_load_model, state),
        _check_best_model,
    )


def _load_adapter(peft_model: Any, checkpoint: Path) -> None:
    with _as_unfit(checkpoint / WEIGHTS_FILE):
        adapter_weights.load_weights(peft_model, checkpoint)


def _check_best_adapter(best: Path, newest: Path) -> None:
    headers = []
    for folder in (best, newest):
        with _as_unfit(folder / WEIGHTS_FILE):
            headers.append(read_header(folder))
    tensors, expected = ({name: one.shape for name, one in header.items()} for header in headers)
    found = not_finite(best, headers[0]) if tensors == expected else []
    _check_like(tensors == expected, found, best / WEIGHTS_FILE, newest)


def _load_model(state: TrainState, checkpoint: Path) -> None:
    """By a second model on the CPU, whose files transformers reads as it reads those of any other model."""
    with _as_unfit(checkpoint):
        model = load.load_base(BaseSource(str(checkpoint)), torch.device("cpu"), torch.float32)
        try:
            load_trained(state.parameters, state.rounded, model)
        except (KeyError, RuntimeError) as error:
            raise UserError(str(error)) from error


def _check_best_model(best: Path, newest: Path) -> None:
    shapes = []
    for folder in (best, newest):
        with _as_unfit(folder):
            shapes.append(stored_shapes(folder))
    found = not_finite_in(best) if shapes[0] == shapes[1] else []
    _check_like(shapes[0] == shapes[1], found, best, newest)


def _check_like(is_equal: bool, not_finite_names: Sequence[str], place: Path, newest: Path) -> None:
    if not is_equal:
        raise unfit(place, tr("its layers or their shapes differ from those of {newest}", newest=newest.name))
    if not_finite_names:
        raise unfit(
            place,
            tr(
                "{not_finite_names} has numbers that are not finite",
                not_finite_names=brief(not_finite_names[0]),
            ),
        )


@contextmanager
def _as_unfit(path: Path) -> Iterator[None]:
    """The loader's errors, with the cure of a checkpoint."""
    try:
        yield
    except UserError as error:
        raise unfit(path, "; ".join(problem.what for problem in error.problems)) from error


def unfit(path: Path, why: str) -> UserError:
    """The message for a file that this run cannot go on with."""
    return UserError(
        tr("it does not fit this run: {why}", why=brief(" ".join(why.split()), 300)),
        place=str(path),
        cure=DELETE_IT,
    )
