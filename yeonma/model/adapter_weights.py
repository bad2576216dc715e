"""The one place where PEFT gets an adapter from a folder, whoever made it.

PEFT passes over tensors that it does not find, and those that it does not know. Here the file must have exactly the
tensors that its config means on this base, in their shapes, with finite numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from yeonma.errors import Problem, UserError
from yeonma.files import user_path
from yeonma.messages import counted, tr
from yeonma.model.adapter_config import SAVE_AGAIN, WEIGHTS_FILE, read_adapter_config
from yeonma.model.adapter_file import (
    DOWNLOAD,
    StoredTensor,
    check_adapter_files,
    read_header,
    some,
)
from yeonma.model.language_part import left_out
from yeonma.model.peft_targets import exact_names, exact_targets, read_config
from yeonma.model.token_rows import embedding_paths, missing_rows, resize_embeddings
from yeonma.model.whole_modules import keep_float32

PREFIX = "base_model.model."
"""Of the names in the file."""
_COPIES = ("modules_to_save.", "original_module.", "base_layer.")
"""What PEFT also writes of a whole module, besides its trained weights."""
_COPIES_OF_BASE = ("original_module.", "base_layer.", "token_adapter.base_layer.")
_WRAPPED = ("base_layer", "token_adapter", "original_module")
"""Names of what PEFT's layers wrap, from the inside out."""
Shapes = Mapping[str, tuple[int, ...]]


def load_adapter(model: Any, folder: str, *, trainable: bool, dropout: float | None = None) -> Any:
    """A PeftModel with the adapter of a folder. `dropout` replaces the one that it was trained with.

    An adapter with tokens of its own gives the model's embedding and head more rows. Raises UserError if the folder's
    files are damaged or of a kind that is not supported, and if they do not fit the model.
    """
    check_adapter_files(folder)
    header = read_header(folder)
    add_rows(model, header, folder)
    with _misfits_as_user_errors(folder, model):
        peft_model = add_lora_of(model, folder, dropout, trainable=trainable, header=header)
        load_weights(peft_model, folder)
    if not trainable:
        peft_model.eval()
    return peft_model


def load_additional_adapter(peft_model: Any, folder: str, name: str) -> None:
    """Loads the adapter of a folder in addition, selectable by `name`. Raises UserError as `load_adapter`, and if PEFT
    cannot hold both adapters at once."""
    check_adapter_files(folder)
    header = read_header(folder)
    base = peft_model.get_base_model()
    if added_rows(base, folder, header) > 0:
        what = tr("it has tokens of its own, so its base has more rows than that of the other adapters")
        raise UserError(what, place=folder, cure=tr("load it by itself"))
    with _misfits_as_user_errors(folder, base):
        config, exact = _config_for(base, folder, header)
        others = [set(one.target_parameters or ()) for one in peft_model.peft_config.values()]
        own = set(config.target_parameters or ())
        if own and any(other and other != own for other in others):
            what = tr(
                "its adapters are on other parameters of experts or routers than those of the first adapter"
            )
            raise UserError(what, place=folder, cure=tr("load them one by one"))
        config.inference_mode = True
        with exact_targets() if exact else nullcontext():
            peft_model.add_adapter(name, config)
        keep_float32(base)
        load_weights(peft_model, folder, name)


def add_lora_of(
    model: Any,
    folder: str,
    dropout: float | None = None,
    *,
    trainable: bool = True,
    header: Mapping[str, StoredTensor] | None = None,
    empty: bool = False,
) -> Any:
    """A PeftModel with a new adapter that has the config of the one in `folder`, but not its weights. `dropout` as for
    `load_adapter`. `header`: that of its weights file, which may hold whole modules that the config does not name.
    `empty`: the adapter's weights take no memory and have no values.

    Raises UserError if the model does not have its layers, and for a dropout that they do not take.
    """
    from peft import get_peft_model

    with _misfits_as_user_errors(folder, model):
        config, exact = _config_for(model, folder, header or {})
        config.inference_mode = not trainable
        if dropout is not None:
            _check_dropout(config, dropout, folder)
            config.lora_dropout = dropout
        with exact_targets() if exact else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The PEFT config's `base_model_name_or_path` was renamed")
            peft_model = get_peft_model(model, config, low_cpu_mem_usage=empty)
    keep_float32(model)
    return peft_model


def check_fits(model: Any, folder: str, dropout: float | None = None) -> None:
    """Puts the adapter of a folder on a base without weights, and checks the tensors of its file against it. Raises
    UserError as `load_adapter`, but for numbers that are not finite."""
    header = read_header(folder)
    add_rows(model, header, folder)
    with _misfits_as_user_errors(folder, model):
        peft_model = add_lora_of(model, folder, dropout, header=header, empty=True)
        _check_tensors(peft_model, header, folder, "default")


def load_weights(peft_model: Any, folder: str | Path, name: str = "default") -> None:
    """Loads the weights of an adapter folder, or of a checkpoint, into the adapter `name`, which has its config.

    Raises UserError unless the file has exactly the tensors that the adapter needs, all finite.
    """
    from peft import set_peft_model_state_dict

    header = read_header(folder)
    copies = _check_tensors(peft_model, header, folder, name)
    path = user_path(folder) / WEIGHTS_FILE
    device = str(peft_model.device if peft_model.device.type != "meta" else "cpu")
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(path, "pt", device=device) as file:
        for key in header:
            tensor = file.get_tensor(key)
            if not tensor.isfinite().all():
                raise UserError(
                    tr("NaN or infinity in {key}", key=key), place=str(path), cure=tr("download it again")
                )
            if key in copies:
                _check_copy(peft_model, key, tensor, file, path)
            else:
                tensors[key] = tensor
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    expected = expected_shapes(peft_model, name)
    # transformers' rules for the names of earlier versions may break those of this one, as Laguna's shared experts
    is_broken = shapes == expected and _as_peft_renames(peft_model, shapes, name) != expected
    with exact_names() if is_broken else nullcontext():
        result: Any = set_peft_model_state_dict(peft_model, tensors, adapter_name=name)
    if result.unexpected_keys:  # the check of the names does not let this happen
        raise RuntimeError(f"PEFT did not load {some(sorted(result.unexpected_keys))}")


def added_rows(model: Any, folder: str | Path, header: Mapping[str, StoredTensor] | None = None) -> int:
    """The rows that the model's embedding lacks for an adapter with tokens of its own; negative if it has more.
    `header`: that of the folder's weights file.

    They stand in the file's copy of the embedding, or it trains all of them.
    """
    header = read_header(folder) if header is None else header
    rows = {stored_rows for _, stored_rows in _embedding_rows(model, header)}
    own: int = model.get_input_embeddings().weight.shape[0]
    return max(rows) - own if rows else missing_rows(model, _trained_tokens(model, folder, header))


def _trained_tokens(
    model: Any, folder: str | Path, header: Mapping[str, StoredTensor]
) -> dict[str, list[int]]:
    """The tokens whose rows are in the file, by the path of the layer."""
    given = read_adapter_config(folder).keys.get("trainable_token_indices") or {}
    paths = {module: path for path, module in model.named_modules()}
    by_name = given if isinstance(given, dict) else {paths[model.get_input_embeddings()]: given}
    return {
        path: ids
        for path in embedding_paths(model)
        for name, ids in by_name.items()
        if f".{path}".endswith(f".{name}")
        and f"{PREFIX}{path}.token_adapter.trainable_tokens_delta" in header
    }


def _embedding_rows(model: Any, header: Mapping[str, StoredTensor]) -> Iterator[tuple[str, int]]:
    """The weights in the file that stand for the whole embedding or head, and their rows."""
    for path in embedding_paths(model):
        for infix in ("", "modules_to_save.", *_COPIES_OF_BASE):
            tensor = header.get(f"{PREFIX}{path}.{infix}weight")
            if tensor is not None and len(tensor.shape) == 2:
                yield f"{path}.{infix}weight", tensor.shape[0]


def add_rows(model: Any, header: Mapping[str, StoredTensor], folder: str) -> None:
    """Gives embedding and head the rows of an adapter with tokens of its own. Those that it trains are 0 without it."""
    count = added_rows(model, folder, header)
    if count == 0:
        return
    rows: int = model.get_input_embeddings().weight.shape[0]
    different = {stored for _, stored in _embedding_rows(model, header)} - {rows + count}
    if count < 0 or different:
        what = tr("its embedding has {rows} rows, the base's {rows2}", rows=rows + count, rows2=rows)
        raise UserError(what, place=folder, cure=_other_base(folder, model))
    resize_embeddings(model, rows + count)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    for path in embedding_paths(model):
        layer = model.get_submodule(path)
        for weight in layer.parameters():
            if layer is layers[0] or weight is not layers[0].weight:
                weight.data[rows:] = _stored_rows(folder, header, path, rows, weight)


def _stored_rows(
    folder: str, header: Mapping[str, StoredTensor], path: str, rows: int, weight: torch.Tensor
) -> torch.Tensor:
    """The rows behind the first `rows` in the file's copy of the base's embedding or head; 0 if there is none."""
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    for infix in _COPIES_OF_BASE:
        key = f"{PREFIX}{path}.{infix}weight"
        if weight.ndim == 2 and key in header and header[key].shape[1:] == weight.shape[1:]:
            with safe_open(user_path(folder) / WEIGHTS_FILE, "pt") as file:
                stored: torch.Tensor = file.get_slice(key)[rows:]
            return zero if weight.device.type == "meta" else stored.to(weight)
    return zero


def _config_for(model: Any, folder: str, header: Mapping[str, StoredTensor]) -> tuple[Any, bool]:
    """As `read_config`. Embedding and head that the file holds whole without being named are whole modules too: PEFT
    would load them into the base itself, which other adapters may share."""
    config, exact = read_config(model, folder)
    named = list(config.modules_to_save or ())
    for path in embedding_paths(model):
        is_named = any(f".{path}".endswith(f".{name}") for name in named)
        if f"{PREFIX}{path}.weight" in header and not is_named:
            config.modules_to_save = [*(config.modules_to_save or ()), path]
    _check_token_indices(model, config, folder)
    return config, exact


def _check_token_indices(model: Any, config: Any, folder: str) -> None:
    given = config.trainable_token_indices
    listed = [] if given is None else given.values() if isinstance(given, dict) else [given]
    highest = max((number for ids in listed for number in ids), default=-1)
    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        what = tr("it trains the token {highest}, and the base has {rows} rows", highest=highest, rows=rows)
        raise UserError(what, place=folder, cure=_other_base(folder, model))


def _check_dropout(config: Any, dropout: float, folder: str) -> None:
    if dropout > 0 and config.target_parameters:
        what = tr(
            "PEFT has none for parameters, and the adapter in {folder} is on {target_parameters}",
            folder=folder,
            target_parameters=config.target_parameters[0],
        )
        raise UserError(what, place="lora_dropout", cure=tr("use --lora_dropout 0"))


def expected_shapes(peft_model: Any, name: str = "default") -> dict[str, tuple[int, ...]]:
    """The tensors that PEFT writes for an adapter of the model, by their names in the file."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _check_tensors(
    peft_model: Any, header: Mapping[str, StoredTensor], folder: str | Path, name: str
) -> frozenset[str]:
    """Raises UserError unless the file has exactly the tensors that the adapter needs. Returns the names of those that
    are copies of others, or of the base."""
    expected = expected_shapes(peft_model, name)
    stored = {key: tensor.shape for key, tensor in header.items()}
    copies = frozenset(
        key
        for key in stored.keys() - expected.keys()
        if _is_copy(key, expected) or _twin(peft_model, key) in stored
    )
    own = {key: shape for key, shape in stored.items() if key not in copies}
    if own != expected and _as_peft_renames(peft_model, own, name) != expected:
        cure = _other_base(folder, peft_model)
        if left_out(peft_model):
            cure = tr(
                "{cure}; of a checkpoint that also reads images or sound, an adapter has to be on the language "
                "model alone, with its names in the whole checkpoint",
                cure=cure,
            )
        raise UserError(misfits(own, expected, str(user_path(folder) / WEIGHTS_FILE), cure))
    return copies


def misfits(stored: Shapes, expected: Shapes, place: str, cure: str) -> list[Problem]:
    """What differs between the tensors of a file and those that an adapter needs on its base."""
    problems = []
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing:
        counts = {"tensors": counted(len(expected), "tensor"), "names": some(missing)}
        what = (
            tr("1 of {tensors} is missing: {names}", **counts)
            if len(missing) == 1
            else tr("{missing} of {tensors} are missing: {names}", missing=len(missing), **counts)
        )
        problems.append(Problem(what, place, cure))
    if extra:
        what = tr(
            "the base has no layer for {extra} of its tensors: {extra2}", extra=len(extra), extra2=some(extra)
        )
        problems.append(Problem(what, place, cure))
    both = expected.keys() & stored.keys()
    if wrong := sorted(key for key in both if tuple(expected[key]) != tuple(stored[key])):
        places = {
            "tensors": counted(len(expected), "tensor"),
            "names": some(wrong),
            "stored": tuple(stored[wrong[0]]),
            "expected": tuple(expected[wrong[0]]),
        }
        what = (
            tr(
                "1 of {tensors} has another shape: {names}; the first has shape {stored}, but the base needs "
                "{expected}",
                **places,
            )
            if len(wrong) == 1
            else tr(
                "{wrong} of {tensors} have another shape: {names}; the first has shape {stored}, but the base "
                "needs {expected}",
                wrong=len(wrong),
                **places,
            )
        )
        problems.append(Problem(what, place, cure))
    return problems


def _is_copy(key: str, expected: Shapes) -> bool:
    """Whether PEFT also writes this, beside the adapter's own tensors: a trained module a second time, or a weight of
    the base that the adapter replaces or adds to."""
    for infix in _COPIES:
        module, found, rest = key.rpartition(f".{infix}")
        if not found:
            continue
        if infix != "base_layer." and f"{module}.{rest}" in expected:
            return True
        if infix == "base_layer.":
            module = module.removesuffix(".token_adapter")
            return any(one.startswith(f"{module}.") for one in expected)
    return False


def _twin(peft_model: Any, key: str) -> str | None:
    """The name of the same tensor of the embedding, if this is one of a head that is tied to it."""
    model = peft_model.get_base_model()
    embedding, head = (
        plain_layer(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if head is None or getattr(head, "weight", None) is not embedding.weight:
        return None
    paths = {module: _own(path) for path, module in model.named_modules()}
    before, after = f"{PREFIX}{paths[head]}.", f"{PREFIX}{paths[embedding]}."
    return after + key.removeprefix(before) if key.startswith(f"{before}token_adapter.") else None


def _check_copy(
    peft_model: Any,
    key: str,
    tensor: torch.Tensor,
    file: Any,
    path: Path,
) -> None:
    """Raises UserError if a copy differs from what it is a copy of: dropping it would change the model."""
    own = key.replace(".modules_to_save.", ".") if ".modules_to_save." in key else _twin(peft_model, key)
    if own is not None:
        original = file.get_tensor(own)
        if not torch.equal(tensor, original):
            what = tr("{key} differs from {own}", key=key, own=own)
            raise UserError(what, place=str(path), cure=DOWNLOAD)
        return
    module, _, leaf = key.removeprefix(PREFIX).rpartition(".")
    module = _own(module)
    layer = plain_layer(peft_model.get_base_model().get_submodule(module))
    weight = getattr(layer, leaf).detach()
    if weight.device.type == "meta" or not weight.is_floating_point():
        return
    is_same = weight.shape == tensor.shape and bool(
        ((weight.to(tensor.dtype) == tensor) | (weight == tensor.to(weight.dtype))).all()
    )
    if not is_same:
        what = tr("it changes the base's own {module}, beside the adapter", module=module)
        raise UserError(what, place=str(path), cure=SAVE_AGAIN)


def _own(path: str) -> str:
    """The path of a module of the base, without the names of PEFT's layers around it."""
    for infix in _WRAPPED:
        path = path.removesuffix(f".{infix}")
    return path


def plain_layer(layer: Any) -> Any:
    """The base's own module within PEFT's layers around it."""
    while True:
        children = {} if layer is None else dict(layer.named_children())
        inner = [name for name in _WRAPPED if name in children]
        if not inner:
            return layer
        layer = children[inner[0]]


def _as_peft_renames(peft_model: Any, stored: Shapes, name: str) -> Shapes | None:
    """The tensors as PEFT renames and joins those of earlier versions of transformers; None if it cannot."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    empty = {key: torch.empty(shape, device="meta") for key, shape in stored.items()}
    try:
        converted = convert_peft_adapter_state_dict_for_transformers(
            peft_model, peft_model.peft_config[name], empty, name
        )
        return {key: tuple(tensor.shape) for key, tensor in converted.items()}
    except Exception:  # foreign names may raise anything there
        return None


def _other_base(folder: str | Path, model: Any) -> str:
    named = read_adapter_config(folder).base
    base = getattr(model, "name_or_path", None)
    if named is not None and named != base:
        return tr("give the base model that it was trained on, {named}, or another adapter", named=named)
    return tr("give the base model that it was trained on, or download the adapter again")


@contextmanager
def _misfits_as_user_errors(folder: str, model: Any) -> Iterator[None]:
    """What PEFT refuses, as UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        trained_on = read_adapter_config(folder).base
        raise UserError(
            tr(
                "the adapter was trained on {trained_on} and does not fit {model}",
                trained_on=trained_on,
                model=getattr(model, "name_or_path", tr("the base")),
            ),
            place=folder,
            cure=tr("give the base model that the adapter was trained on"),
        ) from error
