"""`yeonma demo` and `yeonma demo-dpo`: fine-tune a small model on bundled titles or pairs of titles.

A demo does what a user would do by hand. It prints a `yeonma sft` or `yeonma dpo` command, runs it, generates with the
adapter and compares it with the base model.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from yeonma.config.parse import config_from_keywords
from yeonma.config.settings import (
    PREFERENCE_DEFAULTS,
    TRAINING,
    CompareConfig,
    DemoSettings,
    RunConfig,
)
from yeonma.data.rows import Row, open_rows
from yeonma.durations import in_two_units
from yeonma.errors import UserError
from yeonma.evaluate.verdict import reference_heading
from yeonma.files import user_path
from yeonma.messages import tr
from yeonma.shown import shell_word
from yeonma.streams import say, say_lines

MAX_ROWS = 3
MAX_CHARACTERS = 96
LINE_LENGTH = 100
"""Of a printed command."""
MAX_NEW_TOKENS = 32
"""More than any title has."""
QUICK_STEPS = 4


@dataclass(frozen=True)
class Demo:
    """One demo: its command, its data among the bundled samples, and its settings."""

    verb: str
    groups: tuple[type, ...] | None
    defaults: Mapping[str, object]
    rows: str
    validation_rows: str
    template: str
    reference_column: str
    """The column with the reference answer."""
    article: str
    """For the command that asks, at the end."""
    settings: Mapping[str, object]
    next_settings: Mapping[str, object]
    """Of a run on the user's own data, printed as a suggestion at the end."""


# Chosen by experiment: a learning rate of 2e-3 gave a slightly lower validation loss but worse titles; an adapter on
# the MLP layers alone gave the same loss but worse section labels.
SETTINGS: Mapping[str, object] = {
    "batch_size": 8,
    "micro_batch_size": 8,
    "num_epochs": 3,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.1,
    "logging_steps": 5,
    "save_total_limit": 1,
}
PAIR_SETTINGS: Mapping[str, object] = {
    **SETTINGS,
    "num_epochs": 2,
    "learning_rate": 5e-4,
    "sft_weight": 1.0,
}
QUICK_SETTINGS: Mapping[str, object] = {"logging_steps": 1, "card_rows": 1}

KOREAN_MODEL = "Qwen/Qwen3-0.6B"
"""A small model under Apache 2.0 that knows Korean (Yang et al. 2025, arXiv:2505.09388)."""
ENGLISH_ARTICLE = "The old lighthouse on Gull Rock will open as a library in May."
TITLES = Demo(
    verb="sft",
    groups=TRAINING,
    defaults={},
    rows="sample:news_en",
    validation_rows="sample:news_en_validation",
    template="sample:title_en",
    reference_column="title",
    article=ENGLISH_ARTICLE,
    settings=SETTINGS,
    next_settings={"data_path": "your-rows.csv", "template": "your-template.txt", "output_dir": "my-titles"},
)
KOREAN_TITLES = replace(
    TITLES,
    rows="sample:news_ko",
    validation_rows="sample:news_ko_validation",
    template="title",
    article="갈매기섬의 오래된 등대가 5월에 도서관으로 문을 연다.",
)
PAIRS = Demo(
    verb="dpo",
    groups=None,
    defaults=PREFERENCE_DEFAULTS,
    rows="sample:pairs_en",
    validation_rows="sample:pairs_en_validation",
    template="sample:title_en",
    reference_column="chosen",
    article=ENGLISH_ARTICLE,
    settings=PAIR_SETTINGS,
    next_settings={"data_path": "your-pairs.jsonl", "output_dir": "my-preferences"},
)


def run(settings: DemoSettings) -> int:
    """`yeonma demo`: supervised fine-tuning on articles and their titles."""
    return _run(KOREAN_TITLES if settings.sample == "ko" else TITLES, settings)


def run_dpo(settings: DemoSettings) -> int:
    """`yeonma demo-dpo`: preference training on pairs of a title in house style and a long-winded one.

    Raises UserError for another language than English.
    """
    if settings.sample != "en":
        cure = tr("leave it out, or run yeonma demo")
        raise UserError(tr("the sample of preference pairs is English"), place="--sample", cure=cure)
    return _run(PAIRS, settings)


def _run(demo: Demo, settings: DemoSettings) -> int:
    """Download the model, train, and show the results. Resumes an interrupted demo, and shows a finished one again."""
    started = time.perf_counter()
    output = user_path(settings.output_dir)
    _heading(tr("1. The model"))
    base = settings.model_dir or (KOREAN_MODEL if settings.sample == "ko" else _fetch_model())
    say(base)

    _heading(tr("2. Training"))
    run_settings = _training_settings(demo, settings, base)
    say_lines(tr("Equivalent command:\n\n{command}\n", command=_command([demo.verb], run_settings)))
    from yeonma.commands.sft import train

    if status := train(demo.verb, _config_of(demo, run_settings)):
        return status

    _heading(tr("3. Titles for {max_rows} held-out articles", max_rows=MAX_ROWS))
    _show_answers(demo, output)
    _show_metrics(demo, output)
    _heading(tr("4. Comparison on all held-out rows"))
    report = _compare(demo, output, base)
    _heading(tr("5. Files and next steps"))
    say_lines(_next_steps(demo, output, base))
    say()
    say(
        tr("Open {report} in a browser to read all answers side by side; it needs no network.", report=report)
    )
    say()
    say(tr("The demo took {time}.", time=in_two_units(time.perf_counter() - started)))
    return 0


def _fetch_model() -> str:
    from yeonma.model.smollm2 import fetch

    return fetch(say)


def _training_settings(demo: Demo, settings: DemoSettings, base: str) -> dict[str, object]:
    """The run's settings that differ from the command's defaults."""
    run_settings: dict[str, object] = {
        "base_model": base,
        "data_path": demo.rows,
        "val_data_path": demo.validation_rows,
        "template": demo.template,
        "output_dir": settings.output_dir,
        **demo.settings,
    }
    steps = settings.max_steps or (QUICK_STEPS if settings.quick else None)
    if steps is not None:
        del run_settings["num_epochs"]
        run_settings["max_steps"] = steps
    return {
        **run_settings,
        **(QUICK_SETTINGS if settings.quick else {}),
        **({"overwrite": True} if settings.overwrite else {}),
    }


def _show_answers(demo: Demo, output: Path) -> None:
    """Print the first held-out rows with the reference, the base model's answer and the adapter's answer."""
    from yeonma.policy import load_policy

    rows = list(islice(open_rows(demo.validation_rows), MAX_ROWS))
    policy = load_policy(output)
    prompts = [{"document": row.values["document"]} for row in rows]
    after = policy.generate(prompts, max_new_tokens=MAX_NEW_TOKENS)
    before = replace(policy, adapter_weights=False).generate(prompts, max_new_tokens=MAX_NEW_TOKENS)
    for row, *answers in zip(rows, before, after, strict=True):
        say_lines(_sample(row, str(row.values[demo.reference_column]), answers))


def _sample(row: Row, reference: str, answers: Sequence[str]) -> str:
    texts = (reference, *answers)
    names = (reference_heading(), tr("before"), tr("after"))
    width = max(map(cell_len, names))
    lines = [
        f"  {set_cell_size(name, width)}  {_short(text)}" for name, text in zip(names, texts, strict=True)
    ]
    return "\n".join([_short(str(row.values["document"])), *lines, ""])


def _show_metrics(demo: Demo, output: Path) -> None:
    """Print the validation metrics before training and of the saved adapter."""
    from yeonma.run_folder.run_log import read_metrics

    evaluations = [line for line in read_metrics(output / "metrics.jsonl") if line.get("evaluation")]
    before, after = (
        evaluations[0],
        min(evaluations, key=_loss),
    )  # the run saves the adapter with the lowest loss
    rows = before["examples"]
    losses = tr("{before:.3f} before, {after:.3f} after", before=_loss(before), after=_loss(after))
    if demo.verb == "sft":
        say(tr("Validation loss on the {rows} held-out rows: {losses}.", rows=rows, losses=losses))
        return
    correct = round(rows * after["reward_accuracy"])
    say_lines(
        tr(
            "Reward accuracy: in {correct} of the {rows} held-out pairs the title in house style has "
            "the higher reward,\nby {reward_margin:.2f} on average. Before training every reward is "
            "0.\nValidation loss: {losses}.",
            correct=correct,
            rows=rows,
            reward_margin=after["reward_margin"],
            losses=losses,
        )
    )


def _config_of(demo: Demo, settings: Mapping[str, object]) -> RunConfig:
    return config_from_keywords(RunConfig, settings, groups=demo.groups, defaults=demo.defaults).config


def _compare(demo: Demo, output: Path, base: str) -> Path:
    """Compare base and adapter on all held-out rows. Returns the path of the report page."""
    from yeonma.commands.compare import compare

    settings: dict[str, object] = {
        "models": [base, str(output)],
        "data_path": demo.validation_rows,
        "max_new_tokens": MAX_NEW_TOKENS,
        "output_dir": str(output / "report"),
    }
    say_lines(tr("Equivalent command:\n\n{command}\n", command=_command(["compare"], settings)))
    config = config_from_keywords(CompareConfig, settings).config
    return compare(config, say) / "report.html"


def _loss(evaluation: Mapping[str, Any]) -> float:
    return float("inf") if evaluation["loss"] is None else float(evaluation["loss"])


def _next_steps(demo: Demo, output: Path, base: str) -> str:
    folder = shell_word(str(output))
    row = json.dumps({"document": demo.article}, ensure_ascii=False)
    return tr(
        "{folder}/README.md                  model card: settings, losses, answers before and "
        "after training\n{folder}/loss.svg, metrics.jsonl    loss curve, and the numbers of every "
        "step\n{folder}/adapter_model.safetensors  adapter weights; PEFT loads the folder as well\n"
        "{folder}/settings.yaml              settings of the run; repeat it with `yeonma {verb} "
        "--config`\n\n{ask}\n{chat}\n{train}",
        folder=folder,
        verb=demo.verb,
        ask=_command(["generate", str(output), "--row", row]),
        chat=_command(["chat", str(output)]),
        train=_command([demo.verb], {"base_model": base, **demo.next_settings}),
    )


def _command(words: Sequence[str], settings: Mapping[str, object] | None = None) -> str:
    """A command line for the current working folder, on several lines if it has settings."""
    lines = [" ".join([_yeonma(), *map(shell_word, words)])]
    for name, value in (settings or {}).items():
        words = value if isinstance(value, list) else [_value_text(value)]
        pair = f"--{name} {' '.join(map(shell_word, words))}"
        if len(lines) > 1 and len(lines[-1]) + len(pair) < LINE_LENGTH:
            lines[-1] += f" {pair}"
        else:
            lines.append(f"    {pair}")
    return " \\\n".join(lines)


def _value_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _yeonma() -> str:
    """How to call `yeonma` from the working folder: by its name if it is on the PATH."""
    script = Path(sys.executable).parent / "yeonma"
    on_path = shutil.which("yeonma")
    if on_path and os.path.samefile(on_path, script):
        return "yeonma"
    return shell_word(_relative(script)) if script.is_file() else "python -m yeonma"


def _relative(path: Path) -> str:
    """The path relative to the working folder if it is inside, else the absolute path."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS].rstrip()}..."


def _heading(text: str) -> None:
    say_lines(f"\n{text}\n{'-' * cell_len(text)}")
