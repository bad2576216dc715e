"""How a served model differs from the trained one, and why: from what a server made of the sample rows.

What log-probabilities say about weights is in `served_weights`. No requests here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from yeonma.errors import Problem
from yeonma.messages import counted, later, tr
from yeonma.tokenization.explain import common_length
from yeonma.verify.file_checks import Finding, checked, not_checked
from yeonma.verify.served_rows import (
    PromptCause,
    ServedRow,
    is_close_call,
    is_cut_short,
    is_same,
    stops_early,
    where_it_goes_on,
)
from yeonma.verify.served_weights import WeightCause, Weights, weights_of

Cause = Literal[
    PromptCause,
    WeightCause,
    "another_tokenizer",
    "another_template",
    "context_cut",
    "no_end",
    "early_end",
    "answer_cut",
    "penalty",
    "sampled",
    "other_answers",
    "refused",
]

PROMPTS, WEIGHTS, ANSWERS = later("served prompts"), later("served weights"), later("served answers")

MOST_SHOWN = 60
"""Characters of a prompt that are shown."""


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
            _in_part(weights.scale),
            tr(
                "check the adapter's scale there, whether the server supports all of its layers, and whether it "
                "has the last checkpoint"
            ),
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
        "new_tokens": (
            tr(
                "the tokens that training added are not those of training: their rows in the server's embedding or head"
            ),
            tr("serve the merged model, or check how the server reads trained rows of embedding and head"),
        ),
        "stale_cache": (
            tr("the server goes on from numbers that it cached of the prompts with other weights"),
            tr("restart the server, or turn off its prompt cache"),
        ),
    }[weights.cause]
    numbers = tr(
        "{what} (log-probabilities of {tokens} differ by {distance} nats)",
        what=what,
        tokens=tokens,
        distance=distance,
    )
    return checked(WEIGHTS, [Problem(numbers, server, cure)], ""), [weights.cause]


def _in_part(scale: float | None) -> str:
    if scale is None:
        return tr("the server applies only a part of the adapter, or at another scale")
    return tr(
        "the server applies only a part of the adapter, or all of it at about {scale} of its scale",
        scale=f"{scale:.2f}",
    )


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
    is_cut = _are_cut(different)
    texts = [
        (one.asked.text_of(_prompt_ids(one)), one.asked.text_of(one.asked.expected.prompt_ids))
        for one in different
    ]
    is_same_text = all(there == here != "" for there, here in texts)
    cause: Cause = common or (
        "context_cut" if is_cut else "another_tokenizer" if is_same_text else "another_template"
    )
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
    if cause in ("another_template", "base_template", "reasoning_mode"):
        there, here = (_around(row, one, other) for one, other in ((ids, wanted), (wanted, ids)))
        difference = tr(
            "{difference}: {there!r} there, {here!r} in training",
            difference=difference,
            there=there,
            here=here,
        )
    return _wrong_prompt(cause, difference, server), [cause]


def _around(row: ServedRow, ids: Sequence[int], others: Sequence[int]) -> str:
    """The text of a prompt where it differs from another one."""
    first = common_length(ids, others)
    text = row.asked.text_of(ids[max(0, first - 2) : first + 12])
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."


def _prompt_ids(row: ServedRow) -> list[int]:
    assert row.by_messages is not None and row.by_messages.prompt_ids is not None
    return row.by_messages.prompt_ids


def _are_cut(rows: Sequence[ServedRow]) -> bool:
    """Whether each prompt lacks one piece, and not all the same one, as with a template that lacks it in all rows."""
    lost = [_lost(_prompt_ids(row), row.asked.expected.prompt_ids) for row in rows]
    is_one_piece = all(lost)
    return is_one_piece and (len(rows) == 1 or any(one != lost[0] for one in lost))


def _lost(ids: Sequence[int], whole: Sequence[int]) -> list[int]:
    """The piece whose absence makes `ids` of the whole prompt; empty if it is not one."""
    first = common_length(ids, whole)
    end = len(whole) - (len(ids) - first)
    return (
        list(whole[first:end]) if 0 < len(ids) < len(whole) and list(ids[first:]) == list(whole[end:]) else []
    )


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
        "reasoning_mode": (
            tr("the server turns the chat template's reasoning on or off, other than in training"),
            tr("leave out enable_thinking there: the folder's chat_template.jinja has the value of training"),
        ),
        "another_tokenizer": (
            tr("the server's tokenizer splits the same text into other tokens"),
            tr(
                "give the server the folder's tokenizer, and the version of the library that reads it rightly"
            ),
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
    are_close = all(_is_close(row) for row in wrong)
    if _explained(rows, weights) and are_close:
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
        if row.without_sampling is not None and is_same(row.without_sampling, expected):
            yield "sampled", row
        elif row.without_penalty is not None and is_same(row.without_penalty, expected):
            yield "penalty", row
        elif is_cut_short(answer, expected):
            yield "answer_cut", row
        elif expected.trained.ended and where_it_goes_on(answer, expected):
            yield "no_end", row
        elif stops_early(answer, expected):
            yield "early_end", row


def _is_close(row: ServedRow) -> bool:
    answer = row.by_messages or row.by_ids
    return answer is None or is_close_call(answer, row.asked)


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
    if cause == "sampled":
        what = tr(
            "the server draws the answer to row {row} at random, although it is asked for temperature 0",
            row=number,
        )
        return Problem(what, server, tr("make the server pass on temperature 0, or set its own to 0"))
    if cause == "answer_cut":
        what = tr("the server cuts the answer to row {row}, although more tokens were asked for", row=number)
        return Problem(what, server, tr("raise the server's limit of tokens of an answer"))
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
