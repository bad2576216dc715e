"""Adapter folders that another tool made: PEFT's files alone, without template, token rules and record of the base."""

from __future__ import annotations

from pathlib import Path

from yeonma.adapter.adapter_folder import MANIFEST, TEMPLATE, AdapterFolder, BaseIdentity
from yeonma.data.template import load_template
from yeonma.errors import UserError
from yeonma.files import user_path
from yeonma.messages import tr
from yeonma.model.adapter_config import CONFIG_FILE
from yeonma.model.adapter_file import check_adapter_files, is_adapter
from yeonma.tokenization.example import DEFAULT_RULES

TEMPLATE_CURE = tr(
    "give --template: a file, a built-in one (alpaca, title ...), or chat for the model's chat template"
)


def is_foreign(folder: str | Path) -> bool:
    """Whether the folder has PEFT's config and nothing of ours. One with a template and no yeonma.json is damaged."""
    return is_adapter(folder) and not any(
        (user_path(folder) / name).is_file() for name in (MANIFEST, TEMPLATE)
    )


def check_is_adapter(path: str | Path) -> None:
    """Raises UserError for what is given in place of an adapter folder: a file, a whole model, or weights alone."""
    folder = user_path(path)
    if folder.is_file():
        what = tr("this is a file, not a folder")
        raise UserError(what, place=str(path), cure=tr("give the folder of an adapter in PEFT's format"))
    if not folder.is_dir() or is_adapter(folder) or (folder / MANIFEST).is_file():
        return
    if (folder / "config.json").is_file():
        cure = tr(
            "give the folder of an adapter on it, or ask the model itself with `yeonma compare --models`"
        )
        raise UserError(tr("this is a whole model, not an adapter"), place=str(path), cure=cure)
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf")) or any(folder.glob("adapter_*")):
        cure = tr("give the folder of an adapter in PEFT's format")
        raise UserError(tr("{config_file} is missing", config_file=CONFIG_FILE), place=str(path), cure=cure)


def read_foreign_adapter(
    folder: str | Path, template: str | None = None, base_model: str | None = None
) -> AdapterFolder:
    """Reads such a folder, without loading its weights. The token rules are the defaults.

    `template`: a built-in template, a file, or the text itself; without one, only plain text can be continued.
    Raises UserError if the files are damaged or of another kind, and if nothing names the base.
    """
    own = check_adapter_files(folder)
    name, revision = (base_model, None) if base_model is not None else (own.base, own.revision)
    if name is None:
        raise UserError(
            tr("it does not name its base model"), place=own.place, cure=tr("give it with --base_model")
        )
    parsed = load_template(template or "prompt-completion")
    return AdapterFolder(
        path=own.folder,
        base=BaseIdentity(name, revision, 0, ""),
        trust_remote_code=False,
        template=parsed,
        columns=None,
        rules=DEFAULT_RULES,
        details={},
        has_template=template is not None,
    )


def remark_on(adapter: AdapterFolder, *, own_tokenizer: bool, base_is_given: bool) -> str:
    """A line that says what was taken for such an adapter."""
    base = tr("as given") if base_is_given else tr("named in its adapter_config.json")
    template = (
        tr("template {name}", name=adapter.template.name)
        if adapter.has_template
        else tr("no template, plain text only")
    )
    tokenizer = tr("its own tokenizer") if own_tokenizer else tr("the base's tokenizer")
    return tr(
        "{path} was made by another tool: base {base} ({origin}), {template}, {tokenizer}, "
        "default token rules (cutoff_len {cutoff_len})",
        path=adapter.path,
        base=adapter.base.name,
        origin=base,
        template=template,
        tokenizer=tokenizer,
        cutoff_len=adapter.rules.cutoff_len,
    )
