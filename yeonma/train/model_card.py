"""The model card, OUT/README.md: base and data, losses before and after, sample answers, and how to use the adapter.

It is read by others, so it has no path of this machine. It follows from the run alone: no time, no host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from yeonma.adapter.samples import prompts_of
from yeonma.config.parse import changed_settings
from yeonma.config.settings import RunConfig
from yeonma.config.yaml_text import front_matter, write_item
from yeonma.data.classification import Confusion, confusion_table, f1_of, labels_of
from yeonma.data.python_rows import is_label
from yeonma.data.rows import Row
from yeonma.data.template import Rendered, Template, answer_text
from yeonma.data.text_checks import SCRIPTS
from yeonma.errors import UserError
from yeonma.generation.sampling import SamplingParams
from yeonma.messages import counted
from yeonma.model.language_part import left_out
from yeonma.model.load import eos_tokens
from yeonma.model.position_limits import model_positions
from yeonma.policy import Policy
from yeonma.run_folder.checkpoint import write_text_atomically
from yeonma.run_folder.run_log import read_metrics
from yeonma.shown import code, code_block, markdown, shell_word
from yeonma.tokenization.dataset import Dataset, PreparedSet, used_rows
from yeonma.tokenization.example import AnswerTokens, TokenRules, answer_tokens, end_of_prompt
from yeonma.tokenization.example_encoder import encode_prompt
from yeonma.train.card_usage import (
    Usage,
    example_prompt,
    folder_chat_template,
    ollama_lines,
    python_lines,
    vllm_lines,
)

OnAnswer = Callable[[int, int], None]
"""Takes the number of answers so far, and of all."""
MAX_NEW_TOKENS = 128
MAX_CHARACTERS = 600
"""Of a prompt or an answer on the card."""
LANGUAGE_OF_SCRIPT = {"Hangul": "ko", "Kana": "ja", "Thai": "th", "Greek": "el"}
"""Scripts that one language alone is written with today."""
PATH_SETTINGS = ("base_model", "adapter", "data_path", "val_data_path", "template", "resume_from_checkpoint")
"""Settings that may name places on this machine. The card has the last part of these."""
LEFT_TO_THE_MACHINE = ("output_dir", "cache_dir")
"""Settings that say nothing about the result, and name places of this machine."""


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
    reference: str
    base: str
    adapter: str


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
    base_answers: Sequence[str] | None = None,
    on_answer: OnAnswer = lambda done, total: None,
) -> None:
    """Writes the card, with greedy answers of the base model and the trained one to `rows` rows.

    `adapter_step`: the step whose weights are in the folder. `command`: how to repeat the run. `base_answers`: those of
    the base, from `answers_before`, if its weights are no longer in memory. `on_answer` gets the number of answers so
    far, and of all.
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
        remarks=remarks,
        usage=_usage(output, adapter, policy, tokenizer, dataset, samples),
    )
    write_text_atomically(output / "README.md", text)


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
        *python_lines(output, adapter, usage, MAX_NEW_TOKENS),
        *vllm_lines(output, adapter, usage),
        *ollama_lines(output, adapter, usage),
    ]
    if hub_name(adapter.base.name) is None and not adapter.is_full and lines:
        lines += [local_base_note(adapter.base.name), ""]
    return lines


def _last_part(name: str) -> str:
    """The last part of a path of this machine; other names as they are."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _language(dataset: Dataset) -> str | None:
    """The language of the answers, where the script of most of them is that of one language alone."""
    found = set()
    for one in dataset.sets:
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
    return _last_part(value) if isinstance(value, str) and "\n" not in value else value


def sample_answers(
    policy: Policy,
    tokenizer: Any,
    dataset: Dataset,
    count: int,
    base_answers: Sequence[str] | None = None,
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
                _last_part(one.name) if len(dataset.sets) > 1 else "",
                fields := _fields_of(text, one.template),
                any(value not in prompt for value in fields.values()),
                prompt,
                tokens.shape.parts(_reference(text)).content,
                *texts,
            )
            for row, prompt, text, *texts in zip(
                rows,
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
) -> list[str]:
    """The answers of a model to the rows of `sample_answers`, before its weights are trained."""
    on_done = _counter(dataset, count, 1, on_answer)
    return [
        text
        for one, share in _asked(dataset, count)
        for text in _answers_of_set([policy], tokenizer, dataset, one, share, on_done)[2][0]
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
    asked = [one for one in dataset.sets if not one.template.is_text]
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
) -> tuple[list[NDArray[np.int32]], list[Rendered], list[list[str]]]:
    """(prompts, rendered rows, each policy's answers) for the first `count` rows of a data set, from the prompt ids of
    training. The policies share one model, which stays in training mode."""
    policy = policies[0]
    part = one.validation or one.train
    rows = part.first_rows(count)
    task = dataset.task
    rendered = [task.preferred(task.render(one.template, row, one.columns)) for row in rows]
    prompts = prompts_of(part.store, [row.number for row in rows])
    positions = model_positions(policy.transformers_model.config)
    prompts = _with_room(prompts, rendered, rows, tokenizer, dataset.rules, positions)
    tokens = _answer_tokens(policy, tokenizer, dataset, rendered)
    sampling = SamplingParams(
        stop_ids=tokens.stop_ids,
        shown_ids=tokens.shown_ids,
        max_new_tokens=max(1, min(MAX_NEW_TOKENS, (positions or NO_LIMIT) - max(map(len, prompts)))),
    )
    answers = [
        [
            _alone(answer.text, prompt.tolist(), tokens, tokenizer)
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


def _with_room(
    prompts: Sequence[NDArray[np.int32]],
    rendered: Sequence[Rendered],
    rows: Sequence[Row],
    tokenizer: Any,
    rules: TokenRules,
    positions: int | None,
) -> list[NDArray[np.int32]]:
    """The prompts, shortened as `yeonma generate` does where the model has no positions left for the answer; as they
    are where nothing can be shortened."""
    result = list(prompts)
    for index, prompt in enumerate(prompts):
        if positions is not None and len(prompt) + MAX_NEW_TOKENS > positions:
            with suppress(UserError):
                result[index] = encode_prompt(
                    rendered[index], rows[index], tokenizer, rules.within(positions), MAX_NEW_TOKENS
                )
    return result


def _alone(text: str, prompt: Sequence[int], tokens: AnswerTokens, tokenizer: Any) -> str:
    """The answer without what the chat template makes the model write around it; reasoning only if nothing
    follows."""
    parts = tokens.shape.parts(text, is_open=tokens.shape.opens(end_of_prompt(prompt, tokenizer)))
    content = parts.content.removesuffix(tokens.shape.trail)
    if parts.reasoning and (not content or content.isspace()):
        return f"(reasoning without an answer: {parts.reasoning})"
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
    remarks: Sequence[str] = (),
    usage: Sequence[str] = (),
) -> str:
    """The card. `settings`: lines of YAML. `usage`: how other tools use the folder."""
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
    base = code(_last_part(adapter.base.name))
    what = f"{base} with all of its weights fine-tuned" if adapter.is_full else f"A LoRA adapter for {base}"
    lines = [
        *front_matter({key: value for key, value in about.items() if value}),
        f"# {markdown(adapter.path.resolve().name)}",
        "",
        f"{what}, trained with Yeonma on {counted(trained_on['examples'], units.removesuffix('s'), units)} "
        f"({trained_on['trained_tokens']:,} trained tokens{'' if sets else ' an epoch'}) of "
        f"{', '.join(code(_last_part(name)) for name in names)} in "
        f"{counted(adapter_step, 'step')}. "
        f"{counted(trained_on['shortened'], 'example was', 'examples were')} shortened and "
        f"{trained_on['left_out']:,} left out.",
        "",
        *_published(adapter),
        *licence_note(adapter.base.name),
    ]
    lines += _lora(adapter.details.get("lora"))
    if faults := trained_on.get("bad_rows"):
        listed = [f"- {code(fault)}: {count:,}" for fault, count in faults.items()]
        lines += ["Bad rows among those left out:", "", *listed, ""]
    if remarks:
        lines += [*(f"- {markdown(remark)}." for remark in remarks), ""]
    lines += _data_sets(sets, units)
    if evaluations:
        of_step = {record["step"]: record for record in reversed(evaluations)}
        before, after = of_step.get(0), of_step.get(adapter_step)
        if before is not None and after is not None:
            lines += _validation(before, after, units, "model" if adapter.is_full else "adapter")
            lines += _losses(before.get("losses", {}), after.get("losses", {}))
            lines += _confusions(after.get("confusion", {}))
        else:  # the log was deleted while the run was stopped, and begins later
            lines += ["metrics.jsonl does not have the validation losses of before and after.", ""]
    lines += ["![loss](loss.svg)", ""]
    lines += _samples(samples, "fine-tuned" if adapter.is_full else "with the adapter")
    lines += ["## Template", "", *code_block(adapter.template.text), ""]
    for one in sets:
        if one["template"]["text"] != adapter.template.text:
            about_set = f"Template of {code(_last_part(one['name']))}:"
            lines += [about_set, "", *code_block(one["template"]["text"]), ""]
    lines += [
        "## Use",
        "",
        *code_block(f"yeonma generate {folder} --data_path rows.jsonl\nyeonma chat {folder}", "sh"),
        "",
        *usage,
        "## Training",
        "",
        *code_block(command, "sh"),
        "",
        "<details>",
        "<summary>Settings that differ from the defaults</summary>",
        "",
        *code_block("\n".join(settings), "yaml"),
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def _samples(samples: Sequence[Sample], trained: str) -> list[str]:
    """The rows with both answers. Of a row that fills a template, the fields are shown without the frame."""
    if not samples:
        return []
    lines = ["## Before and after", ""]
    if any(sample.fields for sample in samples):
        lines += ["The rows' fields fill the template below.", ""]
    for sample in samples:
        of_set = f" of {markdown(sample.data_set)}" if sample.data_set else ""
        lines += [f"### Row {sample.row}{of_set}", ""]
        if sample.shortened:
            lines += ["The models were asked with a shortened text.", ""]
        texts = [(code(name), text) for name, text in sample.fields.items()] or [("prompt", sample.prompt)]
        texts += [("reference", sample.reference)] if sample.reference else []
        texts += [("base model", sample.base), (trained, sample.adapter)]
        for name, text in texts:
            lines += [f"{name}:", "", *code_block(_short(text)), ""]
    return lines


ACCURACY = {
    "pairs": "whose chosen answer has the higher reward",
    "labelled answers": "whose reward is on the right side of the reference point",
}
"""What reward accuracy counts, by the units of the data."""
PERPLEXITY = {"perplexity": "perplexity"}
LABEL_SCORES = {"accuracy": "accuracy", "macro_f1": "macro F1"}
REWARDS = {
    "reward_accuracy": "reward accuracy",
    "reward_margin": "margin",
    "reward_chosen": "reward of chosen",
    "reward_rejected": "reward of rejected",
    "reward_desirable": "reward of desirable",
    "reward_undesirable": "reward of undesirable",
}
"""Metrics of an evaluation -> their names on the card."""


def _validation(before: Mapping[str, Any], after: Mapping[str, Any], units: str, noun: str) -> list[str]:
    """A table of the validation metrics before training and of the adapter or model in the folder."""
    about = f"Both are per trained token; `after` is the {noun} in this folder."
    names = {**PERPLEXITY, **LABEL_SCORES} if "accuracy" in before and "accuracy" in after else PERPLEXITY
    if names is not PERPLEXITY:
        about = (
            f"Loss and perplexity are per trained token; `after` is the {noun} in this folder. Accuracy and macro F1 "
            "are by likelihood of the labels: the prediction for a row is the label that the model finds most likely "
            f"as its answer. Scored validation rows: {_scored_rows(after):,} of {after['examples']:,}."
        )
    if "reward_accuracy" in before:
        names = {key: name for key, name in REWARDS.items() if key in before}
        about = (
            f"Means over {before['examples']:,} held-out {units}; `after` is the {noun} in this folder. Reward "
            f"accuracy is the fraction of {units} {ACCURACY[units]}.{_remark(before, names)}"
        )
    columns = {"loss": "loss", **names}
    return [
        f"| validation | {' | '.join(columns.values())} | step |",
        "| --- |" + " --- |" * (len(columns) + 1),
        *(
            f"| {name} | {' | '.join(_number(record.get(key)) for key in columns)} | {record['step']} |"
            for name, record in (("before", before), ("after", after))
        ),
        "",
        about,
        "",
    ]


def _scored_rows(record: Mapping[str, Any]) -> int:
    return sum(sum(row.values()) for confusion in record["confusion"].values() for row in confusion.values())


def _confusions(confusions: Mapping[str, Confusion]) -> list[str]:
    """A table of each data set whose answers are labels: the rows' own labels against the predicted ones."""
    lines = []
    for name, confusion in confusions.items():
        labels = labels_of(confusion)
        columns, rows = confusion_table(confusion, labels)
        of_set = f" of {code(_last_part(name))}" if len(confusions) > 1 else ""
        lines += [
            f"Predicted labels{of_set} after training. A row of the table has one label's validation rows:",
            "",
            f"| label | {' | '.join(code(column, in_table=True) for column in columns)} | F1 |",
            "| --- |" + " --- |" * (len(columns) + 1),
            *(
                f"| {code(own, in_table=True)} | {' | '.join(f'{count:,}' for count in counts)} | "
                f"{_f1(confusion, own)} |"
                for own, counts in rows
            ),
            "",
        ]
    return lines


def _f1(confusion: Confusion, label: str) -> str:
    score = f1_of(confusion, label)
    return "" if score is None else f"{score:.4f}"


def _published(adapter: AdapterFolder) -> list[str]:
    """What the base's own files hold, if they are quantised."""
    published = adapter.details.get(PUBLISHED)
    if not published:
        return []
    kind = f"{published['method']}, {published['kind']} in {published['bits']} bits"
    return [
        f"The base's weights are published as {markdown(kind)}, and the adapter was trained on these.",
        "",
    ]


def _lora(lora: Mapping[str, Any] | None) -> list[str]:
    """The adapter's shape, and what of the model has it."""
    if lora is None:
        return []
    kinds = [name for name, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if lora[key]]
    shape = ", ".join([f"Rank {lora['r']}", f"alpha {lora['alpha']:g}", *kinds])
    return [f"{shape}, dropout {lora['dropout']:g}. The adapter is on {markdown(lora['on'])}.", ""]


def _data_sets(sets: Sequence[Mapping[str, Any]], units: str) -> list[str]:
    """A table of a mixture's data sets."""
    if not sets:
        return []
    total = sum(one.get("weight", 0) for one in sets)
    lines = [
        f"| data set | {units} | trained tokens | part of the mixture |",
        "| --- | --- | --- | --- |",
    ]
    for one in sets:
        times = one.get("repeats", 1)
        part = f"{one['weight'] / total:.1%} of each step" if total else f"{counted(times, 'time')} an epoch"
        lines.append(
            f"| {code(one['name'], in_table=True)} | {one['examples']:,} | {one['trained_tokens']:,} | {part} |"
        )
    return [*lines, ""]


def _losses(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> list[str]:
    """A table of the validation losses of a mixture's data sets."""
    if not after:
        return []
    return [
        "| validation loss of | before | after |",
        "| --- | --- | --- |",
        *(
            f"| {code(name, in_table=True)} | {_number(before.get(name))} | {_number(after[name])} |"
            for name in after
        ),
        "",
    ]


def _remark(before: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A remark on an evaluation before training in which the model is its own reference."""
    if any(before[key] for key in names):
        return ""
    return (
        " A reward measures how much more likely an answer has become compared with the reference, the model before "
        "training. So before training every reward is 0, every comparison a tie and the accuracy 0; by chance it "
        "would be 0.5."
    )


def _short(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} [...] {text[-half:]}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
