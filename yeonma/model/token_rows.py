"""The rows of embedding and head that belong to new tokens: added where they are lacking, begun, and trained by PEFT.

PEFT trains single rows by `trainable_token_indices`: of the embedding and, where the head is not tied to it, of the
head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from yeonma.errors import UserError
from yeonma.messages import tr

PLACE = "new_tokens"
TOLERANCE = 1e-5
"""How far an output of PEFT's layer may be from that of the layer itself, as a fraction of the largest number."""


def embedding_paths(model: Any) -> list[str]:
    """The paths of the model's embedding and head, in the order of the model."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [path for path, module in model.named_modules() if any(module is layer for layer in layers)]


def resize_embeddings(model: Any, rows: int) -> None:
    """Gives embedding and head this number of rows. New ones have no numbers that mean anything."""
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in _layers(model):
        layer.requires_grad_(False)


def begin_token_rows(model: Any, token_ids: Sequence[int]) -> None:
    """Gives new tokens their first rows: the mean of the rows of all tokens before them, in embedding and head (Hewitt
    2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Adds rows where the model has too few.

    Raises UserError for a head with a bias, which PEFT's layer for trained tokens leaves out.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        what = tr("the model's head has a bias, which PEFT's layer for trained tokens leaves out")
        raise UserError(what, place=PLACE, cure=tr("leave it out, or train another base model"))
    known, rows = min(token_ids), model.get_input_embeddings().weight.shape[0]
    if max(token_ids) >= rows:
        resize_embeddings(model, max(token_ids) + 1)
    for weight in {layer.weight: None for layer in _layers(model)}:
        if weight.device.type != "meta":
            index = torch.tensor(token_ids, device=weight.device)
            weight.data[index] = weight.data[:known].mean(0, dtype=torch.float32).to(weight.dtype)


def token_fields(model: Any, token_ids: Sequence[int], whole: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that train these rows. `whole`: modules that are trained whole anyway."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    layers = [embedding] if tied or head is None else [embedding, head]
    paths = {module: path for path, module in model.named_modules()}
    indices = {paths[layer]: list(token_ids) for layer in layers if paths[layer] not in whole}
    return {"trainable_token_indices": indices} if token_ids and indices else {}


def token_adapters(model: Any) -> Iterator[tuple[str, Any]]:
    """PEFT's layers for trained tokens, with the paths of the modules that they wrap."""
    for path, module in model.named_modules():
        if path.endswith("token_adapter") and hasattr(module, "token_indices"):
            yield path.rpartition(".")[0], module


def trained_rows(model: Any) -> int:
    """How many tokens have rows of their own in an adapter of the model."""
    indices = [ids for _, layer in token_adapters(model) for ids in layer.token_indices.values()]
    return max(map(len, indices), default=0)


def check_token_rows(model: Any, token_ids: Sequence[int]) -> None:
    """Tries PEFT's layers for trained tokens before any step: they must compute what the layers themselves do.

    Raises UserError if one does not: it has a forward of its own, which PEFT does not know.
    """
    for path, layer in token_adapters(model):
        base = layer.base_layer
        if base.weight.device.type == "meta":
            return
        if isinstance(base, nn.Embedding):
            x: torch.Tensor = torch.tensor([0, *token_ids[:8]], device=base.weight.device)
        else:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(3, base.weight.shape[1], generator=generator).to(base.weight)
        with torch.no_grad():
            own, found = base(x), layer(x)
        if not torch.allclose(own, found, rtol=0, atol=TOLERANCE * float(own.abs().max())):
            what = tr(
                "{path} is a {name}, and PEFT's layer for trained tokens computes something else",
                path=path,
                name=type(base).__name__,
            )
            raise UserError(what, place=PLACE, cure=tr("leave it out, or train another base model"))


def missing_rows(model: Any, indices: Mapping[str, Sequence[int]]) -> int:
    """How many rows the model lacks for trained tokens, by the paths of embedding and head; 0 also if the tokens leave
    rows between them and the model's without numbers."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    needed = {embedding} if head is None or head.weight is embedding.weight else {embedding, head}
    by_layer = {model.get_submodule(path): set(ids) for path, ids in indices.items()}
    counts = {max(by_layer.get(layer, {-1})) + 1 - rows for layer in needed}
    count = max(counts)
    if count <= 0 or any(
        not by_layer.get(layer, set()).issuperset(range(rows, rows + count)) for layer in needed
    ):
        return 0
    return count


def _layers(model: Any) -> list[Any]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer for layer in layers if layer is not None]
