"""How a served model differs from the trained one, and why: from what a server made of the sample rows.

Log-probabilities decide about weights. With the server's numbers s of some tokens, the trained model's t and the base's
b, `share` is the position of s on the way from b to t by least squares: 1 for the trained model, 0 for the base; `rest`
is the root mean square of what lies beside that way, in nats. No requests here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from yeonma.errors import Problem
from yeonma.messages import counted, later, tr
from yeonma.verify.file_checks import Finding, checked, not_checked
from yeonma.verify.served_rows import (
    ComparedTokens,
    PromptCause,
    ServedRow,
    is_same,
    joined,
    stops_early,
    where_it_goes_on,
)

Cause = Literal[
    PromptCause,
    "adapter_not_applied",
    "adapter_in_part",
    "another_adapter",
    "another_base",
    "other_weights",
    "fewer_bits",
    "another_template",
    "context_cut",
    "no_end",
    "early_end",
    "penalty",
    "other_answers",
    "refused",
]

ROUNDING = 0.06
"""Nats of root mean square: what another number format of 16 bits or another order of sums changes."""
NOISE = 0.5
"""The same for weights in 4 bits; or NOISE_OF_CHANGE of what training changed, if that is more."""
NOISE_OF_CHANGE = 0.35
CHANGED = 0.03
"""Below this the trained model and its base cannot be told apart by these tokens."""
LOWEST = -12.0
"""Log-probabilities below count as this: those of very unlikely tokens are mostly noise."""
NEAR_BASE = 0.4
"""Shares below are near the base."""
LEAST_SHARE = 0.3
"""Of the same adapter, if the numbers are not the base's: with a quarter of its scale it was 0.57."""
WHOLE = (0.75, 1.35)
"""Shares that count as the adapter as it was trained."""
BESIDE = 0.4
"""From this part of what training changed on, numbers beside the way are of other weights. Adapters at half or twice
their scale, and with a third to a half of their layers dropped, had 0.19 to 0.34 of it, another adapter 0.5."""

PROMPTS, WEIGHTS, ANSWERS = later("served prompts"), later("served weights"), later("served answers")


@dataclass(frozen=True)
class Weights:
    """What log-probabilities say about a server's weights."""

    cause: Cause | None
    """None: they are the trained ones, up to rounding."""
    distance: float
    """From the trained model, in nats of root mean square."""
    tokens: int


@dataclass(frozen=True)
class ServedVerdict:
    findings: tuple[Finding, ...]
    causes: tuple[Cause, ...]
    """The likely ones, in the order of the findings, each once."""


def judge(rows: Sequence[ServedRow], server: str) -> ServedVerdict:
    """`server`: its name and address, for messages. There must be rows."""
    findings, causes = [], []
    weights = weights_of(rows)
    for finding, found in (
        _prompts(rows, server),
        _weights(weights, server),
        _answers(rows, weights, server),
    ):
        findings.append(finding)
        causes += found
    return ServedVerdict(tuple(findings), tuple(dict.fromkeys(causes)))


# Weights


def weights_of(rows: Sequence[ServedRow]) -> Weights | None:
    """None if the server tells no log-probabilities of given tokens."""
    scores = joined([row.scores for row in rows])
    if scores is None:
        return None
    served, trained, base = _arrays(scores)
    cause = _cause_of_numbers(served, trained, base)
    alone = joined([row.base_scores for row in rows])
    if cause == "other_weights" and alone is not None:
        served_base, trained_there, base_there = _arrays(alone)
        if base_there is not None:
            is_right = _rms(served_base - base_there) <= _noise(trained_there - base_there)
            cause = "another_adapter" if is_right else "another_base"
    return Weights(cause, _rms(served - trained), len(served))


def _cause_of_numbers(served: np.ndarray, trained: np.ndarray, base: np.ndarray | None) -> Cause | None:
    distance = _rms(served - trained)
    if distance <= ROUNDING:
        return None
    if base is None or _rms(trained - base) < CHANGED:
        return "fewer_bits" if distance <= NOISE else "other_weights"
    change = trained - base
    share = float((served - base) @ change / (change @ change))
    rest = _rms(served - base - share * change)
    noise = _noise(change)
    if _rms(served - base) <= noise and share < NEAR_BASE:
        return "adapter_not_applied"
    if rest <= noise and not WHOLE[0] <= share <= WHOLE[1]:
        return "adapter_in_part"
    if distance <= noise:
        return "fewer_bits"
    is_beside = rest > BESIDE * _rms(change) or share < LEAST_SHARE
    return "other_weights" if is_beside else "adapter_in_part"


def _noise(change: np.ndarray) -> float:
    """The most that fewer bits explain, in nats. `change`: what training changed."""
    return min(max(ROUNDING, NOISE_OF_CHANGE * _rms(change)), NOISE)


def _arrays(scores: ComparedTokens) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(served, trained, base), each of shape (tokens,). Where the server tells only an upper bound, lower numbers of
    the others count as this bound."""
    served = np.array([score.logprob for score in scores.served], dtype=np.float64)
    bounds = [score.logprob if score.is_upper_bound else LOWEST for score in scores.served]
    lowest = np.maximum(np.array(bounds, dtype=np.float64), LOWEST)
    base = None if scores.base is None else np.maximum(np.array(scores.base), lowest)
    return np.maximum(served, lowest), np.maximum(np.array(scores.trained), lowest), base


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _weights(weights: Weights | None, server: str) -> tuple[Finding, list[Cause]]:
    if weights is None:
        reason = tr("the server does not tell log-probabilities of given tokens")
        return not_checked(WEIGHTS, reason), []
    tokens = counted(weights.tokens, "token")
    distance = f"{weights.distance:.3f}"
    if weights.cause is None:
        about = tr(
            "the log-probabilities of {tokens} are those of training, to {distance} nats",
            tokens=tokens,
            distance=distance,
        )
        return checked(WEIGHTS, [], about), []
    what, cure = {
        "adapter_not_applied": (
            tr("the server answers as the base alone: the adapter is not applied"),
            tr(
                "start the server with the adapter, and ask for it by its name; some servers leave out layers"
            ),
        ),
        "adapter_in_part": (
            tr("the server applies only a part of the adapter, or at another scale"),
            tr("check the adapter's scale there, and whether the server supports all of its layers"),
        ),
        "another_adapter": (
            tr("the server's base is right, and its adapter is another one"),
            tr("give the server this adapter's files"),
        ),
        "another_base": (
            tr("the server's base is another one"),
            tr("give the server the base model that the adapter was trained on"),
        ),
        "other_weights": (
            tr("the server's weights are others: another adapter, another base or another revision of it"),
            tr("give the server this adapter and the base model that it was trained on"),
        ),
        "fewer_bits": (
            tr("the server's numbers are noisy, as with weights in fewer bits"),
            tr("judge by `yeonma compare` whether the answers are good enough, or serve more bits"),
        ),
    }[weights.cause]
    numbers = tr(
        "{what} (log-probabilities of {tokens} differ by {distance} nats)",
        what=what,
        tokens=tokens,
        distance=distance,
    )
    return checked(WEIGHTS, [Problem(numbers, server, cure)], ""), [weights.cause]


# Prompts


def _prompts(rows: Sequence[ServedRow], server: str) -> tuple[Finding, list[Cause]]:
    cut = [row for row in rows if row.failure is not None and row.failure.is_too_long]
    if cut:
        what = tr("a prompt of training does not fit: {failure}", failure=cut[0].failure)
        problem = Problem(what, server, tr("start the server with a longer context"))
        return checked(PROMPTS, [problem], ""), ["context_cut"]
    failed = [row for row in rows if row.failure is not None]
    if failed:
        problem = Problem(str(failed[0].failure), server, tr("see the server's own log"))
        return checked(PROMPTS, [problem], ""), ["refused"]
    asked = [row for row in rows if row.by_messages is not None]
    if not asked:
        reason = tr("messages do not give the prompts of training here; the rows were asked by token ids")
        return not_checked(PROMPTS, reason), []
    told = [row for row in asked if row.by_messages is not None and row.by_messages.prompt_ids is not None]
    if told:
        return _compared_prompts(told, server)
    counts = [
        (row, row.by_messages.prompt_tokens)
        for row in asked
        if row.by_messages is not None and row.by_messages.prompt_tokens is not None
    ]
    if not counts:
        return not_checked(PROMPTS, tr("the server tells neither token ids nor their number")), []
    if all(count == len(row.asked.expected.prompt_ids) for row, count in counts):
        about = tr(
            "the prompts of {rows} have as many tokens as in training; the server does not tell which",
            rows=counted(len(counts), "row"),
        )
        return checked(PROMPTS, [], about), []
    cause: Cause = _common_cause(counts, len) or _by_count(counts)
    row, count = next((row, count) for row, count in counts if count != len(row.asked.expected.prompt_ids))
    difference = tr(
        "the prompt of row {row} has {tokens} there, and {trained} in training",
        row=row.asked.expected.row_number,
        tokens=counted(count, "token"),
        trained=len(row.asked.expected.prompt_ids),
    )
    difference = tr("{difference}; judged by their number alone", difference=difference)
    return _wrong_prompt(cause, difference, server), [cause]


def _by_count(counts: Sequence[tuple[ServedRow, int]]) -> Cause:
    """A server that cuts prompts silently gives all long ones the same length."""
    longer = {count for row, count in counts if count < len(row.asked.expected.prompt_ids)}
    others = [count for row, count in counts if count > len(row.asked.expected.prompt_ids)]
    most = max(count for _, count in counts)
    return "context_cut" if len(longer) == 1 and not others and longer == {most} else "another_template"


def _compared_prompts(told: Sequence[ServedRow], server: str) -> tuple[Finding, list[Cause]]:
    different = [row for row in told if _prompt_ids(row) != row.asked.expected.prompt_ids]
    if not different:
        about = tr("the messages of {rows} get the token ids of training", rows=counted(len(told), "row"))
        return checked(PROMPTS, [], about), []
    row = different[0]
    ids, wanted = _prompt_ids(row), row.asked.expected.prompt_ids
    common = _common_cause([(one, _prompt_ids(one)) for one in different], list)
    is_cut = all(_is_part(_prompt_ids(one), one.asked.expected.prompt_ids) for one in different)
    cause: Cause = common or ("context_cut" if is_cut else "another_template")
    at = next(
        (at for at, (old, new) in enumerate(zip(wanted, ids, strict=False)) if old != new),
        min(len(ids), len(wanted)),
    )
    difference = tr(
        "the prompt of row {row} differs from token {at} on ({trained} tokens in training, {served} there)",
        row=row.asked.expected.row_number,
        at=at + 1,
        trained=len(wanted),
        served=len(ids),
    )
    return _wrong_prompt(cause, difference, server), [cause]


def _prompt_ids(row: ServedRow) -> list[int]:
    assert row.by_messages is not None and row.by_messages.prompt_ids is not None
    return row.by_messages.prompt_ids


def _is_part(ids: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether the ids are the beginning or the end of the whole prompt."""
    count = len(ids)
    return 0 < count < len(whole) and list(ids) in (list(whole[:count]), list(whole[-count:]))


def _common_cause(
    told: Sequence[tuple[ServedRow, object]], what: Callable[[Sequence[int]], object]
) -> PromptCause | None:
    """The first cause by which each row has a wrong prompt that is as told. `what`: what is told of its ids."""
    fitting = [{cause for cause, ids in row.asked.wrong_prompts if what(ids) == known} for row, known in told]
    first = (cause for cause, _ in told[0][0].asked.wrong_prompts)
    return next((cause for cause in first if all(cause in causes for causes in fitting)), None)


def _wrong_prompt(cause: Cause, difference: str, server: str) -> Finding:
    give_template = tr("give the server the folder's chat_template.jinja")
    what, cure = {
        "double_bos": (
            tr("the prompts begin with two BOS tokens"),
            tr("turn off one of them: in the chat template, or the tokenizer's own"),
        ),
        "added_bos": (
            tr("the server puts a BOS token before the prompts, and training had none"),
            tr("turn off the tokenizer's own BOS token there"),
        ),
        "no_bos": (
            tr("the prompts lack the BOS token of training"),
            tr(
                "turn on the tokenizer's own BOS token there, or give the server the folder's chat_template.jinja"
            ),
        ),
        "added_eos": (
            tr("the server puts an EOS token behind the prompts"),
            tr("turn off the tokenizer's own EOS token there"),
        ),
        "base_template": (
            tr("the server asks with the base model's own chat template, not with that of training"),
            give_template,
        ),
        "context_cut": (
            tr("the server cuts the prompts"),
            tr("start the server with a longer context"),
        ),
    }.get(cause, (tr("the server asks with another template"), give_template))
    problem = Problem(f"{what}: {difference}", server, cure)
    return checked(PROMPTS, [problem], "")


# Answers


def _answers(rows: Sequence[ServedRow], weights: Weights | None, server: str) -> tuple[Finding, list[Cause]]:
    answered = [row for row in rows if row.by_messages is not None or row.by_ids is not None]
    if not answered:
        return not_checked(ANSWERS, tr("the server gave no answers")), []
    right = [row for row in answered if is_same(row.by_messages or row.by_ids, row.asked.expected)]
    same = tr(
        "{same} of {rows} have the greedy answer of training",
        same=len(right),
        rows=counted(len(answered), "row"),
    )
    if len(right) == len(answered):
        return checked(ANSWERS, [], same), []
    wrong = [row for row in answered if row not in right]
    if weights is None or weights.cause is None:
        reasons = dict(_reasons(wrong))
        if reasons:
            problems = [_problem(cause, row, server) for cause, row in reasons.items()]
            return checked(ANSWERS, problems, ""), list(reasons)
    if _explained(rows, weights):
        about = tr("{same}; the others differ by rounding, which decides between likely tokens", same=same)
        return checked(ANSWERS, [], about), []
    if weights is not None and weights.cause is not None:
        return checked(ANSWERS, [Problem(same, server, tr("see the weights above"))], ""), []
    if any(not _prompt_is_right(row) for row in wrong):
        return checked(ANSWERS, [Problem(same, server, tr("see the prompts above"))], ""), []
    as_base = [row for row in wrong if _is_bases(row)]
    if len(as_base) == len(wrong):
        what = tr("{same}, and the others have that of the base alone: the adapter is not applied", same=same)
        cure = tr(
            "start the server with the adapter, and ask for it by its name; some servers leave out layers"
        )
        return checked(ANSWERS, [Problem(what, server, cure)], ""), ["adapter_not_applied"]
    cure = tr("check the server's weights and settings: it does not tell enough to say more")
    return checked(ANSWERS, [Problem(same, server, cure)], ""), ["other_answers"]


def _reasons(wrong: Sequence[ServedRow]) -> Iterator[tuple[Cause, ServedRow]]:
    """What answers show by themselves, with a row that does."""
    for row in wrong:
        expected, answer = row.asked.expected, row.by_messages or row.by_ids
        if answer is None or not _prompt_is_right(row):
            continue
        if row.without_penalty is not None and is_same(row.without_penalty, expected):
            yield "penalty", row
        elif expected.trained.ended and where_it_goes_on(answer, expected):
            yield "no_end", row
        elif stops_early(answer, expected):
            yield "early_end", row


def _prompt_is_right(row: ServedRow) -> bool:
    """Whether the answer is to the prompt of training, as far as the server tells."""
    answer = row.by_messages
    if answer is None:
        return True
    if answer.prompt_ids is not None:
        return answer.prompt_ids == row.asked.expected.prompt_ids
    return answer.prompt_tokens in (None, len(row.asked.expected.prompt_ids))


def _explained(rows: Sequence[ServedRow], weights: Weights | None) -> bool:
    """Whether prompts and weights are those of training, so that rounding is left."""
    return (
        weights is not None
        and weights.cause is None
        and all(_prompt_is_right(row) and row.failure is None for row in rows)
    )


def _is_bases(row: ServedRow) -> bool:
    answer, base = row.by_messages or row.by_ids, row.asked.expected.base
    return answer is not None and bool(base.text) and answer.text.startswith(base.text)


def _problem(cause: Cause, row: ServedRow, server: str) -> Problem:
    number = row.asked.expected.row_number
    if cause == "penalty":
        what = tr("the server penalises repetition, which changes the answer to row {row}", row=number)
        return Problem(
            what, server, tr("turn it off: repetition_penalty 1.0, in llama.cpp repeat_penalty 1.0")
        )
    if cause == "no_end":
        answer = row.by_messages or row.by_ids
        assert answer is not None
        more = where_it_goes_on(answer, row.asked.expected)[:40]
        what = tr(
            "the answer to row {row} goes on where that of training ends: {more!r}", row=number, more=more
        )
        cure = tr("make the server end answers at the tokens of training: the folder's tokenizer names them")
        return Problem(what, server, cure)
    what = tr("the answer to row {row} ends before that of training does", row=number)
    return Problem(what, server, tr("leave out stop texts, and end tokens that training did not have"))
