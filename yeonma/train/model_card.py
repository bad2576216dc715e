"""The model card, OUT/README.md: base and data, losses before and after, sample answers, and how to use the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.adapter.adapter_folder import CHAT_TEMPLATE, PUBLISHED, AdapterFolder, read_adapter_folder
from yeonma.adapter.base_licence import licence_note
from yeonma.adapter.lora_ranks import VLLM_LACKS, highest_rank, lora_config, vllm_rank
from yeonma.adapter.prompt_builder import NO_LIMIT
from yeonma.adapter.samples import prompts_of
from yeonma.config.yaml_text import front_matter
from yeonma.data.rows import Row
from yeonma.data.template import Rendered, answer_text
from yeonma.errors import UserError
from yeonma.generation.sampling import SamplingParams
from yeonma.model.language_part import left_out
from yeonma.model.load import eos_tokens
from yeonma.model.position_limits import model_positions
from yeonma.policy import Policy
from yeonma.run_folder.checkpoint import write_text_atomically
from yeonma.run_folder.run_log import read_metrics
from yeonma.shown import code, code_block, markdown, shell_word
from yeonma.tokenization.chat_template_export import MARK
from yeonma.tokenization.dataset import Dataset, PreparedSet, used_rows
from yeonma.tokenization.example import AnswerTokens, TokenRules, answer_tokens, end_of_prompt
from yeonma.tokenization.example_encoder import encode_prompt

OnAnswer = Callable[[int, int], None]
"""Takes the number of answers so far, and of all."""
MAX_NEW_TOKENS = 128
MAX_CHARACTERS = 600
"""Of a prompt or an answer on the card."""
PLAIN_PEFT = "peft.AutoPeftModelForCausalLM.from_pretrained(folder)"
"""How PEFT alone loads an adapter with its base."""


@dataclass(frozen=True)
class Sample:
    """A row's prompt and reference answer, and the answers of the base model and of the trained one."""

    row: int
    data_set: str
    """Its data set, if there are several; else empty."""
    prompt: str
    reference: str
    base: str
    adapter: str


def write_card(
    output: Path,
    policy: Policy,
    tokenizer: Any,
    dataset: Dataset,
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
    metrics = read_metrics(output / "metrics.jsonl")
    text = card_text(
        output,
        samples,
        metrics,
        command,
        adapter_step,
        dataset.task.units,
        remarks,
        plain_peft=_plain_peft(policy.transformers_model),
    )
    write_text_atomically(output / "README.md", text)


def _plain_peft(base: Any) -> str:
    """How PEFT alone loads an adapter of this base: a checkpoint that also reads images by its own class."""
    if not left_out(base):
        return PLAIN_PEFT
    return f"peft.PeftModel.from_pretrained(transformers.{type(base).__name__}.from_pretrained(base), folder)"


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
                one.name if len(dataset.sets) > 1 else "",
                tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False),
                tokens.shape.parts(_reference(text)).content,
                *texts,
            )
            for row, prompt, text, *texts in zip(rows, prompts, rendered, base, answers[0], strict=True)
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


def card_text(
    output: Path,
    samples: Sequence[Sample],
    metrics: Sequence[Mapping[str, Any]],
    command: str,
    adapter_step: int,
    units: str,
    remarks: Sequence[str] = (),
    plain_peft: str = PLAIN_PEFT,
) -> str:
    adapter = read_adapter_folder(output)
    trained_on = adapter.details["trained_on"]
    evaluations = [record for record in metrics if record.get("evaluation")]
    sets = trained_on.get("data_sets", ())
    names = ", ".join(code(one["name"]) for one in sets) or code(trained_on["data"])
    folder = shell_word(output.name)
    about = {
        "base_model": adapter.base.name,
        "library_name": "transformers" if adapter.is_full else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["yeonma"] if adapter.is_full else ["lora", "yeonma"],
    }
    what = f"A LoRA adapter for {code(adapter.base.name)}"
    if adapter.is_full:
        what = f"{code(adapter.base.name)} with all of its weights fine-tuned"
    lines = [
        *front_matter(about),
        f"# {markdown(output.resolve().name)}",
        "",
        f"{what}, trained with Yeonma on {trained_on['examples']:,} {units} "
        f"({trained_on['trained_tokens']:,} trained tokens{'' if sets else ' an epoch'}) of {names} in "
        f"{adapter_step:,} steps. {trained_on['shortened']:,} examples were shortened and "
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
        else:  # the log was deleted while the run was stopped, and begins later
            lines += ["metrics.jsonl does not have the validation losses of before and after.", ""]
    lines += ["![loss](loss.svg)", "", "## Template", "", *code_block(adapter.template.text), ""]
    for one in sets:
        if one["template"]["text"] != adapter.template.text:
            lines += [f"Template of {code(one['name'])}:", "", *code_block(one["template"]["text"]), ""]
    if samples:
        lines += ["## Before and after", ""]
    for sample in samples:
        of_set = f" of {markdown(sample.data_set)}" if sample.data_set else ""
        lines += [f"### Row {sample.row}{of_set}", "", *code_block(_short(sample.prompt)), ""]
        if sample.reference:
            lines += ["reference:", "", *code_block(_short(sample.reference)), ""]
        trained = "fine-tuned" if adapter.is_full else "with the adapter"
        for name, text in (("base model", sample.base), (trained, sample.adapter)):
            lines += [f"{name}:", "", *code_block(_short(text)), ""]
    lines += [
        "## Use",
        "",
        *code_block(f"yeonma generate {folder} --data_path rows.jsonl\nyeonma chat {folder}"),
        "",
        *_with_other_tools(output, adapter, plain_peft),
        "## Command",
        "",
        *code_block(command),
        "",
    ]
    return "\n".join(lines)


def _with_other_tools(output: Path, adapter: AdapterFolder, plain_peft: str) -> list[str]:
    if adapter.is_full:
        call = "transformers.AutoModelForCausalLM.from_pretrained(folder)"
        return [f"The folder is a complete model of its own: `{call}`.", ""]
    plain = f"The folder is also a plain PEFT adapter: {code(plain_peft)}."
    return [plain, "", *vllm_lines(output, adapter.base.name)]


def vllm_lines(output: Path, base: str) -> list[str]:
    """The command that serves the adapter by vLLM with the prompts of training; nothing if vLLM cannot."""
    rank = vllm_rank(highest_rank(output))
    template = output / CHAT_TEMPLATE
    config = lora_config(output)
    if rank is None or any(config.get(key) for key in VLLM_LACKS) or not template.is_file():
        return []
    name = output.resolve().name
    command = f"vllm serve {shell_word(base)} --enable-lora --max-lora-rank {rank}"
    command += f" \\\n  --lora-modules {shell_word(f'{name}={name}')} --tokenizer {shell_word(name)}"
    lines = ["With vLLM:", ""]
    if not template.read_text("utf-8").startswith(MARK):  # the base's own chat template
        return [*lines, *code_block(command), ""]
    command += f" \\\n  --chat-template {shell_word(f'{name}/{CHAT_TEMPLATE}')}"
    remark = (
        "The template of training is in that file. One vLLM server has one chat template, for the base and for all its "
        "adapters: an adapter with another template needs a server of its own."
    )
    return [*lines, *code_block(command), "", remark, ""]


ACCURACY = {
    "pairs": "whose chosen answer has the higher reward",
    "labelled answers": "whose reward is on the right side of the reference point",
}
"""What reward accuracy counts, by the units of the data."""
PERPLEXITY = {"perplexity": "perplexity"}
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
    names = PERPLEXITY
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
        part = (
            f"{one['weight'] / total:.1%} of each step"
            if total
            else f"{times} time{'s' * (times > 1)} an epoch"
        )
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
