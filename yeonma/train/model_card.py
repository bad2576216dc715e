"""The model card, OUT/README.md: base and data, losses before and after, sample answers, and how to use the adapter.

It is read by others, so it has no path of this machine. It follows from the run alone: no time, no host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.adapter.adapter_folder import (
    PUBLISHED,
    AdapterFolder,
    folder_stand_in,
    hub_name,
    local_base_note,
    read_adapter_folder,
)
from yeonma.adapter.base_licence import licence_note
from yeonma.adapter.prompt_builder import NO_LIMIT
from yeonma.adapter.samples import MAX_NEW_TOKENS as MAX_NEW_TOKENS
from yeonma.adapter.samples import asked_sets, prompts_of, with_room
from yeonma.config.parse import changed_settings
from yeonma.config.settings import RunConfig
from yeonma.config.yaml_text import front_matter, write_item
from yeonma.data.python_rows import is_label
from yeonma.data.template import Rendered, Template, answer_text
from yeonma.data.text_checks import SCRIPTS
from yeonma.forgetting.kept import Kept
from yeonma.generation.completion import Answer
from yeonma.generation.sampling import SamplingParams
from yeonma.messages import counted, tr, translated
from yeonma.model.language_part import left_out
from yeonma.model.load import eos_tokens
from yeonma.model.position_limits import model_positions
from yeonma.model.targets import Coverage, coverage
from yeonma.policy import Policy
from yeonma.run_folder.checkpoint import write_text_atomically
from yeonma.run_folder.run_log import read_metrics
from yeonma.run_folder.units import counted_units
from yeonma.shown import code, code_block, markdown, shell_word
from yeonma.tokenization.dataset import Dataset, PreparedSet, used_rows
from yeonma.tokenization.example import AnswerTokens, answer_tokens, end_of_prompt
from yeonma.train.card_answers import answer_table
from yeonma.train.card_general import kept_section
from yeonma.train.card_tables import (
    confusion_tables,
    data_set_table,
    last_part,
    loss_table,
    validation_table,
)
from yeonma.train.card_usage import (
    Usage,
    example_prompt,
    folder_chat_template,
    ollama_lines,
    python_lines,
    sglang_lines,
    vllm_lines,
)

OnAnswer = Callable[[int, int], None]
"""Takes the number of answers so far, and of all."""
MAX_CHARACTERS = 600
"""Of a prompt or an answer on the card."""
LANGUAGE_OF_SCRIPT = {"Hangul": "ko", "Kana": "ja", "Thai": "th", "Greek": "el"}
"""Scripts that one language alone is written with today."""
PATH_SETTINGS = ("base_model", "adapter", "data_path", "val_data_path", "template", "resume_from_checkpoint")
"""Settings that may name places on this machine. The card has the last part of these."""
LEFT_TO_THE_MACHINE = ("output_dir", "cache_dir")
"""Settings that say nothing about the result, and name places of this machine."""


@dataclass(frozen=True)
class CardAnswer:
    """An answer as the model wrote it, and its text without what the template puts around it."""

    text: str
    generated: Answer


@dataclass(frozen=True)
class Sample:
    """A row's prompt and reference answer, and the answers of the base model and of the trained one."""

    row: int
    data_set: str
    """Its data set, if there are several; else empty."""
    fields: dict[str, str]
    """The template's fields before the answer, as the row has them. Empty for conversations."""
    shortened: bool
    """Whether a field is longer than what the models were asked."""
    prompt: str
    """What the models were asked, as text."""
    prompt_ids: tuple[int, ...]
    reference: str
    base: CardAnswer
    adapter: CardAnswer


def write_card(
    output: Path,
    policy: Policy,
    tokenizer: Any,
    dataset: Dataset,
    config: RunConfig,
    command: str,
    adapter_step: int,
    rows: int,
    remarks: Sequence[str] = (),
    base_answers: Sequence[CardAnswer] | None = None,
    on_answer: OnAnswer = lambda done, total: None,
    kept: Kept | None = None,
) -> list[Sample]:
    """Writes the card, with greedy answers of the base model and the trained one to `rows` rows, which it returns.

    `adapter_step`: the step whose weights are in the folder. `command`: how to repeat the run. `base_answers`: those of
    the base, from `answers_before`, if its weights are no longer in memory. `on_answer` gets the number of answers so
    far, and of all. `kept`: what the trained model kept of the base, if it was asked.
    """
    samples = sample_answers(policy, tokenizer, dataset, rows, base_answers, on_answer) if rows else []
    adapter = read_adapter_folder(output)
    text = card_text(
        adapter,
        samples,
        read_metrics(output / "metrics.jsonl"),
        units=dataset.task.units,
        language=_language(dataset),
        settings=_settings_lines(config),
        command=command,
        adapter_step=adapter_step,
        reached=None if adapter.is_full else coverage(policy.transformers_model),
        remarks=remarks,
        usage=_usage(output, adapter, policy, tokenizer, dataset, samples),
        kept=kept,
    )
    write_text_atomically(output / "README.md", text)
    return samples


def _usage(
    output: Path,
    adapter: AdapterFolder,
    policy: Policy,
    tokenizer: Any,
    dataset: Dataset,
    samples: Sequence[Sample],
) -> list[str]:
    """How other tools use the folder, with the fields of the first sample as the example."""
    model, template = policy.transformers_model, dataset.template
    generation = model.generation_config
    is_turn = template.variants[0].answer_role is not None
    stop_ids = answer_tokens(tokenizer, dataset.rules if is_turn else None, eos_tokens(generation)).stop_ids
    values = samples[0].fields if samples and samples[0].fields and not template.takes_turns else None
    usage = Usage(
        base=hub_name(adapter.base.name) or folder_stand_in(adapter.base.name),
        prompt=example_prompt(template, dataset.rules, tokenizer, folder_chat_template(output), values),
        stop_ids=stop_ids,
        ends_elsewhere={*stop_ids} <= {tokenizer.eos_token_id, *eos_tokens(generation)},
        repeats_penalised=getattr(generation, "repetition_penalty", None) not in (None, 1.0),
        model_class=type(model).__name__ if left_out(model) else "",
    )
    lines = [
        *python_lines(output, adapter, usage),
        *vllm_lines(output, adapter, usage),
        *sglang_lines(output, adapter, usage),
        *ollama_lines(output, adapter, usage),
    ]
    if hub_name(adapter.base.name) is None and not adapter.is_full and lines:
        lines += [local_base_note(adapter.base.name), ""]
    return lines


def _language(dataset: Dataset) -> str | None:
    """The language of the answers, where the script of most of them is that of one language alone."""
    found = set()
    for one in dataset.sets:
        if one.settings.share is not None:
            continue
        store = one.train.store
        scripts = store.row_scripts[used_rows(*one.train.examples) - 1]
        found |= {
            language
            for bit, script in enumerate(SCRIPTS)
            if (language := LANGUAGE_OF_SCRIPT.get(script))
            and 2 * int(np.count_nonzero(scripts >> bit & 1)) > len(scripts)
        }
    return found.pop() if len(found) == 1 else None


def _hub_sets(names: Sequence[str]) -> list[str]:
    """The data sets on the hub among the names of a run's data."""
    return [
        name.partition(":")[0]
        for name in names
        if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name)
        and not Path(name).exists()
        and not is_label(name)
    ]


def _settings_lines(config: RunConfig) -> list[str]:
    """The settings that differ from their defaults, as YAML, without places of this machine and without the text of the
    template, which the card shows."""
    changed = {
        name: _without_folders(value) if name in PATH_SETTINGS else value
        for name, value in changed_settings(config).items()
        if name not in LEFT_TO_THE_MACHINE and not (name == "template" and "\n" in str(value))
    }
    return [write_item(name, value).rstrip("\n") for name, value in changed.items()]


def _without_folders(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _without_folders(item) for name, item in value.items()}
    return last_part(value) if isinstance(value, str) and "\n" not in value else value


def sample_answers(
    policy: Policy,
    tokenizer: Any,
    dataset: Dataset,
    count: int,
    base_answers: Sequence[CardAnswer] | None = None,
    on_answer: OnAnswer = lambda done, total: None,
) -> list[Sample]:
    """Answers the first rows of each data set, `count` in all but at least one of each, with the base model and with
    the trained one. They are validation rows where there are some. Whole texts have no prompts to answer.
    `base_answers` and `on_answer` as in `write_card`."""
    policies = [policy, *([replace(policy, adapter_weights=False)] if base_answers is None else [])]
    samples: list[Sample] = []
    on_done = _counter(dataset, count, len(policies), on_answer)
    for one, share in _asked(dataset, count):
        prompts, rendered, answers = _answers_of_set(policies, tokenizer, dataset, one, share, on_done)
        first = len(samples)
        base = answers[1] if base_answers is None else base_answers[first : first + len(prompts)]
        rows = (one.validation or one.train).first_rows(share)
        tokens = _answer_tokens(policy, tokenizer, dataset, rendered)
        samples += [
            Sample(
                row.number,
                last_part(one.name) if len(dataset.sets) > 1 else "",
                fields := _fields_of(text, one.template),
                any(value not in prompt for value in fields.values()),
                prompt,
                tuple(prompt_ids.tolist()),
                tokens.shape.parts(_reference(text)).content,
                *both,
            )
            for row, prompt_ids, prompt, text, *both in zip(
                rows,
                prompts,
                tokenizer.batch_decode(
                    prompts, skip_special_tokens=False, clean_up_tokenization_spaces=False
                ),
                rendered,
                base,
                answers[0],
                strict=True,
            )
        ]
    return samples


def answers_before(
    policy: Policy,
    tokenizer: Any,
    dataset: Dataset,
    count: int,
    on_answer: OnAnswer = lambda done, total: None,
) -> list[CardAnswer]:
    """The answers of a model to the rows of `sample_answers`, before its weights are trained."""
    on_done = _counter(dataset, count, 1, on_answer)
    return [
        answer
        for one, share in _asked(dataset, count)
        for answer in _answers_of_set([policy], tokenizer, dataset, one, share, on_done)[2][0]
    ]


def _counter(dataset: Dataset, count: int, policies: int, on_answer: OnAnswer) -> Callable[[], None]:
    """Calls `on_answer` before the first answer, and after each with the number of answers so far."""
    parts = ((one.validation or one.train, share) for one, share in _asked(dataset, count))
    rows = sum(min(share, len(used_rows(part.store, part.positions))) for part, share in parts)
    total, done = policies * rows, 0
    if total:
        on_answer(0, total)

    def answered() -> None:
        nonlocal done
        done += 1
        on_answer(done, total)

    return answered


def _asked(dataset: Dataset, count: int) -> list[tuple[PreparedSet, int]]:
    """The data sets whose rows are answered, and how many of each."""
    asked = asked_sets(dataset)
    shares = [len(range(number, count, len(asked))) for number in range(len(asked))]
    return [(one, max(share, 1)) for one, share in zip(asked, shares, strict=True)]


def _answer_tokens(
    policy: Policy, tokenizer: Any, dataset: Dataset, rendered: Sequence[Rendered]
) -> AnswerTokens:
    is_turn = rendered[0].answer_role is not None
    eos = eos_tokens(policy.transformers_model.generation_config)
    return answer_tokens(tokenizer, dataset.rules if is_turn else None, eos)


def _answers_of_set(
    policies: Sequence[Policy],
    tokenizer: Any,
    dataset: Dataset,
    one: PreparedSet,
    count: int,
    on_done: Callable[[], None],
) -> tuple[list[NDArray[np.int32]], list[Rendered], list[list[CardAnswer]]]:
    """(prompts, rendered rows, each policy's answers) for the first `count` rows of a data set, from the prompt ids of
    training. The policies share one model, which stays in training mode."""
    policy = policies[0]
    part = one.validation or one.train
    rows = part.first_rows(count)
    task = dataset.task
    rendered = [task.preferred(task.render(one.template, row, one.columns)) for row in rows]
    prompts = prompts_of(part.store, [row.number for row in rows])
    positions = model_positions(policy.transformers_model.config)
    prompts = with_room(prompts, rendered, rows, tokenizer, dataset.rules, positions, MAX_NEW_TOKENS)
    tokens = _answer_tokens(policy, tokenizer, dataset, rendered)
    sampling = SamplingParams(
        stop_ids=tokens.stop_ids,
        shown_ids=tokens.shown_ids,
        max_new_tokens=max(1, min(MAX_NEW_TOKENS, (positions or NO_LIMIT) - max(map(len, prompts)))),
    )
    answers = [
        [
            CardAnswer(_alone(answer.text, prompt.tolist(), tokens, tokenizer), answer)
            for prompt, answer in zip(
                prompts,
                each.generate_from_ids(
                    prompts,
                    tokenizer,
                    sampling,
                    batch_size=len(prompts),
                    on_answer=lambda index, answer: on_done(),
                ),
                strict=True,
            )
        ]
        for each in policies
    ]
    return prompts, rendered, answers


def _alone(text: str, prompt: Sequence[int], tokens: AnswerTokens, tokenizer: Any) -> str:
    """The answer without what the chat template makes the model write around it; reasoning only if nothing
    follows."""
    parts = tokens.shape.parts(text, is_open=tokens.shape.opens(end_of_prompt(prompt, tokenizer)))
    content = parts.content.removesuffix(tokens.shape.trail)
    if parts.reasoning and (not content or content.isspace()):
        return tr("(reasoning without an answer: {reasoning})", reasoning=parts.reasoning)
    return content


def _reference(rendered: Rendered) -> str:
    """The row's own answer; empty if it has none."""
    if rendered.answer:
        return answer_text(rendered)
    last = rendered.turns[-1]
    return "".join(piece.text for piece in last.pieces) if last.role == "assistant" else ""


def _fields_of(rendered: Rendered, template: Template) -> dict[str, str]:
    """The fields of a row's prompt; none for conversations, whose turns are no fields."""
    variant = template.variants[rendered.variant]
    if variant.is_turn_list or variant.turn_fields:
        return {}
    return {piece.field: piece.text for piece in rendered.prompt_pieces if piece.field is not None}


def card_text(
    adapter: AdapterFolder,
    samples: Sequence[Sample],
    metrics: Sequence[Mapping[str, Any]],
    *,
    units: str,
    language: str | None,
    settings: Sequence[str],
    command: str,
    adapter_step: int,
    reached: Coverage | None,
    remarks: Sequence[str] = (),
    usage: Sequence[str] = (),
    kept: Kept | None = None,
) -> str:
    """The card. `settings`: lines of YAML. `reached`: what has the adapter. `usage`: how other tools use the folder."""
    trained_on = adapter.details["trained_on"]
    evaluations = [record for record in metrics if record.get("evaluation")]
    sets = trained_on.get("data_sets", ())
    names = [one["name"] for one in sets] or [trained_on["data"]]
    folder = shell_word(adapter.path.resolve().name)
    about = {
        "base_model": hub_name(adapter.base.name),
        "datasets": _hub_sets(names),
        "language": language,
        "library_name": "transformers" if adapter.is_full else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["yeonma"] if adapter.is_full else ["lora", "yeonma"],
    }
    base = code(last_part(adapter.base.name))
    what = (
        tr("{base} with all of its weights fine-tuned", base=base)
        if adapter.is_full
        else tr("A LoRA adapter for {base}", base=base)
    )
    lines = [
        *front_matter({key: value for key, value in about.items() if value}),
        f"# {markdown(adapter.path.resolve().name)}",
        "",
        f"{_about_training(what, trained_on, units, names, adapter_step)} {_about_rows(trained_on)}",
        "",
        *_published(adapter),
        *licence_note(adapter.base.name),
    ]
    lines += _lora(adapter.details.get("lora"), reached)
    if faults := trained_on.get("bad_rows"):
        listed = [f"- {code(translated(fault))}: {count:,}" for fault, count in faults.items()]
        lines += [tr("Bad rows among those left out:"), "", *listed, ""]
    if remarks:
        lines += [*(f"- {markdown(remark)}." for remark in remarks), ""]
    lines += data_set_table(sets, units)
    if evaluations:
        of_step = {record["step"]: record for record in reversed(evaluations)}
        before, after = of_step.get(0), of_step.get(adapter_step)
        if before is not None and after is not None:
            lines += validation_table(before, after, units, "model" if adapter.is_full else "adapter")
            lines += loss_table(before.get("losses", {}), after.get("losses", {}))
            lines += confusion_tables(after.get("confusion", {}))
            lines += answer_table(evaluations, adapter_step, "model" if adapter.is_full else "adapter")
        else:  # the log was deleted while the run was stopped, and begins later
            lines += [tr("metrics.jsonl does not have the validation losses of before and after."), ""]
    lines += ["![loss](loss.svg)", ""]
    lines += kept_section(kept)
    lines += _samples(samples, tr("fine-tuned") if adapter.is_full else tr("with the adapter"))
    lines += [tr("## Template"), "", *code_block(adapter.template.text), ""]
    for one in sets:
        if one["template"]["text"] != adapter.template.text:
            about_set = tr("Template of {name}:", name=code(last_part(one["name"])))
            lines += [about_set, "", *code_block(one["template"]["text"]), ""]
    lines += [
        tr("## Use"),
        "",
        *code_block(f"yeonma generate {folder} --data_path rows.jsonl\nyeonma chat {folder}", "sh"),
        "",
        *usage,
        tr("## Training"),
        "",
        *code_block(command, "sh"),
        "",
        "<details>",
        f"<summary>{tr('Settings that differ from the defaults')}</summary>",
        "",
        *code_block("\n".join(settings), "yaml"),
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def _about_training(
    what: str, trained_on: Mapping[str, Any], units: str, names: Sequence[str], step: int
) -> str:
    about = {
        "what": what,
        "examples": counted_units(trained_on["examples"], units),
        "tokens": trained_on["trained_tokens"],
        "names": ", ".join(code(last_part(name)) for name in names),
        "steps": counted(step, "step"),
    }
    if trained_on.get("data_sets"):
        return tr(
            "{what}, trained with Yeonma on {examples} ({tokens:,} trained tokens) of {names} in {steps}.",
            **about,
        )
    return tr(
        "{what}, trained with Yeonma on {examples} ({tokens:,} trained tokens an epoch) of {names} in {steps}.",
        **about,
    )


def _about_rows(trained_on: Mapping[str, Any]) -> str:
    return tr(
        "{examples} shortened and {left_out:,} left out.",
        examples=counted(trained_on["shortened"], "example was", "examples were"),
        left_out=trained_on["left_out"],
    )


def _samples(samples: Sequence[Sample], trained: str) -> list[str]:
    """The rows with both answers. Of a row that fills a template, the fields are shown without the frame."""
    if not samples:
        return []
    lines = [tr("## Before and after"), ""]
    if any(sample.fields for sample in samples):
        lines += [tr("The rows' fields fill the template below."), ""]
    for sample in samples:
        heading = tr("### Row {row}", row=sample.row)
        if sample.data_set:
            heading = tr("### Row {row} of {data_set}", row=sample.row, data_set=markdown(sample.data_set))
        lines += [heading, ""]
        if sample.shortened:
            lines += [tr("The models were asked with a shortened text."), ""]
        texts = [(code(name), text) for name, text in sample.fields.items()] or [
            (tr("prompt"), sample.prompt)
        ]
        texts += [(tr("reference:").removesuffix(":"), sample.reference)] if sample.reference else []
        texts += [(tr("base model"), sample.base.text), (trained, sample.adapter.text)]
        for name, text in texts:
            lines += [f"{name}:", "", *code_block(_short(text)), ""]
    return lines


def _published(adapter: AdapterFolder) -> list[str]:
    """What the base's own files hold, if they are quantised."""
    published = adapter.details.get(PUBLISHED)
    if not published:
        return []
    kind = tr(
        "{method}, {kind} in {bits} bits",
        method=published["method"],
        kind=published["kind"],
        bits=published["bits"],
    )
    return [
        tr(
            "The base's weights are published as {kind}, and the adapter was trained on these.",
            kind=markdown(kind),
        ),
        "",
    ]


def _lora(lora: Mapping[str, Any] | None, reached: Coverage | None) -> list[str]:
    """The adapter's shape, and what of the model has it."""
    if lora is None or reached is None:
        return []
    kinds = [name for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if lora[key]]
    shape = ", ".join([tr("Rank {rank}", rank=lora["r"]), f"alpha {lora['alpha']:g}", *kinds])
    return [
        tr(
            "{shape}, dropout {dropout:g}. The adapter is on {on}.",
            shape=shape,
            dropout=lora["dropout"],
            on=markdown(str(reached)),
        ),
        "",
    ]


def _short(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} [...] {text[-half:]}"
