"""Whether adapter, template, tokenizer and base of an adapter folder belong together. No weights of a base are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from yeonma.adapter.adapter_folder import (
    CHAT_TEMPLATE,
    MANIFEST,
    WEIGHTS,
    AdapterFolder,
    base_identity,
    check_base,
    identity_of_tokenizer,
)
from yeonma.adapter.samples import SAMPLES, Samples, prompts_now
from yeonma.data.rows import Row
from yeonma.errors import Problem, UserError
from yeonma.model.load import load_config, outline
from yeonma.model.source import BaseSource, find_base
from yeonma.tokenization.chat_template_export import (
    MARK,
    base_chat_template,
    chat_ids,
    full_prompt_ids,
    messages_of,
)
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.verify.finding import Finding, found, not_checked

Shapes = Mapping[str, tuple[int, ...]]
ANEW = "put a copy of the file back, or train anew"
NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def check_weights(folder: Path, config: Mapping[str, Any]) -> tuple[Finding, Shapes]:
    """The adapter's tensors: finite, and of the rank that adapter_config.json says. Their shapes, by name."""
    check, place = "adapter", str(folder / WEIGHTS)
    try:
        tensors = dict(deserialize((folder / WEIGHTS).read_bytes()))
    except (OSError, SafetensorError) as error:
        return found(check, [Problem(f"it cannot be read ({error})", place, ANEW)], ""), {}
    shapes = {name: tuple(each["shape"]) for name, each in tensors.items()}
    problems = [
        Problem(f"NaN or infinity in {name}", place, "take the checkpoint before, or train anew")
        for name, each in tensors.items()
        if not _is_finite(each["dtype"], each["data"])
    ]
    if config.get("peft_type") != "LORA":
        problems.append(Problem("it is not of a LoRA adapter", str(folder / "adapter_config.json"), ANEW))
    elif isinstance(rank := config.get("r"), int) and not config.get("rank_pattern"):
        wrong = [
            name
            for name, shape in shapes.items()
            if (own := _rank(name, shape)) and (own % rank if "experts" in name else own != rank)
        ]
        if wrong:
            what = f"{_some(wrong)} is not of rank {rank}, which adapter_config.json says"
            problems.append(Problem(what, place, ANEW))
    if not tensors:
        problems.append(Problem("it holds no weights", place, ANEW))
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    return found(check, problems, f"{len(shapes)} tensors of {numbers:,} numbers, all finite"), shapes


def _rank(name: str, shape: tuple[int, ...]) -> int | None:
    """The rank by a tensor's shape; of fused experts, times their number."""
    if name.endswith(("lora_A.weight", "lora_embedding_A")):
        return shape[0]
    if name.endswith(("lora_B.weight", "lora_embedding_B")):
        return shape[1]
    return None


def _is_finite(dtype: str, data: bytes) -> bool:
    if dtype == "BF16":  # which NumPy has not: all bits of the exponent are set
        return not bool(np.any((np.frombuffer(data, "<u2") & 0x7F80) == 0x7F80))
    return dtype not in NUMBERS or bool(np.isfinite(np.frombuffer(data, NUMBERS[dtype])).all())


def check_names(adapter: AdapterFolder, config: Mapping[str, Any]) -> Finding:
    """Whether adapter_config.json names the base that yeonma.json names."""
    base, place = adapter.base, str(adapter.path / "adapter_config.json")
    named = {"base_model_name_or_path": base.name, "revision": base.revision}
    problems = [
        Problem(f"{name} is {config.get(name)}, and yeonma.json says {expected}", place, ANEW)
        for name, expected in named.items()
        if config.get(name) != expected
    ]
    return found("template and rules", problems, f'template "{adapter.template.name}", base {base.name}')


def where_is_base(
    adapter: AdapterFolder, base_model: str | None, trust_remote_code: bool
) -> BaseSource | Finding:
    """The base as it is to be had now, or why not.

    Raises UserError where the user has named one that is not there.
    """
    if base_model is not None:
        source = find_base(base_model, None, trust_remote_code)
        load_config(source)
        return source
    name = adapter.base.name
    if adapter.trust_remote_code and not trust_remote_code:
        return not_checked("base", f"{name} brings code of its own; give --trust_remote_code true to run it")
    if Path(name).is_absolute() and not Path(name).is_dir():
        return not_checked("base", f"it is no longer at {name}; say with --base_model where it is")
    try:
        source = find_base(name, adapter.base.revision, trust_remote_code)
        load_config(source)
    except UserError as error:
        if Path(name).is_dir():
            return found("base", error.problems, "")
        first = error.problems[0].what
        return not_checked("base", f"{name}: {first}; say with --base_model where it is")
    return source


def check_model(adapter: AdapterFolder, source: BaseSource, shapes: Shapes) -> Finding:
    """The base's config and number of parameters against yeonma.json, and the adapter's shapes against its layers."""
    model = outline(load_config(source), source)
    if model is None:
        return not_checked("base", f"{source.name} cannot be laid out without its weights")
    try:
        check_base(adapter, base_identity(model, source))
    except UserError as error:
        return found("base", error.problems, "")
    place, cure = str(adapter.path / WEIGHTS), "give back the adapter of this run, or train anew"
    try:
        wanted = _shapes_on(model, str(adapter.path))
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        what = f"its layers are not the base's ({str(error).splitlines()[0]:.200})"
        return found("base", [Problem(what, str(adapter.path / "adapter_config.json"), cure)], "")
    problems = []
    if missing := sorted(wanted.keys() - shapes.keys()):
        problems.append(Problem(f"it lacks {_some(missing)}", place, cure))
    if more := sorted(shapes.keys() - wanted.keys()):
        problems.append(Problem(f"the base has no layer for {_some(more)}", place, cure))
    wrong = sorted(
        name for name in wanted.keys() & shapes.keys() if tuple(wanted[name]) != tuple(shapes[name])
    )
    if wrong:
        what = f"{_some(wrong)}: of shape {shapes[wrong[0]]}, and the base needs {wanted[wrong[0]]}"
        problems.append(Problem(what, place, cure))
    return found(
        "base", problems, f"{source.name}: its config, and a layer for each of the adapter's tensors"
    )


def _shapes_on(model: Any, folder: str) -> Shapes:
    """What PEFT would make of the adapter's config on this outline."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    peft_model = get_peft_model(model, PeftConfig.from_pretrained(folder))
    tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tokenizer(adapter: AdapterFolder, tokenizer: Any, check: str, place: str) -> Finding:
    """Whether a tokenizer is the one that the run was trained with, in all that decides the template's tokens."""
    recorded = adapter.details.get("tokenizer")
    if not isinstance(recorded, Mapping):
        return not_checked(check, f"{MANIFEST} does not say which one it was: a run of an earlier version")
    key = "with_chat_template_sha256" if is_turns(adapter) else "sha256"
    now = identity_of_tokenizer(tokenizer)
    if now[key] == recorded.get(key):
        about = "the vocabulary and rules" + (" and chat template" if is_turns(adapter) else "")
        return found(check, [], f"{about} of training")
    what = "it is not the tokenizer that the adapter was trained with"
    if is_turns(adapter) and now["sha256"] == recorded.get("sha256"):
        what = "its chat template is not the one that the adapter was trained with"
    return found(check, [Problem(what, place, "put a copy of the run's back")], "")


def check_samples(
    adapter: AdapterFolder, samples: Samples | None, tokenizer: Any, check: str, place: str
) -> Finding:
    """Whether the sample rows' prompts have the token ids of training with this tokenizer."""
    if samples is None:
        return not_checked(check, f"there is no {SAMPLES}: a run of an earlier version, or the file was lost")
    if not samples.rows:
        return not_checked(check, "the run kept none (card_rows 0)")
    try:
        now = prompts_now(samples, adapter.template, adapter.columns, tokenizer, adapter.rules)
    except UserError as error:
        return found(check, error.problems, "")
    cure = "ask with the tokenizer and template of training, or the answers will not be the trained ones"
    problems = [
        Problem(f"the prompt of row {row.row_number} is no longer the trained one: {difference}", place, cure)
        for row, ids in zip(samples.rows, now, strict=True)
        if (difference := _difference(row.prompt_ids, ids))
    ]
    return found(check, problems, f"the prompts of {len(samples.rows)} rows have the token ids of training")


def check_chat_template(adapter: AdapterFolder, samples: Samples | None, tokenizer: Any, own: Any) -> Finding:
    """Whether messages sent through the folder's chat template (`tokenizer` has it) have the token ids of training.

    `own`: the same tokenizer with the base's chat template. Rows with special-token text in them are left out: other
    tools take it for special tokens.
    """
    check, place = "chat template", str(adapter.path / CHAT_TEMPLATE)
    template = adapter.template
    if not (template.is_chat or base_chat_template(tokenizer).startswith(MARK)):
        return not_checked(
            check, "it does not carry the training template: other tools ask with other tokens"
        )
    if samples is None or not samples.rows:
        return not_checked(check, "there are no sample rows to ask with")
    encoder, problems, same = TextEncoder.of(own), [], 0
    for sample in samples.rows:
        row = Row(sample.row_number, sample.row, f"{SAMPLES}, row {sample.row_number}")
        try:
            rendered = samples.task.preferred(samples.task.render(template, row, adapter.columns))
            messages = messages_of(template, row, adapter.columns, rendered)
            if any(encoder.has_special(message["content"]) for message in messages):
                continue
            ids = full_prompt_ids(rendered, row, own)
        except UserError as error:
            return found(check, error.problems, "")
        try:
            asked = chat_ids(tokenizer, messages)
        except Exception as error:  # whatever Jinja raises
            return found(check, [Problem(f"it refuses a row ({error!s:.200})", place, ANEW)], "")
        same += asked == ids
        if difference := _difference(ids, asked):
            what = f"the messages of row {sample.row_number} do not become the trained prompt: {difference}"
            problems.append(Problem(what, place, ANEW))
    if not same and not problems:
        return not_checked(check, "every sample row has special-token text in it")
    return found(check, problems, f"the messages of {same} rows become the trained token ids")


def _difference(before: list[int], now: list[int] | None) -> str:
    if now is None:
        return "the row would be left out"
    if before == now:
        return ""
    at = next(
        (at for at, (old, new) in enumerate(zip(before, now, strict=False)) if old != new),
        min(len(before), len(now)),
    )
    return f"from token {at + 1} on ({len(before)} tokens then, {len(now)} now)"


def is_turns(adapter: AdapterFolder) -> bool:
    """Whether a chat template writes the prompts."""
    template = adapter.template
    return template.is_chat or any(variant.answer_role is not None for variant in template.variants)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return listed[0] + (f" and {len(listed) - 1} more" if len(listed) > 1 else "")
