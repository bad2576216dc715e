"""Models and rows -> the models' answers, and their losses on the reference answers.

All errors in models, rows and templates are found before any weights are loaded. Models with the same base share it in
memory; otherwise one model is loaded at a time. A model is not loaded if all of its answers are cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from yeonma.adapter.prompt_builder import Prompt
from yeonma.batch.batch import Batch
from yeonma.config.settings import AnswerSettings, CompareSettings
from yeonma.data.rows import Row, Rows
from yeonma.errors import Log, Problem, UserError
from yeonma.evaluate.answer_cache import AnswerCache
from yeonma.evaluate.candidates import Candidate, check_candidate_content, columns_for, identity_of
from yeonma.evaluate.general import GeneralAsked, GeneralQuestions
from yeonma.evaluate.metrics import ScoredAnswer
from yeonma.files import content_key, default_cache_dir
from yeonma.generation.completion import Answer
from yeonma.generation.sampling import SamplingParams
from yeonma.messages import counted, tr
from yeonma.model.load import check_vocabulary, pick_device, pick_dtype
from yeonma.model.quantization import check_installed
from yeonma.policy import Policy, build_policy
from yeonma.run_folder.progress import passes_a_tenth
from yeonma.tokenization.example import Example
from yeonma.tokenization.example_encoder import encode

MAX_PROBLEMS = 20
LOSS_TOKENS = 4096  # in one forward pass
LOSS_EXAMPLES = 32
CHUNK_ROWS = 1000


@dataclass(frozen=True, eq=False)
class CandidateInputs:
    """A model, its prompts (one per row), and the examples on which its loss is computed."""

    candidate: Candidate
    prompts: list[Prompt]
    examples: list[list[Example]]
    """By row; empty if the row has no reference answer or is left out."""
    left_out: int
    """Number of rows whose reference answer is too long even if the prompt field is cut to one character."""
    identity: str = ""
    """`identity_of` the candidate; empty until dtype and device are known."""

    def answer_key(self, row: int, options: AnswerSettings) -> str:
        sampling: list[float] = []
        if options.temperature > 0:
            sampling = [options.temperature, options.top_p, options.top_k, options.seed]
        token_ids = self.prompts[row].token_ids.tolist()
        stop_ids = self.candidate.prompt_builder.stop_ids
        limits = options.max_new_tokens, options.repetition_penalty
        return content_key("answer", self.identity, token_ids, stop_ids, *limits, sampling)

    def loss_key(self, row: int) -> str:
        examples = [
            [example.token_ids.tolist(), np.flatnonzero(example.trained).tolist()]
            for example in self.examples[row]
        ]
        return content_key("loss", self.identity, examples)


def read_rows(source: Rows, limit: int | None) -> list[Row]:
    """The first `limit` rows, or all. Raises UserError if there are none."""
    rows = list(islice(source, limit))
    if not rows:
        raise UserError(tr("there are no rows"), place=source.name, cure=tr("give rows to compare on"))
    return rows


def reference_answers(
    candidates: Sequence[Candidate], rows: Sequence[Row], settings: CompareSettings
) -> list[str | None]:
    """The rows' own answers, found with the template of the first model that finds one; None if none does."""

    def reference(row: Row) -> str | None:
        texts = (_reference(candidate, row, settings) for candidate in candidates)
        return next((text for text in texts if text is not None), None)

    return [reference(row) for row in rows]


def _reference(candidate: Candidate, row: Row, settings: CompareSettings) -> str | None:
    builder, columns = candidate.prompt_builder, columns_for(candidate, settings.columns)
    try:
        row = builder.with_paths(row, columns)
    except UserError:  # the prompt is answered even if the row's own answer is faulty
        return None
    return builder.reference_in(row, candidate.columns(row, columns))


def candidate_inputs(
    candidates: Sequence[Candidate], rows: Sequence[Row], settings: CompareSettings, options: AnswerSettings
) -> list[CandidateInputs]:
    """The inputs of all models.

    Raises UserError with the first MAX_PROBLEMS problems over all rows and models: rows that do not fit a template or
    leave no room for an answer.
    """
    problems: dict[str, Problem] = {}
    inputs = []
    for candidate in candidates:
        try:
            inputs.append(_inputs(candidate, rows, settings, options))
        except UserError as error:
            problems.update({str(problem): problem for problem in error.problems})
    if problems:
        shown = list(problems.values())[:MAX_PROBLEMS]
        if len(problems) > MAX_PROBLEMS:
            shown.append(Problem(tr("there are more such problems"), settings.data_path))
        raise UserError(shown)
    return inputs


def _inputs(
    candidate: Candidate, rows: Sequence[Row], settings: CompareSettings, options: AnswerSettings
) -> CandidateInputs:
    columns = columns_for(candidate, settings.columns)
    prompts: list[Prompt] = []
    examples: list[list[Example]] = []
    left_out = 0
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        prompts += candidate.prompt_builder.prompts(chunk, columns, max_new_tokens=options.max_new_tokens)
        chunk_examples, chunk_left_out = _examples(candidate, chunk, settings)
        examples += chunk_examples
        left_out += chunk_left_out
    return CandidateInputs(candidate, prompts, examples, left_out)


def _examples(
    candidate: Candidate, rows: Sequence[Row], settings: CompareSettings
) -> tuple[list[list[Example]], int]:
    """(The rows' examples, encoded as for training on answers only, number of rows left out)."""
    builder, columns = candidate.prompt_builder, columns_for(candidate, settings.columns)
    rules = replace(builder.rules, train_on_inputs=False, over_limit="drop", row_weights=None)
    with_reference = [row for row in rows if _reference(candidate, row, settings) is not None]
    rendered = [
        builder.adapter.template.render(row, candidate.columns(row, columns)) for row in with_reference
    ]
    examples: dict[int, list[Example]] = {row.number: [] for row in rows}
    left_out = set()
    for outcome in encode(rendered, with_reference, builder.tokenizer, rules):
        if isinstance(outcome, Example):
            examples[outcome.row].append(outcome)
        else:
            left_out.add(outcome.row)
    return [[] if row.number in left_out else examples[row.number] for row in rows], len(left_out)


def answer_all(
    all_inputs: Sequence[CandidateInputs],
    settings: CompareSettings,
    options: AnswerSettings,
    cache: AnswerCache,
    log: Log,
) -> tuple[list[list[ScoredAnswer]], list[CandidateInputs], list[dict[str, Any]]]:
    """All models' answers to all rows, the inputs with the identities of their models, and what each model kept of the
    first one (`GeneralAsked.entries`).

    Computes what is not in `cache` and adds it there.
    """
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    for inputs in all_inputs:
        check_installed(inputs.candidate.quantization)
    identified = [
        replace(inputs, identity=identity_of(inputs.candidate, dtype, device)) for inputs in all_inputs
    ]
    general = None
    if settings.general_questions and len(identified) > 1:
        questions = GeneralQuestions(settings.general_questions, default_cache_dir(), dtype, device)
        general = GeneralAsked(questions, [inputs.candidate for inputs in identified])
    for weights in dict.fromkeys(inputs.candidate.weights for inputs in identified):
        group = [
            (number, inputs)
            for number, inputs in enumerate(identified)
            if inputs.candidate.weights == weights
        ]
        policy: Policy | None = None
        for number, inputs in group:
            is_answered = not (
                _rows_without_answer(inputs, options, cache) or _rows_without_loss(inputs, cache)
            )
            if is_answered and (general is None or general.is_known(number)):
                if general is not None:
                    general.ask(number, None, log)
                continue
            candidate, source = inputs.candidate, inputs.candidate.prompt_builder.source
            adapters = [] if candidate.adapter is None else [candidate.adapter]
            if policy is None:
                log(tr("loading {model}", model=source.name))
                policy = build_policy(
                    source, adapters, device=device, dtype=dtype, quantization=candidate.quantization
                )
            else:
                policy = policy.with_adapters(adapters)
            check_candidate_content(candidate, log)
            check_vocabulary(candidate.prompt_builder.tokenizer, policy.vocabulary_size, source.name)
            _complete(policy, inputs, settings, options, cache, log)
            if general is not None:
                general.ask(number, policy, log)
    answers = [
        [_scored_answer(inputs, row, options, cache) for row in range(len(inputs.prompts))]
        for inputs in identified
    ]
    return answers, identified, [] if general is None else general.entries()


def _rows_without_answer(inputs: CandidateInputs, options: AnswerSettings, cache: AnswerCache) -> list[int]:
    return [row for row in range(len(inputs.prompts)) if inputs.answer_key(row, options) not in cache.records]


def _rows_without_loss(inputs: CandidateInputs, cache: AnswerCache) -> list[int]:
    return [
        row
        for row, examples in enumerate(inputs.examples)
        if examples and inputs.loss_key(row) not in cache.records
    ]


def _complete(
    policy: Policy,
    inputs: CandidateInputs,
    settings: CompareSettings,
    options: AnswerSettings,
    cache: AnswerCache,
    log: Log,
) -> None:
    """Generate the answers and compute the losses that are not in `cache`."""
    name, builder = inputs.candidate.name, inputs.candidate.prompt_builder
    rows = _rows_without_answer(inputs, options, cache)
    total, cached = len(inputs.prompts), len(inputs.prompts) - len(rows)
    if cached:
        values = {"name": name, "cached": cached, "rows": counted(total, "row")}
        log(
            tr("{name}: {cached} of {rows} was answered before", **values)
            if cached == 1
            else tr("{name}: {cached} of {rows} were answered before", **values)
        )
    done = 0

    def add_answer(index: int, answer: Answer) -> None:
        nonlocal done
        done += 1
        row = rows[index]
        record = {"model": name, "row": row + 1, "text": answer.text}
        record |= {"token_ids": list(answer.token_ids), "ended": answer.ended}
        cache.add(inputs.answer_key(row, options), record)
        if passes_a_tenth(done, done - 1, len(rows)):
            log(
                tr(
                    "{name}: answered {done} of {rows}",
                    name=name,
                    done=cached + done,
                    rows=counted(total, "row"),
                )
            )

    policy.generate_from_ids(
        [inputs.prompts[row].token_ids for row in rows],
        builder.tokenizer,
        SamplingParams.of(options, builder.stop_ids, builder.shown_ids),
        batch_size=settings.batch_size,
        on_answer=add_answer,
    )
    rows_without_loss = _rows_without_loss(inputs, cache)
    for group in _chunks(rows_without_loss, inputs.examples):
        losses = _losses(policy, [inputs.examples[row] for row in group])
        for row, (nll, count) in zip(group, losses, strict=True):
            loss_record = {"model": name, "row": row + 1, "nll": nll, "trained_tokens": count}
            cache.add(inputs.loss_key(row), loss_record)
    if rows_without_loss:
        computed = counted(len(rows_without_loss), "row")
        log(tr("{name}: computed the loss of {rows}", name=name, rows=computed))


def _chunks(rows: Sequence[int], examples: Sequence[Sequence[Example]]) -> list[list[int]]:
    """Groups of rows of similar length, up to LOSS_TOKENS and LOSS_EXAMPLES. A larger row is a group of its own."""
    lengths = {row: sum(len(example.token_ids) for example in examples[row]) for row in rows}
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
    """(Negative log-likelihood summed over the trained tokens, number of these) for every row.

    Halves the rows if memory runs out.
    """
    flat = [example for examples in rows for example in examples]
    try:
        with torch.no_grad():
            logprob_N = policy.logprobs(Batch.of(flat))
    except torch.OutOfMemoryError as error:
        if len(rows) == 1:
            tokens = sum(len(example.token_ids) for example in flat)
            problem = tr("a row of {tokens} tokens does not fit into the device's memory", tokens=tokens)
            raise UserError(problem, cure=tr("use --dtype bfloat16 or --device cpu")) from error
        half = (len(rows) + 1) // 2
        return [*_losses(policy, rows[:half]), *_losses(policy, rows[half:])]
    counts = [sum(int(example.trained.sum()) for example in examples) for examples in rows]
    sums = [float(part.double().sum()) for part in logprob_N.cpu().split(counts)]
    return [(-total, count) for total, count in zip(sums, counts, strict=True)]


def _scored_answer(
    inputs: CandidateInputs, row: int, options: AnswerSettings, cache: AnswerCache
) -> ScoredAnswer:
    record = cache.records[inputs.answer_key(row, options)]
    loss: Mapping[str, Any] = cache.records[inputs.loss_key(row)] if inputs.examples[row] else {}
    return ScoredAnswer(
        inputs.prompts[row].answer(record["text"]),
        tuple(record["token_ids"]),
        record["ended"],
        loss.get("nll"),
        loss.get("trained_tokens", 0),
    )
