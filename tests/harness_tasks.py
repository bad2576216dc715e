"""Tasks of lm-evaluation-harness in local files: options, whole texts, generated answers, a group; and what the
harness's own class for transformers and PEFT measures on them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.models import VOCABULARY
from tests.runs import WORDS, characters, write_jsonl

ITEMS = 10
OPTIONS = ("own_options", "own_bare", "own_long")
"""Multiple choice: with examples, without any context, and with contexts that are longer than the model's positions."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TASKS = (*OPTIONS, "own_texts", "own_answers", "own_long_answers")

_MEANS = """\
metric_list:
  - {{metric: {}, aggregation: mean, higher_is_better: true}}
  - {{metric: {}, aggregation: mean, higher_is_better: true}}
"""
_OPTIONS = "output_type: multiple_choice\ndoc_to_target: gold\ndoc_to_choice: choices\n" + _MEANS.format(
    "acc", "acc_norm"
)
_ANSWERS = """\
output_type: generate_until
doc_to_target: " {{first}}"
generation_kwargs: {until: ["\\n", ". ", "</s>"], do_sample: false, max_gen_toks: 24}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""
_SHOTS = "fewshot_split: train\n"
_BODIES = {
    "own_options": _OPTIONS
    + _SHOTS
    + "fewshot_config: {sampler: first_n}\nnum_fewshot: 3\n"
    + 'doc_to_text: "question: {{question}}\\nanswer: "\n',
    "own_bare": _OPTIONS + 'doc_to_text: ""\n',
    "own_long": _OPTIONS + _SHOTS + 'num_fewshot: 1\ndoc_to_text: "{{text}} {{text}}\\nanswer:"\n',
    "own_texts": (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\nmetric_list:\n"
        "  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}\n"
        "  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}\n"
    ),
    "own_answers": _ANSWERS + _SHOTS + 'num_fewshot: 2\ndoc_to_text: "question: {{question}}\\nanswer:"\n',
    "own_long_answers": _ANSWERS + 'doc_to_text: "{{text}} {{text}}\\nanswer:"\n',
}


def task_folder(place: Path) -> Path:
    """The files of TASKS, and of the group `own_group` of own_options and own_bare."""
    place.mkdir()
    draw = random.Random(1)
    rows = []
    for _ in range(ITEMS):
        words = [draw.choice(WORDS) for _ in range(5)]
        choices = [words[0], " ".join(words[1:3]), "boats, wind", "x"]
        question = " ".join(words[: draw.randint(2, 5)]) + "?"
        text = f"the {words[0]} of {words[1]}. " * draw.randint(2, 20)
        rows.append(
            {
                "question": question,
                "first": words[0],
                "choices": choices,
                "gold": draw.randint(0, 3),
                "text": text,
            }
        )
    write_jsonl(place / "test.jsonl", rows)
    write_jsonl(place / "train.jsonl", rows[:4][::-1])
    data = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {place}/test.jsonl\n    train: {place}/train.jsonl\ntest_split: test\nmetadata: {{version: 1.0}}\n"
    )
    for name, body in _BODIES.items():
        write_task(place, name, data + body)
    group = "task: [own_options, own_bare]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (place / "own_group.yaml").write_text(f"group: own_group\n{group}", encoding="utf-8")
    return place


def full_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """That of tests/runs.py with as many tokens as the tiny models have rows."""
    tokenizer = characters()
    tokenizer.add_tokens([f"<extra {number}>" for number in range(VOCABULARY - len(tokenizer))])
    tokenizer.chat_template = chat_template
    return tokenizer


def write_task(place: Path, name: str, body: str) -> None:
    (place / f"{name}.yaml").write_text(f"task: {name}\n{body}", encoding="utf-8")


def by_transformers(
    base: Path, adapter: Path | None, tasks: Sequence[str], folder: Path, **settings: Any
) -> Mapping[str, Any]:
    """What the harness measures with its own class for transformers, and PEFT for the adapter, one request at a time.

    With an adapter that class cuts the embedding to the tokens of the tokenizer: they should be as many as its rows.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(
        str(base),
        peft=None if adapter is None else str(adapter),
        dtype="float32",
        device="cpu",
        batch_size=1,
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **settings)
    assert results is not None
    return results
