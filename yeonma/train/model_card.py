"""The model card, OUT/README.md: what was trained on what, what it gained, and how to ask it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yeonma.adapter.adapter_folder import read_adapter_folder
from yeonma.adapter.samples import prompts_of
from yeonma.data.template import Rendered, answer_text
from yeonma.generation.sampling import SamplingParams
from yeonma.policy import Policy
from yeonma.run_folder.checkpoint import write_text_atomically
from yeonma.run_folder.run_log import read_metrics
from yeonma.tokenization.dataset import Dataset, Part
from yeonma.tokenization.example import stop_ids

MOST_NEW_TOKENS = 128
SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class Sample:
    """One row asked before and after."""

    row: int
    prompt: str
    wanted: str
    base: str
    tuned: str


def write_card(
    output: Path,
    policy: Policy,
    tokenizer: Any,
    dataset: Dataset,
    part: Part,
    command: str,
    kept: int,
    rows: int,
) -> None:
    """Ask base and tuned model `rows` rows of `part`, greedily, and write the card. `kept`: the adapter's step."""
    samples = ask_rows(policy, tokenizer, dataset, part, rows) if rows else []
    metrics = read_metrics(output / "metrics.jsonl")
    text = card_text(output, samples, metrics, command, kept, dataset.task.units)
    write_text_atomically(output / "README.md", text)


def ask_rows(policy: Policy, tokenizer: Any, dataset: Dataset, part: Part, count: int) -> list[Sample]:
    """The first `count` rows of `part`, answered by base and tuned model. Leaves the model ready to train on.

    They are asked with the very token ids that come before the answer in training.
    """
    rows = part.first_rows(count)
    task = dataset.task
    rendered = [task.preferred(task.render(dataset.template, row, dataset.columns)) for row in rows]
    prompts = prompts_of(part.store, [row.number for row in rows])
    limit = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    sampling = SamplingParams(
        stop_ids=tuple(stop_ids(tokenizer, chat=rendered[0].answer_role is not None)),
        max_new_tokens=int(max(1, min(MOST_NEW_TOKENS, limit - max(map(len, prompts))))),
    )

    tuned, base = (
        one.generate_from_ids(prompts, tokenizer, sampling, batch_size=len(prompts))
        for one in (policy, replace(policy, adapter_weights=False))
    )
    return [
        Sample(
            row.number,
            tokenizer.decode(prompt, skip_special_tokens=False),
            _wanted(text),
            before.text,
            after.text,
        )
        for row, prompt, text, before, after in zip(rows, prompts, rendered, base, tuned, strict=True)
    ]


def _wanted(rendered: Rendered) -> str:
    if rendered.answer:
        return answer_text(rendered)
    last = rendered.turns[-1]
    return "".join(piece.text for piece in last.pieces) if last.role == "assistant" else ""


def card_text(
    output: Path,
    samples: Sequence[Sample],
    metrics: Sequence[Mapping[str, Any]],
    command: str,
    kept: int,
    units: str,
) -> str:
    adapter = read_adapter_folder(output)
    trained_on = adapter.details["trained_on"]
    looks = [each for each in metrics if each.get("evaluation")]
    lines = [
        "---",
        f"base_model: {adapter.base.name}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora, yeonma]",
        "---",
        "",
        f"# {output.resolve().name}",
        "",
        f"A LoRA adapter for `{adapter.base.name}`, trained with Yeonma on {trained_on['examples']:,} {units} "
        f"({trained_on['trained_tokens']:,} trained tokens an epoch) of `{trained_on['data']}` in {kept:,} steps. "
        f"{trained_on['shortened']:,} examples were shortened and {trained_on['left_out']:,} left out.",
        "",
    ]
    if looks:
        lines += _validation(looks[0], next(each for each in looks if each["step"] == kept), units)
    lines += ["![loss](loss.svg)", "", "## Template", "", *_fenced(adapter.template.text), ""]
    if samples:
        lines += ["## Before and after", ""]
    for sample in samples:
        lines += [f"### Row {sample.row}", "", *_fenced(_short(sample.prompt)), ""]
        if sample.wanted:
            lines += ["wanted:", "", *_fenced(_short(sample.wanted)), ""]
        for name, text in (("base", sample.base), ("tuned", sample.tuned)):
            lines += [f"{name}:", "", *_fenced(_short(text)), ""]
    lines += [
        "## Use",
        "",
        *_fenced(f"yeonma generate {output.name} --data_path rows.jsonl\nyeonma chat {output.name}"),
        "",
        "The folder is also a plain PEFT adapter: `peft.AutoPeftModelForCausalLM.from_pretrained(folder)`.",
        "",
        "## Command",
        "",
        *_fenced(command),
        "",
    ]
    return "\n".join(lines)


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


TIED = 0.02
"""Rewards nearer to 0 than this are rounding: both models are the same."""


def _validation(before: Mapping[str, Any], after: Mapping[str, Any], units: str) -> list[str]:
    """The table of the held-out rows."""
    about = "Both are per trained token; `after` is the adapter in this folder."
    shown = PERPLEXITY
    if "reward_accuracy" in before:
        shown = {key: name for key, name in REWARDS.items() if key in before}
        before, told = _untied(before, shown)
        about = (
            f"Means over {before['examples']:,} held-out {units}; `after` is the adapter in this folder. The accuracy "
            f"is the share that has its reward on the right side.{told}"
        )
    columns = {"loss": "loss", **shown}
    return [
        f"| validation | {' | '.join(columns.values())} | step |",
        "| --- |" + " --- |" * (len(columns) + 1),
        *(
            f"| {name} | {' | '.join(_number(look[key]) for key in columns)} | {look['step']} |"
            for name, look in (("before", before), ("after", after))
        ),
        "",
        about,
        "",
    ]


def _untied(before: Mapping[str, Any], shown: Mapping[str, str]) -> tuple[Mapping[str, Any], str]:
    """The look before training, and what to say of it. The reference is then the model itself: all rewards are 0, and
    which of two is higher is rounding."""
    rewards = [key for key in shown if key != "reward_accuracy"]
    if any(abs(before[key] or 0.0) > TIED for key in rewards):
        return before, ""
    told = (
        " A reward is how much likelier an answer has become than it was to the reference, the model before training: "
        "there all are 0, and the accuracy is that of a coin."
    )
    return {**before, **dict.fromkeys(rewards, 0.0), "reward_accuracy": 0.5}, told


def _fenced(text: str) -> list[str]:
    """A fence longer than any run of backticks in the text, so that the text cannot end it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence + "text", text.rstrip("\n"), fence]


def _short(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [...] {text[-half:]}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
