"""Models and rows -> what each model writes for each row, and what the wanted answers cost it.

Everything that may be wrong with models, rows and template is found before any weights are loaded. Models that share a
base share it in memory; else one model at a time is loaded, and none that has answered everything before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import torch

from yeonma.adapter.prompt_builder import Prompt
from yeonma.config.settings import AnswerSettings, CompareSettings
from yeonma.data.columns import column_of, field_text
from yeonma.data.rows import Row, Rows
from yeonma.errors import Log, Problem, UserError
from yeonma.evaluate.answer_cache import AnswerCache
from yeonma.evaluate.candidates import Candidate, columns_for, identity_of
from yeonma.evaluate.metrics import Wrote
from yeonma.generation.completion import Answer
from yeonma.generation.sampling import SamplingParams
from yeonma.model.load import check_vocabulary, pick_device, pick_dtype
from yeonma.model.quantization import check_installed
from yeonma.policy import Policy, build_policy
from yeonma.tokenization.example import Example
from yeonma.tokenization.example_encoder import encode

MOST_PROBLEMS = 20
LOSS_TOKENS = 4096  # of examples that go through the model at once
LOSS_EXAMPLES = 32
ROWS_A_CHUNK = 1000


@dataclass(frozen=True, eq=False)
class ComparisonRow:
    """What one model is asked, row by row, and the examples that its loss is of."""

    candidate: Candidate
    questions: list[Prompt]
    examples: list[list[Example]]
    """A row's; none where it has no wanted answer or is left out."""
    left_out: int
    """Rows whose wanted answer does not fit with the prompt cut to one character."""
    identity: str = ""

    def answer_key(self, row: int, how: AnswerSettings) -> str:
        drawn = [how.temperature, how.top_p, how.top_k, how.seed] if how.temperature > 0 else []
        ids = self.questions[row].token_ids.tolist()
        stops = self.candidate.prompt_builder.stop_ids
        return _key("answer", self.identity, ids, stops, how.max_new_tokens, how.repetition_penalty, drawn)

    def loss_key(self, row: int) -> str:
        of = [[each.token_ids.tolist(), np.flatnonzero(each.trained).tolist()] for each in self.examples[row]]
        return _key("loss", self.identity, of)


def _key(*parts: object) -> str:
    return sha256(json.dumps(parts).encode()).hexdigest()


def read_rows(rows: Rows, most: int | None) -> list[Row]:
    found = list(islice(rows, most))
    if not found:
        raise UserError("there are no rows", place=rows.name, cure="give rows to compare on")
    return found


def wanted_answers(
    candidates: Sequence[Candidate], rows: Sequence[Row], asked: CompareSettings
) -> list[str | None]:
    """The rows' own answers, by the first model whose template finds one; None where there is none."""
    return [
        next((text for each in candidates if (text := _wanted(each, row, asked)) is not None), None)
        for row in rows
    ]


def _wanted(candidate: Candidate, row: Row, asked: CompareSettings) -> str | None:
    template, columns = candidate.prompt_builder.adapter.template, columns_for(candidate, asked.columns)
    if template.is_chat:
        return candidate.prompt_builder.reference(row, columns)
    field = template.answer_field
    try:
        return field_text(row, column_of(field, candidate.columns(row, columns), field))
    except UserError:  # a row is asked whatever its answer is
        return None


def comparison_rows(
    candidates: Sequence[Candidate], rows: Sequence[Row], asked: CompareSettings, how: AnswerSettings
) -> list[ComparisonRow]:
    """Raises UserError with the first problems of all rows and models: what does not fit a template or leaves no room
    for an answer."""
    problems: dict[str, Problem] = {}
    tasks = []
    for candidate in candidates:
        try:
            tasks.append(_comparison_row(candidate, rows, asked, how))
        except UserError as error:
            problems.update({str(problem): problem for problem in error.problems})
    if problems:
        more = (
            [Problem("there are more such problems", asked.data_path)]
            if len(problems) > MOST_PROBLEMS
            else []
        )
        raise UserError([*list(problems.values())[:MOST_PROBLEMS], *more])
    return tasks


def _comparison_row(
    candidate: Candidate, rows: Sequence[Row], asked: CompareSettings, how: AnswerSettings
) -> ComparisonRow:
    prompt_builder, columns = candidate.prompt_builder, columns_for(candidate, asked.columns)
    questions: list[Prompt] = []
    examples: list[list[Example]] = []
    left_out = 0
    for start in range(0, len(rows), ROWS_A_CHUNK):
        chunk = rows[start : start + ROWS_A_CHUNK]
        questions += prompt_builder.prompts(chunk, columns, max_new_tokens=how.max_new_tokens)
        made, over = _examples(candidate, chunk, asked)
        examples += made
        left_out += over
    return ComparisonRow(candidate, questions, examples, left_out)


def _examples(
    candidate: Candidate, rows: Sequence[Row], asked: CompareSettings
) -> tuple[list[list[Example]], int]:
    """Each row's examples as training would make them, but that only answers are trained; and the rows left out."""
    prompt_builder, columns = candidate.prompt_builder, columns_for(candidate, asked.columns)
    template, rules = (
        prompt_builder.adapter.template,
        replace(prompt_builder.adapter.rules, train_on_inputs=False, over_limit="drop"),
    )
    wanted = [row for row in rows if _wanted(candidate, row, asked) is not None]
    rendered = [template.render(row, candidate.columns(row, columns)) for row in wanted]
    found: dict[int, list[Example]] = {row.number: [] for row in rows}
    over = set()
    for outcome in encode(rendered, wanted, prompt_builder.tokenizer, rules):
        if isinstance(outcome, Example):
            found[outcome.row].append(outcome)
        else:
            over.add(outcome.row)
    return [[] if row.number in over else found[row.number] for row in rows], len(over)


def answer_all(
    tasks: Sequence[ComparisonRow], asked: CompareSettings, how: AnswerSettings, kept: AnswerCache, say: Log
) -> tuple[list[list[Wrote]], list[ComparisonRow]]:
    """What every model wrote for every row; what `kept` does not hold yet is computed and added to it. The tasks come
    back with the identities of their models."""
    device = pick_device(asked.device)
    dtype = pick_dtype(asked.dtype, device)
    for task in tasks:
        check_installed(task.candidate.quantization)
    tasks = [replace(task, identity=identity_of(task.candidate, dtype, device)) for task in tasks]
    for weights in dict.fromkeys(task.candidate.weights for task in tasks):
        group = [task for task in tasks if task.candidate.weights == weights and _missing(task, how, kept)]
        policy: Policy | None = None
        for task in group:
            source, folder = task.candidate.prompt_builder.source, task.candidate.adapter
            adapters = [] if folder is None else [folder]
            if policy is None:
                say(f"loading {source.name}")
                quantization = task.candidate.quantization
                policy = build_policy(source, adapters, device=device, dtype=dtype, quantization=quantization)
            else:
                policy = policy.with_adapters(adapters)
            check_vocabulary(task.candidate.prompt_builder.tokenizer, policy.vocabulary_size, source.name)
            _answer(policy, task, asked, how, kept, say)
    return [[_wrote(task, row, how, kept) for row in range(len(task.questions))] for task in tasks], tasks


def _missing(task: ComparisonRow, how: AnswerSettings, kept: AnswerCache) -> bool:
    return bool(_unanswered(task, how, kept) or _unmeasured(task, kept))


def _unanswered(task: ComparisonRow, how: AnswerSettings, kept: AnswerCache) -> list[int]:
    return [row for row in range(len(task.questions)) if task.answer_key(row, how) not in kept.records]


def _unmeasured(task: ComparisonRow, kept: AnswerCache) -> list[int]:
    return [row for row, own in enumerate(task.examples) if own and task.loss_key(row) not in kept.records]


def _answer(
    policy: Policy,
    task: ComparisonRow,
    asked: CompareSettings,
    how: AnswerSettings,
    kept: AnswerCache,
    say: Log,
) -> None:
    """Ask what is missing, then measure what is missing."""
    name, prompt_builder = task.candidate.name, task.candidate.prompt_builder
    rows = _unanswered(task, how, kept)
    total, before = len(task.questions), len(task.questions) - len(rows)
    if before:
        say(f"{name}: {before} of {total} rows were answered before")
    done = 0

    def answered(index: int, answer: Answer) -> None:
        nonlocal done
        done += 1
        row = rows[index]
        record = {"model": name, "row": row + 1, "text": answer.text}
        kept.add(
            task.answer_key(row, how),
            {**record, "token_ids": list(answer.token_ids), "ended": answer.ended},
        )
        if done * 10 // len(rows) > (done - 1) * 10 // len(rows):
            say(f"{name}: answered {before + done} of {total} rows")

    policy.generate_from_ids(
        [task.questions[row].token_ids for row in rows],
        prompt_builder.tokenizer,
        SamplingParams.of(how, prompt_builder.stop_ids),
        batch_size=asked.batch_size,
        on_answer=answered,
    )
    unmeasured = _unmeasured(task, kept)
    for group in _chunks(unmeasured, task.examples):
        losses = _losses(policy, [task.examples[row] for row in group])
        for row, (nll, count) in zip(group, losses, strict=True):
            record = {"model": name, "row": row + 1, "nll": nll, "trained_tokens": count}
            kept.add(task.loss_key(row), record)
    if unmeasured:
        say(f"{name}: measured the loss of {len(unmeasured)} rows")


def _chunks(rows: Sequence[int], examples: Sequence[Sequence[Example]]) -> list[list[int]]:
    """Rows of similar length together, within LOSS_TOKENS and LOSS_EXAMPLES; a larger row goes alone."""
    lengths = {row: sum(len(each.token_ids) for each in examples[row]) for row in rows}
    chunks: list[list[int]] = []
    tokens = count = 0
    for row in sorted(rows, key=lambda row: -lengths[row]):
        tokens, count = tokens + lengths[row], count + len(examples[row])
        if not chunks or tokens > LOSS_TOKENS or count > LOSS_EXAMPLES:
            chunks.append([])
            tokens, count = lengths[row], len(examples[row])
        chunks[-1].append(row)
    return chunks


def _losses(policy: Policy, rows: Sequence[Sequence[Example]]) -> list[tuple[float, int]]:
    """Of each row the sum of minus the log-probabilities of its trained tokens, and how many they are; where memory is
    short of half the rows at a time."""
    flat = [example for own in rows for example in own]
    try:
        with torch.no_grad():
            logprob_N = policy.logprobs([each.token_ids for each in flat], [each.trained for each in flat])
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            what = f"a row of {sum(len(each.token_ids) for each in flat)} tokens does not fit into the device's memory"
            raise UserError(what, cure="use --dtype bfloat16 or --device cpu") from error
        half = (len(rows) + 1) // 2
        return [*_losses(policy, rows[:half]), *_losses(policy, rows[half:])]
    counts = [sum(int(each.trained.sum()) for each in own) for own in rows]
    sums = [float(part.double().sum()) for part in logprob_N.cpu().split(counts)]
    return [(-total, count) for total, count in zip(sums, counts, strict=True)]


def _wrote(task: ComparisonRow, row: int, how: AnswerSettings, kept: AnswerCache) -> Wrote:
    record = kept.records[task.answer_key(row, how)]
    loss: Mapping[str, Any] = kept.records[task.loss_key(row)] if task.examples[row] else {}
    return Wrote(
        task.questions[row].answer(record["text"]),
        tuple(record["token_ids"]),
        record["ended"],
        loss.get("nll"),
        loss.get("trained_tokens", 0),
    )
