"""Checks that adapter, template, tokenizer and base of an adapter folder belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from yeonma.adapter.adapter_folder import (
    CHAT_TEMPLATE,
    MANIFEST,
    AdapterFolder,
    base_identity,
    check_base,
    identity_of_tokenizer,
)
from yeonma.adapter.base_check import another_base
from yeonma.adapter.full_model import not_finite_in, stored_shapes
from yeonma.adapter.samples import SAMPLES, SampleRow, Samples, prompts_now
from yeonma.errors import Log, Problem, UserError
from yeonma.messages import counted, later, tr
from yeonma.model.adapter_config import WEIGHTS_FILE, read_adapter_config
from yeonma.model.adapter_file import not_finite, read_header
from yeonma.model.adapter_weights import Shapes as Shapes
from yeonma.model.adapter_weights import add_lora_of, add_rows, expected_shapes, misfits
from yeonma.model.base_content import changes, is_here, read_content
from yeonma.model.load import load_config, outline
from yeonma.model.source import BaseSource, find_base
from yeonma.tokenization.chat_template_export import (
    MARK,
    base_chat_template,
    chat_ids,
    conversation_of,
    full_prompt_ids,
)
from yeonma.tokenization.conversation import Conversation
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.verify.file_checks import Finding, checked, not_checked

REPLACE = tr("restore a copy of the file, or train again")


def check_weights(folder: Path, config: Mapping[str, Any]) -> tuple[Finding, Shapes]:
    """Checks that the tensors are finite and have the rank of adapter_config.json. Also returns their shapes."""
    check, place = later("adapter"), str(folder / WEIGHTS_FILE)
    try:
        tensors = read_header(folder)
    except UserError as error:
        return checked(check, error.problems, ""), {}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    problems = [
        Problem(
            tr("NaN or infinity in {name}", name=name), place, tr("use an earlier checkpoint, or train again")
        )
        for name in not_finite(folder, tensors)
    ]
    try:
        read_adapter_config(folder)
    except UserError as error:
        problems += error.problems
    rank = config.get("r")
    if not problems and isinstance(rank, int) and not config.get("rank_pattern"):
        wrong = [
            name
            for name, shape in shapes.items()
            if (own := _rank(name, shape)) and (own % rank if "experts" in name else own != rank)
        ]
        if wrong:
            what = tr(
                "{wrong} does not have rank {rank}, as adapter_config.json says",
                wrong=_some(wrong),
                rank=rank,
            )
            problems.append(Problem(what, place, REPLACE))
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    return checked(
        check,
        problems,
        tr("{shapes} with {size:,} parameters, all finite", shapes=counted(len(shapes), "tensor"), size=size),
    ), shapes


def _rank(name: str, shape: tuple[int, ...]) -> int | None:
    """The rank according to a tensor's shape; for fused experts, times their number."""
    if name.endswith(("lora_A.weight", "lora_embedding_A")):
        return shape[0]
    if name.endswith(("lora_B.weight", "lora_embedding_B")):
        return shape[1]
    return None


def check_names(adapter: AdapterFolder, config: Mapping[str, Any]) -> Finding:
    """Checks that adapter_config.json and yeonma.json name the same base."""
    base, place = adapter.base, str(adapter.path / "adapter_config.json")
    named = {"base_model_name_or_path": base.name, "revision": base.revision}
    problems = [
        Problem(
            tr(
                "{name} is {name2}, but yeonma.json says {expected}",
                name=name,
                name2=config.get(name),
                expected=expected,
            ),
            place,
            REPLACE,
        )
        for name, expected in named.items()
        if config.get(name) != expected
    ]
    return checked(
        later("template and rules"),
        problems,
        tr('template "{template}", base {base}', template=adapter.template.name, base=base.name),
    )


def locate_base(
    adapter: AdapterFolder, base_model: str | None, trust_remote_code: bool
) -> BaseSource | Finding:
    """Where the base is now, or a Finding that says why it cannot be checked.

    Raises UserError if `base_model` is given and does not exist.
    """
    if base_model is not None:
        source = find_base(base_model, None, trust_remote_code)
        load_config(source)
        return source
    name = adapter.base.name
    if adapter.trust_remote_code and not trust_remote_code:
        return not_checked(
            later("base"),
            tr("{name} comes with Python code; allow it with --trust_remote_code true", name=name),
        )
    if Path(name).is_absolute() and not Path(name).is_dir():
        return not_checked(
            later("base"), tr("it is no longer at {name}; give its place with --base_model", name=name)
        )
    try:
        source = find_base(name, adapter.base.revision, trust_remote_code)
        load_config(source)
    except UserError as error:
        if Path(name).is_dir():
            return checked(later("base"), error.problems, "")
        first = error.problems[0].what
        return not_checked(
            later("base"), tr("{name}: {first}; give its place with --base_model", name=name, first=first)
        )
    return source


def _recorded_base(adapter: AdapterFolder, source: BaseSource) -> Any:
    """The base without its weights; the finding, if it cannot be built so or is not the one that yeonma.json has."""
    model = outline(load_config(source), source)
    if model is None:
        return not_checked(
            later("base"), tr("{source} cannot be built without its weights", source=source.name)
        )
    try:
        check_base(adapter, base_identity(model, source))
    except UserError as error:
        return checked(later("base"), error.problems, "")
    return model


def check_model(adapter: AdapterFolder, source: BaseSource, shapes: Shapes) -> Finding:
    """Checks the base's config and size against yeonma.json, and the adapter's shapes against the base's layers."""
    model = _recorded_base(adapter, source)
    if isinstance(model, Finding):
        return model
    place, cure = str(adapter.path / WEIGHTS_FILE), tr("restore the adapter of this run, or train again")
    try:
        header = read_header(adapter.path)
        add_rows(model, header, str(adapter.path))
        expected = expected_shapes(add_lora_of(model, str(adapter.path), header=header))
    except UserError as error:
        return checked(later("base"), error.problems, "")
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        what = tr(
            "the adapter does not fit the base's layers ({error:.200})", error=str(error).splitlines()[0]
        )
        return checked(later("base"), [Problem(what, str(adapter.path / "adapter_config.json"), cure)], "")
    problems = misfits(shapes, expected, place, cure)
    return checked(
        later("base"),
        problems,
        tr(
            "{source} has the recorded config, and a layer for each of the adapter's tensors",
            source=source.name,
        ),
    )


def check_base_config(adapter: AdapterFolder, source: BaseSource) -> Finding:
    """Checks the base's config and size against yeonma.json."""
    model = _recorded_base(adapter, source)
    if isinstance(model, Finding):
        return model
    return checked(later("base"), [], tr("{source} has the recorded config", source=source.name))


def check_full_model(adapter: AdapterFolder) -> Finding:
    """Checks that the weights of a fully fine-tuned model are finite, and as many as its config has."""
    check, source = later("model"), BaseSource(str(adapter.path), None, adapter.trust_remote_code)
    try:
        find_base(source.name, None, source.trust_remote_code)
        shapes = stored_shapes(adapter.path)
        bad = not_finite_in(adapter.path)
        model = outline(load_config(source), source)
    except UserError as error:
        return checked(check, error.problems, "")
    cure = tr("use an earlier checkpoint, or train again")
    problems = [Problem(tr("NaN or infinity in {name}", name=name), str(adapter.path), cure) for name in bad]
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    if model is not None:
        tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
        expected = sum(tensor.numel() for tensor in tensors.values())
        if size != expected:
            what = tr(
                "its weights have {size:,} numbers, and a model of its config.json has {expected:,}",
                size=size,
                expected=expected,
            )
            problems.append(Problem(what, str(adapter.path), REPLACE))
    return checked(
        check,
        problems,
        tr("{shapes} with {size:,} parameters, all finite", shapes=counted(len(shapes), "tensor"), size=size),
    )


def check_base_content(adapter: AdapterFolder, source: BaseSource | Finding, log: Log) -> Finding:
    """Checks that the base's weights, config and end tokens are those of training. Reads every weight file, whatever
    the cache knows of it."""
    check, content = later("base's content"), adapter.base_content
    if content is None:
        return not_checked(
            check, tr("{manifest} does not record it: the run is of an earlier version", manifest=MANIFEST)
        )
    if isinstance(source, Finding):
        is_gone = Path(adapter.base.name).is_absolute() and not Path(adapter.base.name).is_dir()
        return not_checked(
            check, tr("the base is not here") if is_gone else tr("the base cannot be read, as said above")
        )
    if not is_here(source):
        return not_checked(check, tr("the weights of {source} are not on this machine", source=source.name))
    try:
        now = read_content(source, log=log, trust_cache=False)
    except UserError as error:
        return checked(check, error.problems, "")
    cure = another_base(adapter, source.name, []).problems[0].cure
    problems = [Problem(what, source.name, cure) for what in changes(content, now)]
    files = counted(len(now.weights), "weight file")
    return checked(
        check, problems, tr("{files}, config and end tokens are those of training, read again", files=files)
    )


def check_tokenizer(adapter: AdapterFolder, tokenizer: Any, check: str, place: str) -> Finding:
    """Checks that a tokenizer is that of training, in everything that decides the template's tokens."""
    recorded = adapter.details.get("tokenizer")
    if not isinstance(recorded, Mapping):
        return not_checked(
            check, tr("{manifest} does not record it: the run is of an earlier version", manifest=MANIFEST)
        )
    key = "with_chat_template_sha256" if adapter.template.has_turns else "sha256"
    now = identity_of_tokenizer(tokenizer)
    if now[key] == recorded.get(key):
        about = (
            tr("the vocabulary and rules and chat template are those of training")
            if adapter.template.has_turns
            else tr("the vocabulary and rules are those of training")
        )
        return checked(check, [], about)
    what = tr("this is not the tokenizer of training")
    if adapter.template.has_turns and now["sha256"] == recorded.get("sha256"):
        what = tr("its chat template is not that of training")
    return checked(check, [Problem(what, place, tr("restore a copy of the run's tokenizer"))], "")


def check_samples(
    adapter: AdapterFolder, samples: Samples | None, tokenizer: Any, check: str, place: str
) -> Finding:
    """Checks that this tokenizer gives the sample rows' prompts the token ids of training."""
    if samples is None:
        return not_checked(check, lost(SAMPLES))
    if not samples.rows:
        return not_checked(check, tr("the run saved none (card_rows 0)"))
    try:
        now = prompts_now(samples, adapter.template, adapter.columns, tokenizer, adapter.rules)
    except UserError as error:
        return checked(check, error.problems, "")
    cure = tr("use the tokenizer and template of training; with others the model answers worse")
    problems = [
        Problem(
            tr(
                "the prompt of row {row_number} differs from training: {difference}",
                row_number=row.row_number,
                difference=difference,
            ),
            place,
            cure,
        )
        for row, ids in zip(samples.rows, now, strict=True)
        if (difference := _difference(row.prompt_ids, ids))
    ]
    return checked(
        check,
        problems,
        tr("the prompts of {rows} have the token ids of training", rows=counted(len(samples.rows), "row")),
    )


def check_chat_template(adapter: AdapterFolder, samples: Samples | None, tokenizer: Any, own: Any) -> Finding:
    """Checks that the folder's chat template, which `tokenizer` has, gives messages the token ids of training.

    `own`: the same tokenizer with the base's chat template. Rows with special-token text are left out, because other
    tools turn it into special tokens.
    """
    check, place = later("chat template"), str(adapter.path / CHAT_TEMPLATE)
    if not asks_by_messages(adapter, tokenizer):
        return not_checked(
            check, tr("it does not contain the training template: other tools send other tokens")
        )
    if samples is None or not samples.rows:
        return not_checked(check, tr("there are no sample rows to try it with"))
    encoder, problems, same = TextEncoder.of(own), [], 0
    for sample in samples.rows:
        try:
            asked = sample_as_messages(adapter, samples, sample, encoder)
        except UserError as error:
            return checked(check, error.problems, "")
        if asked is None:
            continue
        conversation, ids = asked
        try:
            message_ids = chat_ids(tokenizer, conversation)
        except Exception as error:  # whatever Jinja raises
            return checked(
                check, [Problem(tr("it fails on a row ({error!s:.200})", error=error), place, REPLACE)], ""
            )
        same += message_ids == ids
        if difference := _difference(ids, message_ids):
            what = tr(
                "the messages of row {row_number} do not give the prompt of training: {difference}",
                row_number=sample.row_number,
                difference=difference,
            )
            problems.append(Problem(what, place, REPLACE))
    if not same and not problems:
        return not_checked(check, tr("every sample row contains special-token text"))
    return checked(
        check,
        problems,
        tr("the messages of {same} have the token ids of training", same=counted(same, "row")),
    )


def lost(name: str) -> str:
    """Of a file that the run's version, or a copy of its folder, did not have."""
    return tr("no {name}: the run is of an earlier version, or the file was lost", name=name)


def asks_by_messages(adapter: AdapterFolder, tokenizer: Any) -> bool:
    """Whether messages can stand for the template's prompts. `tokenizer` has the folder's chat template."""
    return adapter.template.takes_turns or base_chat_template(tokenizer).startswith(MARK)


def sample_as_messages(
    adapter: AdapterFolder, samples: Samples, sample: SampleRow, own: TextEncoder
) -> tuple[Conversation, list[int]] | None:
    """A sample row as other tools take it, and its prompt's ids without a limit of length. None if it contains
    special-token text, which they turn into special tokens. `own`: of the tokenizer with the base's chat template.

    Raises UserError as rendering and encoding do.
    """
    template, row, tokenizer = adapter.template, sample.as_row(), own.tokenizer
    rendered = samples.task.preferred(samples.task.render(template, row, adapter.columns))
    conversation = conversation_of(template, row, adapter.columns, rendered, tokenizer, adapter.rules)
    if any(own.has_special(message["content"] or "") for message in conversation.messages):
        return None
    return conversation, full_prompt_ids(rendered, row, tokenizer, adapter.rules)


def _difference(before: list[int], now: list[int] | None) -> str:
    if now is None:
        return tr("the row would be left out")
    if before == now:
        return ""
    at = next(
        (at for at, (old, new) in enumerate(zip(before, now, strict=False)) if old != new),
        min(len(before), len(now)),
    )
    return tr(
        "from token {at} on ({before} in training, {now} now)",
        at=at + 1,
        before=counted(len(before), "token"),
        now=len(now),
    )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    if len(listed) == 1:
        return listed[0]
    return tr("{name} and {count} more", name=listed[0], count=len(listed) - 1)
