"""Which layers a LoRA adapter reaches, by name and by part of the model.

A target layer is what LoRA adapts: a linear layer, or one parameter that holds a matrix of every routed expert. Its
part (attention, dense MLP, routed experts, router, vision tower ...) follows from the names and classes on the way to
it.
`resolve` takes names to layers, `coverage` says which layers of a model have an adapter.

PEFT alone goes by the last name of a layer. So `q_proj` would reach a vision tower, and in models whose experts
transformers has fused PEFT moves `gate_proj` to the experts wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from yeonma.errors import Problem, UserError, did_you_mean, either
from yeonma.messages import counted, later, tr
from yeonma.model.language_part import left_out, left_out_paths
from yeonma.model.layer_names import ALL_LINEAR as ALL_LINEAR
from yeonma.model.layer_names import EXCLUDED, TARGETS, unknown_layer
from yeonma.model.token_rows import trained_rows

PLACE = TARGETS
ATTENTION, MLP, DENSE_MLP = later("attention"), later("MLP"), later("dense MLP")
RECURRENT, OTHER = later("recurrent layers"), later("other layers")
SHARED, ROUTED, ROUTER = later("shared experts"), later("routed experts"), later("router")
VISION, AUDIO, PROJECTOR = later("vision tower"), later("audio tower"), later("projector")
HEAD = later("head")
PARTS = (
    *(ATTENTION, RECURRENT, MLP, DENSE_MLP, SHARED, ROUTED, ROUTER),
    *(OTHER, VISION, AUDIO, PROJECTOR, HEAD),
)
"""Parts of a model, in the order in which they are named. In English for code; `tr(it)` shows one."""
BY_NAME = {ROUTER, VISION, AUDIO, PROJECTOR, HEAD}
"""Parts that only their own name reaches."""

_TOWERS = {
    VISION: re.compile(r"vision|visual|image|(^|_)vit(_|$)", re.I),
    AUDIO: re.compile(r"audio|speech|sound", re.I),
    PROJECTOR: re.compile(r"projector|connector|merger|aligner|^mm_", re.I),
}
_RECURRENT = re.compile(
    r"mamba|linear_?attn|linear_?attention|lightning|delta|ssm|recurrent|lru|short_?conv|rwkv", re.I
)
_ATTENTION = re.compile(r"attn|attention|^[qkvo]_proj$", re.I)
_MLP = re.compile(r"mlp|ffn|feed_?forward|^fc|^w\d|gate_proj|up_proj|down_proj|dense|moe|mixer", re.I)
_MLP_BY_NAME = re.compile(r"mlp|ffn|feed_?forward", re.I)
"""Names of modules that settle it, where the model's own name is part of every class's (`RecurrentGemmaMlp`)."""
_BOTH = ("gate_proj", "up_proj")
"""What a fused gate_up_proj holds, as most models call it."""


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer, or the experts' matrices in one parameter."""

    path: str
    """Of the module; of `experts`, of the parameter."""
    part: str
    kind: Literal["linear", "weight", "experts"]
    """linear: PEFT adds the adapter to the layer's output. weight: the layer is called otherwise, or is no nn.Linear,
    so the adapter goes into its weight. experts: a parameter with a matrix for each expert, adapted in the same way."""
    keys: frozenset[str] = frozenset()
    """The names on its path by which its part must be named, if it is one of BY_NAME or routed experts."""
    in_files: tuple[str, ...] = ()
    """Of experts: what the matrices in this parameter are called in the base's files."""

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def block(self) -> str:
        """The model's layer that it belongs to: the path as far as the first number."""
        match = re.match(r"(.*?\.\d+)(\.|$)", self.path)
        return match[1] if match else self.path.rpartition(".")[0]

    @property
    def adapted(self) -> str:
        """The path of what gets the adapter: of the module or of the parameter."""
        return self.path if self.kind == "linear" else self.parameter

    @property
    def parameter(self) -> str:
        """The path of what PEFT's `target_parameters` name."""
        return self.path if self.kind == "experts" else f"{self.path}.weight"


def _own(path: str) -> str:
    """A path in the model with an adapter -> the path in the model without."""
    wrappers = ("base_layer", "original_module", "token_adapter")
    return ".".join(part for part in path.split(".") if part not in wrappers)


def _modules(model: Any) -> dict[str, nn.Module]:
    """The modules of the model itself by their paths, whether it has adapters or not."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if re.search(r"(^|\.)(lora_|modules_to_save(\.|$))", path):
            continue
        found[_own(path)] = module  # the wrapped layer comes after PEFT's layer around it
    return found


def module_paths(model: Any) -> list[str]:
    """The paths of the model's own modules, whether it has adapters or not."""
    return list(_modules(model))


def target_layers(model: Any) -> list[TargetLayer]:
    """All target layers of a transformers model, with or without adapters, in the order of the model."""
    modules = _modules(model)
    head = model.get_output_embeddings()
    heads = {_own(path) for path, module in model.named_modules() if module is head}
    names_in_files = _names_in_files(model)
    found = list(_target_layers(modules, heads, names_in_files))
    if any(layer.part == ROUTED for layer in found):
        return [replace(layer, part=DENSE_MLP) if layer.part == MLP else layer for layer in found]
    return found


def _target_layers(
    modules: dict[str, nn.Module], heads: set[str], names_in_files: dict[str, tuple[str, ...]]
) -> Iterator[TargetLayer]:
    for path, module in modules.items():
        part, keys = _part(path, modules, heads)
        if isinstance(module, nn.Linear | Conv1D):
            plain = part != ROUTER or type(module) is nn.Linear
            yield TargetLayer(
                path, part, "linear" if plain and _is_called_plainly(module) else "weight", keys
            )
            continue
        for name, weight in module.named_parameters(recurse=False):
            if part == ROUTER and name == "weight" and weight.ndim == 2:
                yield TargetLayer(path, part, "weight", keys)
            elif part == ROUTED and weight.ndim >= 2 and "bias" not in name and "scale" not in name:
                yield TargetLayer(f"{path}.{name}", part, "experts", keys, names_in_files.get(name, ()))


def _part(path: str, modules: dict[str, nn.Module], heads: set[str]) -> tuple[str, frozenset[str]]:
    """The part of a module, and the names on its path that name this part."""
    names = path.split(".")
    if path in heads:
        return HEAD, frozenset(names[-1:])
    for part, pattern in _TOWERS.items():
        if keys := frozenset(name for name in names if pattern.search(name)):
            return part, keys
    first = next((index for index, name in enumerate(names) if name.isdigit()), len(names) - 1)
    paths = [".".join(names[: index + 1]) for index in range(first + 1, len(names))]
    inner = names[first + 1 :]
    plain_attention = f"{_model_name(modules[''])}Attention"
    classes = [type(modules[one]).__name__ if one in modules else "" for one in paths]
    classes = ["Attention" if kind == plain_attention else kind for kind in classes]
    steps = list(zip(inner, paths, classes, strict=True))
    if keys := frozenset(name for name, one, kind in steps if _is_router(name, one, kind, modules)):
        return ROUTER, keys
    if any("shared" in name for name in inner) and not any(map(_ATTENTION.search, inner)):
        return SHARED, frozenset()
    if keys := frozenset(name for name, _, kind in steps if name == "experts" or "Experts" in kind):
        return ROUTED, keys
    if any(map(_MLP_BY_NAME.search, inner)):
        return MLP, frozenset()
    for part, pattern in ((RECURRENT, _RECURRENT), (ATTENTION, _ATTENTION), (MLP, _MLP)):
        if any(pattern.search(name) or pattern.search(kind) for name, _, kind in steps):
            return part, frozenset()
    return OTHER, frozenset()


def _model_name(model: nn.Module) -> str:
    """What the names of a model's classes begin with: `KimiLinear` of `KimiLinearForCausalLM`."""
    return re.sub(r"(For[A-Z]|LMHead|Model|TextModel).*", "", type(model).__name__)


def _is_router(name: str, path: str, kind: str, modules: dict[str, nn.Module]) -> bool:
    if "router" in name or "Router" in kind:
        return True
    beside_experts = path.rpartition(".")[0] + ".experts" in modules
    return (name == "gate" and beside_experts) or (name.endswith("_gate") and "expert" in name)


def _is_called_plainly(layer: Any) -> bool:
    """Whether a linear layer takes one tensor and returns one, so that PEFT can add to what it returns. A layer with a
    forward of its own is tried, without its weights."""
    if type(layer).forward == nn.Linear.forward or isinstance(layer, Conv1D) or hasattr(layer, "packed"):
        return True
    if not layer.weight.is_floating_point():
        return True  # quantised by another library, whose layers PEFT knows
    meta = {name: torch.empty_like(weight, device="meta") for name, weight in layer.named_parameters()}
    x = torch.empty(1, 3, layer.in_features, device="meta", dtype=layer.weight.dtype)
    try:
        result = torch.func.functional_call(layer, meta, (x,))
    except Exception:  # a model's own code may raise anything
        return False
    return isinstance(result, torch.Tensor) and result.shape == (1, 3, layer.out_features)


def _names_in_files(model: Any) -> dict[str, tuple[str, ...]]:
    """The parameters of fused experts -> what their matrices are called in the base's files."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for config in (model.config, model.config.get_text_config()):
        for entry in get_checkpoint_conversion_mapping(config.model_type) or ():
            sources, targets = (getattr(entry, name, ()) for name in ("source_patterns", "target_patterns"))
            if not isinstance(sources, list) or not isinstance(targets, list):
                continue
            if len(targets) == 1 and all(".experts." in source and "*" in source for source in sources):
                names = [source.removesuffix(".weight").rpartition(".")[2] for source in sources]
                found[targets[0].rpartition(".")[2]] = tuple(names)
    return found


# from names to layers


def resolve(model: Any, names: Sequence[str], *, experts: bool) -> list[TargetLayer]:
    """The layers that target names reach. `experts`: whether `all-linear`, and names that routed experts share with
    other layers, reach routed experts too.

    A name is the last part of a layer's path or several (`q_proj`, `self_attn.q_proj`), a module that contains layers
    (`shared_experts`, `vision_tower`), or a pattern with `*` and `?`. Routers, towers, projectors and the head need
    their own name in it. Raises UserError that lists all names which reach nothing.
    """
    all_layers, modules = target_layers(model), _modules(model)
    every = [layer for layer in all_layers if not _is_read_by_its_model(layer, model, modules)]
    names = [name.strip() for name in names if name.strip()]
    if not names:
        cure = tr("use all-linear, or name layers such as [q_proj, v_proj]")
        raise UserError(tr("it names no layer"), place=PLACE, cure=cure)
    all_linear = any(name.lower() == ALL_LINEAR for name in names)
    names = [name for name in names if name.lower() != ALL_LINEAR]
    spellings = {layer: _spellings(layer, every) for layer in every}
    problems = [
        _unknown(name, model, all_layers)
        for name in names
        if not any(
            _may_name(name, layer, path) for layer, ways in spellings.items() for path in sum(ways, ())
        )
    ]
    reached, halves = list[TargetLayer](), dict[str, Problem]()
    for layer, ways in spellings.items():
        missing = [
            [path for path in way if not any(_reaches(name, layer, path, every, experts) for name in names)]
            for way in ways
        ]
        if [] in missing or (all_linear and _is_in_all_linear(layer, experts)):
            reached.append(layer)
        for way, lacking in zip(ways, missing, strict=True):
            if layer not in reached and 0 < len(lacking) < len(way):
                half = _half(way, lacking)
                halves[half.what] = half
    if left_out(model):
        problems += [_beside_text(layer) for layer in reached if layer.part in (VISION, AUDIO, PROJECTOR)][:1]
    if problems or halves:
        raise UserError([*problems, *halves.values()])
    if not reached:
        what = tr(
            "{names} name routed experts alone, which lora_experts false leaves out", names=", ".join(names)
        )
        raise UserError(what, place=PLACE, cure=tr("leave out lora_experts, or name other layers"))
    return reached


def _spellings(layer: TargetLayer, every: Sequence[TargetLayer]) -> list[tuple[str, ...]]:
    """The ways to name a layer: by its path, or by all the matrices that a parameter of experts holds."""
    ways: list[tuple[str, ...]] = [(layer.path,)]
    if layer.kind == "experts":
        container = layer.path.rpartition(".")[0]
        ways.append(tuple(f"{container}.{name}" for name in layer.in_files))
        leaves = {one.leaf for one in every if one.kind == "linear" and one.part not in BY_NAME}
        if layer.leaf == "gate_up_proj" and leaves.issuperset(_BOTH):
            ways.append(tuple(f"{container}.{name}" for name in _BOTH))
    return [way for way in dict.fromkeys(ways) if way]


def _is_in_all_linear(layer: TargetLayer, experts: bool) -> bool:
    if layer.part in BY_NAME or (layer.part == ROUTED and not experts):
        return False
    return layer.kind != "weight"


_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def _is_read_by_its_model(layer: TargetLayer, model: Any, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the model's code, or fast kernels of it, reads the layer's weight instead of calling the layer. PEFT
    refuses an adapter on Mamba's `out_proj`. On `dt_proj` of its first version an adapter would do nothing until it is
    merged. PEFT adapts a parameter of experts where their own module reads it, not the one around it, as in DBRX."""
    if layer.kind == "experts":
        container = layer.path.rpartition(".")[0]
        code = getattr(type(modules[container.rpartition(".")[0]]).forward, "__code__", None)
        return code is not None and layer.leaf in code.co_names
    if layer.leaf == "out_proj":
        return getattr(model.config, "model_type", None) in _MAMBA
    return layer.leaf == "dt_proj" and layer.path.removesuffix("dt_proj") + "x_proj" in modules


def _may_name(name: str, layer: TargetLayer, path: str) -> bool:
    """Whether a name reaches the layer by this spelling, except for the experts' setting."""
    return _matches(name, path) and (layer.part not in BY_NAME or _mentions(name, layer.keys))


def _reaches(name: str, layer: TargetLayer, path: str, every: Sequence[TargetLayer], experts: bool) -> bool:
    if not _may_name(name, layer, path):
        return False
    if layer.part != ROUTED or experts or _mentions(name, layer.keys):
        return True
    return (
        path == layer.path
        and name == layer.leaf
        and not any(one.leaf == name and one.part not in (ROUTED, *BY_NAME) for one in every)
    )


def _matches(name: str, path: str) -> bool:
    """Whether a name is the path's end, a module on the way, or a pattern of either."""
    if any(char in name for char in "*?["):
        return fnmatchcase(path, name) or fnmatchcase(path, f"*.{name}")
    return f".{name}." in f".{path}."


def _mentions(name: str, keys: frozenset[str]) -> bool:
    parts = [part for part in name.split(".") if part.strip("*?")]
    return any(fnmatchcase(key, part) for key in keys for part in parts)


def excluded_layers(model: Any, names: Sequence[str]) -> set[TargetLayer]:
    """The layers that names exclude, in the forms that `resolve` takes; routed experts in one parameter, if all that it
    holds is named. Raises UserError that lists all names which no layer has."""
    every = target_layers(model)
    excluded, matched, halves = set[TargetLayer](), set[str](), dict[str, Problem]()
    for layer in every:
        for way in _spellings(layer, every):
            by_path = {path: {name for name in names if _matches(name, path)} for path in way}
            matched.update(*by_path.values())
            lacking = [path for path, matching in by_path.items() if not matching]
            if not lacking:
                excluded.add(layer)
            elif len(lacking) < len(way):
                half = _half(way, lacking, EXCLUDED, tr("leave out the other"))
                halves[layer.path] = half
    problems = [_unknown(name, model, every, EXCLUDED) for name in names if name not in matched]
    halves = {path: half for path, half in halves.items() if path not in {one.path for one in excluded}}
    if problems or halves:
        raise UserError([*problems, *dict.fromkeys(halves.values())])
    return excluded


def _half(
    way: Sequence[str],
    lacking: Sequence[str],
    place: str = PLACE,
    otherwise: str = tr("use --lora_experts false"),
) -> Problem:
    names, without = ([path.rpartition(".")[2] for path in paths] for paths in (way, lacking))
    what = tr(
        "the routed experts hold {names} in one parameter, and {without} is not named",
        names=tr(" and ").join(names),
        without=without[0],
    )
    return Problem(what, place, either(tr("name {without} too", without=without[0]), otherwise))


def _beside_text(layer: TargetLayer) -> Problem:
    what = tr(
        "it reaches {path} in the {part}, through which text never passes",
        path=layer.path,
        part=tr(layer.part),
    )
    return Problem(
        what, PLACE, tr("leave it out: an adapter trained on text reaches the language model alone")
    )


def _unknown(name: str, model: Any, every: Sequence[TargetLayer], place: str = PLACE) -> Problem:
    """The problem of a name that reaches nothing. `every`: all target layers."""
    modules = _modules(model)
    for layer in every if place == PLACE else ():
        if _matches(name, layer.path) and _is_read_by_its_model(layer, model, modules):
            what = tr(
                'the model\'s code reads the weight of "{name}" itself, so that an adapter would do nothing',
                name=name,
            )
            return Problem(what, place, tr("leave it out"))
    for layer in every if place == PLACE else ():
        if _matches(name, layer.path) and layer.part in BY_NAME:
            key = next(part for part in layer.path.split(".") if part in layer.keys)
            what = tr(
                '"{name}" is only in the {part}, which an adapter reaches by its own name alone',
                name=name,
                part=tr(layer.part),
            )
            return Problem(
                what, place, tr("write {key}.*.{leaf}, or {key} for all of it", key=key, leaf=layer.leaf)
            )
    if any(_matches(name, path) for path in left_out_paths(model)):
        what = tr('"{name}" is in a tower for images or sound, through which text never passes', name=name)
        return Problem(
            what, place, tr("leave it out: an adapter trained on text reaches the language model alone")
        )
    for path, module in modules.items():
        if path and _matches(name, path) and not list(module.children()):
            what = tr(
                '"{name}" is a layer of the kind {name2}, and adapters are put on linear layers',
                name=name,
                name2=type(module).__name__,
            )
            return Problem(what, place, tr("leave it out"))
    own = [layer for layer in every if layer.part not in (VISION, AUDIO, PROJECTOR)]
    fused = {layer.leaf: layer.in_files for layer in own if layer.kind == "experts"}
    leaves = sorted({layer.leaf for layer in own}.union(*fused.values()))
    places = {"name": name, "leaves": ", ".join(leaves)}
    if not fused:
        return unknown_layer(name, leaves, place)
    listed = [
        leaf
        if files in ((), (leaf,))
        else tr("{leaf} ({files} in its files)", leaf=leaf, files=tr(" and ").join(files))
        for leaf, files in fused.items()
    ]
    what = tr(
        'no layer of the model is called "{name}"; it has {leaves}; its routed experts are {experts}',
        experts=tr(" and ").join(listed),
        **places,
    )
    if name in _BOTH and "gate_up_proj" in fused:
        return Problem(what, place, tr("use gate_up_proj, or all-linear"))
    return Problem(what, place, did_you_mean(name, leaves) or tr("or use all-linear"))


# what has an adapter


@dataclass(frozen=True)
class PartCoverage:
    """How far adapters reach in a part of the model."""

    part: str
    reached: int
    """Layers of the model in which something of the part has an adapter."""
    blocks: int
    """Layers of the model that have the part."""
    names: tuple[str, ...]
    """Names of what has an adapter there."""
    without: tuple[str, ...]
    """Names of what has none, at least in one of these layers."""

    def __str__(self) -> str:
        text = f"{tr(self.part)} {self.reached}/{self.blocks}"
        if self.names and self.without:
            names, without = ", ".join(self.names), ", ".join(self.without)
            return tr("{part} ({names}; not {without})", part=text, names=names, without=without)
        return text


@dataclass(frozen=True)
class Coverage:
    """What of a model has an adapter: `attention 32/32, dense MLP 1/1, shared experts 31/31, routed experts 0/31`."""

    parts: tuple[PartCoverage, ...]
    whole: tuple[str, ...] = ()
    """Modules that are trained whole, as PEFT's `modules_to_save`."""
    tokens: int = 0
    """Tokens whose rows of embedding and head are trained, as PEFT's `trainable_token_indices`."""

    def __str__(self) -> str:
        text = ", ".join(map(str, self.parts))
        text += tr("; trained whole: {whole}", whole=", ".join(self.whole)) if self.whole else ""
        if self.tokens:
            text += tr("; rows of {tokens}", tokens=counted(self.tokens, "token"))
        return text


def adapted(model: Any) -> set[str]:
    """The paths of all layers and parameters of a model that have an adapter."""
    found: set[str] = set()
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            name = getattr(module, "parameter_name", None)
            found.add(_own(path) if name is None else f"{_own(path)}.{name}")
    return found


def coverage(model: Any) -> Coverage:
    """What of a transformers model has an adapter, by part. `model`: without PEFT's outermost wrapper."""
    every, reached = target_layers(model), adapted(model)
    has = {layer for layer in every if layer.path in reached or layer.parameter in reached}
    parts = list[PartCoverage]()
    for part in PARTS:
        own = [layer for layer in every if layer.part == part]
        blocks = {layer.block for layer in own if layer in has}
        if not own or (part == HEAD and not blocks):
            continue
        names = dict.fromkeys(layer.leaf for layer in own if layer in has)
        without = dict.fromkeys(layer.leaf for layer in own if layer not in has and layer.block in blocks)
        total = len({layer.block for layer in own})
        parts.append(PartCoverage(part, len(blocks), total, tuple(names), tuple(without)))
    whole = [_own(path) for path, module in model.named_modules() if hasattr(module, "modules_to_save")]
    return Coverage(tuple(parts), tuple(sorted(whole)), trained_rows(model))
