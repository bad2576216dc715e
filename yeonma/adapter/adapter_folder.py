"""The adapter folder: PEFT's files, the template, the tokenizer, and yeonma.json, which ties them together.

Reading one imports no torch, so that a wrong folder is said at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from yeonma import __version__
from yeonma.adapter.samples import SAMPLES, Samples
from yeonma.config.settings import Quantization
from yeonma.data.template import Template
from yeonma.errors import UserError, did_you_mean
from yeonma.files import damage_as_user_error, user_path
from yeonma.messages import later, tr
from yeonma.model.adapter_config import CONFIG_FILE, WEIGHTS_FILE
from yeonma.model.adapter_file import check_adapter_files, is_adapter, read_header
from yeonma.model.base_content import VOLATILE, BaseContent, content_of
from yeonma.model.published import QUANTIZATION_KEYS, Published, quantization_of
from yeonma.model.source import BaseSource
from yeonma.shown import code, json_text
from yeonma.tokenization.cache import tokenizer_identity
from yeonma.tokenization.chat_template_export import (
    BASE_CHAT_TEMPLATE,
    MARK,
    ExportedChatTemplate,
    base_chat_template,
)
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.tokenizer_files import save_tokenizer_files

MANIFEST = "yeonma.json"
TEMPLATE = "template.txt"
CHAT_TEMPLATE = "chat_template.jinja"
MERGED = "merged"
"""Key of yeonma.json that is true for a merged model."""
TRAINED = "train"
"""Key of yeonma.json that is `full` for a fully fine-tuned model. Other folders lack it."""
BASE_FOLDER = "base_folder"
"""Key of yeonma.json for the folder that the base's name pointed to, if it was a link."""
PUBLISHED = "published_weights"
"""Key of yeonma.json that says how the base's own files are quantised, if they are."""
BASE_CONTENT = "base_content"
"""Key of yeonma.json for the content of the base of training. Folders of earlier versions lack it."""
FORMAT = 1
_NEWER_RULES = {
    "thinking": "auto",
    "train_on": "all",
    "row_weights": None,
    "chat_template_kwargs": None,
    "parse_special_tokens": False,
}
"""Rules that earlier versions did not write, with the values that they had in effect."""


@dataclass(frozen=True)
class BaseIdentity:
    """The base model of an adapter. `config_sha256` is the hash of its config without paths and versions."""

    name: str
    revision: str | None
    parameters: int
    config_sha256: str


def hub_name(base: str) -> str | None:
    """The base's name on the hub; None for a local folder, whose name is its absolute path."""
    return None if Path(base).is_absolute() else base


def folder_stand_in(base: str) -> str:
    """What cards have in place of a local folder's path."""
    return f"path/to/{Path(base).name}"


LOCAL_BASE = later(
    "The base was a local folder, for which {base} stands. adapter_config.json has the path that it had in training."
)


def local_base_note(base: str) -> str:
    """What cards say of the stand-in. It goes when the folder is published with the base's name on the hub."""
    return tr(LOCAL_BASE, base=code(folder_stand_in(base)))


@dataclass(frozen=True)
class AdapterFolder:
    """The contents of an adapter folder without weights: its base, template and token rules."""

    path: Path
    base: BaseIdentity
    trust_remote_code: bool
    template: Template
    columns: dict[str, str] | None
    rules: TokenRules
    details: dict[str, Any]
    """The contents of yeonma.json; empty if another tool made the adapter."""
    has_template: bool = True
    """False for an adapter of another tool for which no template was given."""

    @property
    def is_full(self) -> bool:
        """Whether the folder contains a fully fine-tuned model."""
        return is_full(self.details)

    @property
    def is_whole(self) -> bool:
        """Whether the folder contains a complete model: one with the adapter merged into it, or a fully fine-tuned
        one."""
        return self.details.get(MERGED) is True or self.is_full

    @property
    def quantization(self) -> Quantization:
        """The base's quantization in training. Earlier versions had none and did not record it."""
        quantization: Quantization = self.details.get("quantization", "none")
        return quantization

    @property
    def new_tokens(self) -> list[str]:
        """The tokens that the run added to the base's tokenizer."""
        return list((self.details.get("lora") or {}).get("new_tokens") or ())

    @property
    def base_content(self) -> BaseContent | None:
        """The content of the base of training; None in folders of earlier versions."""
        record = self.details.get(BASE_CONTENT)
        return None if record is None else content_of(record)

    @property
    def source(self) -> BaseSource:
        return BaseSource(self.base.name, self.base.revision, self.trust_remote_code)


def is_full(details: Mapping[str, Any]) -> bool:
    """Whether yeonma.json says that its folder contains a fully fine-tuned model."""
    return details.get(TRAINED) == "full"


def data_set_names(adapter: AdapterFolder) -> list[str]:
    """The data sets of the mixture that the adapter was trained on; none if it was a single one."""
    return [str(one["name"]) for one in adapter.details.get("trained_on", {}).get("data_sets", ())]


def asked_as(adapter: AdapterFolder, name: str) -> AdapterFolder:
    """The adapter with template and columns of one of the data sets that it was trained on.

    Raises UserError if there is none of this name.
    """
    names = data_set_names(adapter)
    if not names:
        problem = tr("{path} was trained on a single data set", path=adapter.path)
        raise UserError(problem, place="--data_set", cure=tr("leave it out"))
    if name not in names:
        problem = tr('{path} was trained on no data set "{name}"', path=adapter.path, name=name)
        cure = did_you_mean(name, names) or tr("they are {names}", names=", ".join(names))
        raise UserError(problem, place="--data_set", cure=cure)
    one = adapter.details["trained_on"]["data_sets"][names.index(name)]
    template = Template.parse(one["template"]["text"], one["template"]["name"])
    return replace(adapter, template=template, columns=one["columns"])


def stored_parameters(folder: Path) -> int:
    """The number of parameters in an adapter's weight file, from the file's header."""
    return sum(math.prod(tensor.shape) for tensor in read_header(folder).values())


def base_identity(model: Any, source: BaseSource) -> BaseIdentity:
    """The identity of a base model without an adapter. The name of a local folder is its absolute path. Towers that are
    left out count as parameters."""
    from yeonma.model.language_part import absent_parameters
    from yeonma.model.quantized import numbers_of

    return BaseIdentity(
        name=os.path.abspath(source.name) if Path(source.name).is_dir() else source.name,
        revision=getattr(model.config, "_commit_hash", None) or source.revision,
        parameters=absent_parameters(model) + sum(numbers_of(parameter) for parameter in model.parameters()),
        config_sha256=config_hash(model.config, getattr(model, "published", None)),
    )


def config_hash(config: Any, published: Published | None = None) -> str:
    """SHA-256 of a model's config without paths and versions. `published`: how the base's files are quantised, if the
    config of the model in memory no longer says so."""
    content = config.to_diff_dict()
    quantised = quantization_of(content) if published is None else published.config
    for part in (content, content.get("text_config")):
        for key in QUANTIZATION_KEYS if isinstance(part, dict) and quantised else ():
            part.pop(key, None)
    if quantised:
        content["quantization_config"] = dict(quantised)
    text = json.dumps(
        {key: content[key] for key in sorted(content) if key not in VOLATILE}, sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()


def describe(
    base: BaseIdentity,
    template: Template,
    columns: Mapping[str, str] | None,
    rules: TokenRules,
    *,
    tokenizer: Any,
    trust_remote_code: bool,
    trained_on: Mapping[str, Any],
    quantization: Quantization = "none",
    published: Published | None = None,
    lora: Mapping[str, Any] | None = None,
    full: bool = False,
    content: BaseContent | None = None,
) -> dict[str, Any]:
    """The contents of yeonma.json. `published`: how the base's own files are quantised. `lora`: the adapter's shape and
    what it is on, as `shape_of` has it. `full`: whether all weights were trained. `content`: that of the base."""
    is_local = Path(base.name).is_dir()
    packages = ("torch", "transformers", "peft", "tokenizers")
    return {
        "format": FORMAT,
        "base": asdict(base),
        "tokenizer": identity_of_tokenizer(tokenizer),
        "trust_remote_code": trust_remote_code,
        "quantization": quantization,
        **(
            {BASE_FOLDER: folder} if (folder := os.path.realpath(base.name)) != base.name and is_local else {}
        ),
        **({} if published is None else {PUBLISHED: published.record()}),
        **({} if content is None else {BASE_CONTENT: content.record()}),
        "template": {"name": template.name, "sha256": hashlib.sha256(template.text.encode()).hexdigest()},
        "columns": dict(columns) if columns else None,
        "rules": asdict(rules),
        **({"lora": dict(lora)} if lora is not None else {}),
        **({TRAINED: "full"} if full else {}),
        "trained_on": dict(trained_on),
        "versions": {"yeonma": __version__, **{package: version(package) for package in packages}},
    }


def identity_of_tokenizer(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of everything that decides the token ids: of plain text, and of turns, which use the chat template."""
    return {
        "sha256": tokenizer_identity(tokenizer, chat_template=False),
        "with_chat_template_sha256": tokenizer_identity(tokenizer),
    }


def write_adapter(
    folder: Path,
    peft_model: Any,
    tokenizer: Any,
    template: Template,
    details: Mapping[str, Any],
    exported: ExportedChatTemplate,
    samples: Samples | None = None,
) -> None:
    """Writes the adapter's files into an existing folder. The callers make that atomic."""
    from yeonma.model.peft_targets import as_peft_reads

    config = peft_model.peft_config["default"]
    config.base_model_name_or_path, config.revision = details["base"]["name"], details["base"]["revision"]
    if isinstance(config.target_modules, set):  # the order of a set differs between processes
        config.target_modules = sorted(config.target_modules)
    peft_model.create_or_update_model_card = _no_card
    with as_peft_reads(peft_model.get_base_model(), config):
        peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # in case PEFT writes its empty card in another way
    write_template_files(folder, tokenizer, template, details, exported, samples)


def write_template_files(
    folder: Path,
    tokenizer: Any,
    template: Template,
    details: Mapping[str, Any],
    exported: ExportedChatTemplate,
    samples: Samples | None = None,
) -> None:
    """Writes what stands beside the weights: tokenizer, template, sample rows and yeonma.json."""
    save_tokenizer(tokenizer, exported, folder)
    (folder / TEMPLATE).write_bytes(template.text.encode())
    if samples is not None:
        (folder / SAMPLES).write_text(samples.to_json(), encoding="utf-8")
    (folder / MANIFEST).write_text(json_text(details, indent=2) + "\n", encoding="utf-8")


def _no_card(folder: str) -> None:
    """Instead of PEFT's method, which takes longer to write an empty card than all else in a small adapter's folder."""


def save_tokenizer(tokenizer: Any, exported: ExportedChatTemplate, folder: Path) -> None:
    """Writes the tokenizer, with the exported chat template if there is one. The base's own chat template is then a
    separate file, from which `load_tokenizer` reads it."""
    save_tokenizer_files(tokenizer, folder)
    base_template = base_chat_template(tokenizer)
    if exported.text is not None and exported.text != base_template:
        (folder / BASE_CHAT_TEMPLATE).write_bytes(base_template.encode())
        (folder / CHAT_TEMPLATE).write_bytes((MARK + exported.text).encode())


def read_adapter_folder(path: str | Path) -> AdapterFolder:
    """Reads the folder of an adapter or a merged model, without the weights. Raises UserError for any other folder, and
    for damaged files."""
    folder = user_path(path)
    if not folder.is_dir():
        raise UserError(
            tr("no such folder"), place=str(path), cure=tr("give the output folder of `yeonma sft`")
        )
    whole_model = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    for name in (MANIFEST, TEMPLATE, *(() if whole_model else (CONFIG_FILE, WEIGHTS_FILE))):
        if not (folder / name).is_file():
            raise UserError(
                tr("{name} is missing", name=name),
                place=str(path),
                cure=tr("give the output folder of a finished run"),
            )
    with damage_as_user_error(folder / MANIFEST):
        details = json.loads((folder / MANIFEST).read_text("utf-8"))
        _check_types(details)
        if whole_model and details.get(MERGED) is not True and not is_full(details):
            raise ValueError(tr("the folder also contains a complete model"))
        rules = TokenRules(**{field.name: details["rules"][field.name] for field in fields(TokenRules)})
        text = (folder / TEMPLATE).read_text("utf-8")
        if hashlib.sha256(text.encode()).hexdigest() != details["template"]["sha256"]:
            raise UserError(
                tr("this is not the template that the adapter was trained with"), place=str(folder / TEMPLATE)
            )
        return AdapterFolder(
            path=folder,
            base=BaseIdentity(**details["base"]),
            trust_remote_code=details["trust_remote_code"],
            template=Template.parse(text, details["template"]["name"]),
            columns=details["columns"],
            rules=rules,
            details=details,
        )


def check_continued(path: str, base: BaseIdentity | None) -> None:
    """Raises UserError if the folder contains no adapter, or an adapter of another base.

    An adapter that was saved by PEFT alone only names its base. Whether its shapes fit is found out on loading.
    """
    folder = user_path(path)
    if is_adapter(folder):
        check_adapter_files(folder)
    if is_adapter(folder) and not (folder / MANIFEST).is_file():
        return
    adapter = read_adapter_folder(path)
    if base is not None:
        check_base(adapter, base)


def _check_types(details: Any) -> None:
    """Raises TypeError, ValueError or KeyError for a value that `describe` would not write. Adds rules that folders of
    earlier versions lack."""
    details["rules"] = {**_NEWER_RULES, **details["rules"]}
    base, rules, columns, text = details["base"], details["rules"], details["columns"], (str, NoneType)
    types = (
        (base, "name", str),
        (base, "revision", text),
        (base, "parameters", int),
        (base, "config_sha256", str),
        (details, "trust_remote_code", bool),
        ({"trained_on": {}, **details}, "trained_on", dict),
        ({"tokenizer": None, **details}, "tokenizer", (dict, NoneType)),
        (details["template"], "name", str),
        (rules, "cutoff_len", int),
        (rules, "shrink", text),
        (rules, "row_weights", text),
        (rules, "train_on_inputs", bool),
        (rules, "add_eos_token", bool),
        (rules, "chat_template_kwargs", (dict, NoneType)),
        (rules, "parse_special_tokens", bool),
    )
    for group, name, kind in types:
        if not isinstance(group[name], kind):
            raise TypeError(tr("{name} is {value!r:.100}", name=name, value=group[name]))
    if details.get(BASE_CONTENT) is not None:
        content_of(details[BASE_CONTENT])
    if details.get("quantization", "none") not in get_args(Quantization):
        raise ValueError(tr("{name} is {value!r:.100}", name="quantization", value=details["quantization"]))
    for name in ("shrink_side", "over_limit", "thinking", "train_on"):
        if rules[name] not in get_args(get_type_hints(TokenRules)[name]):
            raise ValueError(tr("{name} is {value!r:.100}", name=name, value=rules[name]))
    for one in details.get("trained_on", {}).get("data_sets", ()):
        texts = (one["name"], one["template"]["name"], one["template"]["text"])
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(tr("a data set is not described by text"))
        _check_columns(one["columns"])
    _check_columns(columns)


def _check_columns(columns: Any) -> None:
    if columns is not None and not all(isinstance(text, str) for pair in columns.items() for text in pair):
        raise TypeError(tr("columns are not names"))


def check_base(adapter: AdapterFolder, base: BaseIdentity) -> None:
    """Raises UserError if the adapter was trained on another base. Compares configs, not names. An adapter that another
    tool made has no record of them; its tensors must fit."""
    if not adapter.details:
        return
    if adapter.base.config_sha256 == base.config_sha256 and adapter.base.parameters == base.parameters:
        return
    name, place = adapter.base.name, str(adapter.path)
    if name != base.name:
        what, cure = (
            tr("it was trained on {name}, which is not {base}", name=name, base=base.name),
            tr("use --base_model {name}", name=name),
        )
        raise UserError(what, place=place, cure=cure)
    now, then = os.path.realpath(name), adapter.details.get(BASE_FOLDER)
    what = tr("it was trained on {name}, where another model is now", name=name)
    if now != name:
        what = tr("it was trained on {name}, which points to {now} now, another model", name=name, now=now)
        if then and then != now:
            what = tr(
                "it was trained on {name}, which points to {now} now, another model; it pointed to {then}",
                name=name,
                now=now,
                then=then,
            )
    cure = tr("give the model that it was trained on with --base_model")
    if then and then != now and Path(then).is_dir():
        cure = tr("use --base_model {then}", then=then)
    raise UserError(what, place=place, cure=cure)
