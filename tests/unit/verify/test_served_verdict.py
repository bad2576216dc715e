"""What `yeonma verify --served` concludes from what a server made of the sample rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from yeonma.adapter.sample_answers import GreedyAnswer, SampleAnswer, ScoredIds
from yeonma.tokenization.conversation import Conversation
from yeonma.verify.served_rows import AskedRow, ComparedTokens, PromptCause, ServedRow
from yeonma.verify.served_verdict import ServedVerdict, judge
from yeonma.verify.server_client import ServedAnswer, ServedScore, ServerFailed

PROMPTS = ([1, 10, 11, 12], [1, 10, 13, 14, 15, 16], [1, 20, 21])
BOS, EOS = 1, 2
TEXT = "storm closes harbour"
TOKENS = 24


def numbers(seed: int, spread: float = 1.5) -> list[float]:
    return [-abs(number) - 0.05 for number in np.random.default_rng(seed).normal(0, spread, TOKENS).tolist()]


def expected(row: int, *, ended: bool = True, has_base: bool = True) -> SampleAnswer:
    trained, base = numbers(row), numbers(row + 100, 4.0)
    ids = list(range(30, 30 + TOKENS))
    return SampleAnswer(
        row,
        PROMPTS[row - 1],
        GreedyAnswer(ids, TEXT, TEXT, ended),
        GreedyAnswer([5, 6, 7], "the base says", "the base says", False),
        *[ScoredIds(ids, trained, base if has_base else None)] * 3,
    )


def asked(row: int, **options: bool) -> AskedRow:
    answer = expected(row, **options)
    ids = answer.prompt_ids
    wrong: list[tuple[PromptCause, list[int]]] = [
        ("double_bos", [BOS, *ids]),
        ("no_bos", ids[1:]),
        ("added_eos", [*ids, EOS]),
        ("base_template", [1, 99, *ids, 98]),
    ]
    return AskedRow(answer, Conversation([{"role": "user", "content": "x"}]), wrong)


def right(row: int, **options: bool) -> ServedRow:
    """A row of a server that does all as in training, and tells all."""
    one = asked(row, **options)
    answer = one.expected
    prompt = answer.prompt_ids
    served = ServedAnswer(TEXT, "stop", len(prompt), TOKENS, list(prompt), list(answer.trained.token_ids))
    return ServedRow(one, served, served, scores=scores_of(answer, answer.greedy_ids.trained))


def scores_of(answer: SampleAnswer, served: Sequence[float]) -> ComparedTokens:
    return ComparedTokens(
        [ServedScore(number) for number in served], answer.greedy_ids.trained, answer.greedy_ids.base
    )


ROWS = [right(1), right(2), right(3)]


def with_prompt(row: ServedRow, ids: Sequence[int], *, told: bool = True) -> ServedRow:
    assert row.by_messages is not None
    answer = replace(row.by_messages, prompt_tokens=len(ids), prompt_ids=list(ids) if told else None)
    return replace(row, by_messages=answer)


def with_answer(row: ServedRow, text: str, finish: str = "stop") -> ServedRow:
    """The server tells no ids of answers."""
    assert row.by_messages is not None
    return replace(row, by_messages=replace(row.by_messages, text=text, finish=finish, token_ids=None))


def mixed(row: ServedRow, share: float, noise: float = 0.0) -> ServedRow:
    """A row whose log-probabilities lie on the way from the base's to the trained model's."""
    answer = row.asked.expected
    assert answer.greedy_ids.base is not None
    drawn = np.random.default_rng(answer.row_number).normal(0, noise, TOKENS)
    served = [
        base + share * (trained - base) + more
        for trained, base, more in zip(
            answer.greedy_ids.trained, answer.greedy_ids.base, drawn.tolist(), strict=True
        )
    ]
    return replace(row, scores=scores_of(answer, served))


def outcomes(verdict: ServedVerdict) -> list[str]:
    return [finding.outcome for finding in verdict.findings]


def test_server_that_does_all_as_in_training_is_well() -> None:
    verdict = judge(ROWS, "here")
    assert (outcomes(verdict), verdict.causes) == (["well"] * 3, ())


@pytest.mark.parametrize("cause", ["added_eos", "base_template", "double_bos", "no_bos"])
@pytest.mark.parametrize("told", [True, False])
def test_wrong_prompts_are_named_by_ids_and_by_their_number(cause: str, told: bool) -> None:
    rows = [with_prompt(row, dict(row.asked.wrong_prompts)[cause], told=told) for row in ROWS]
    verdict = judge(rows, "here")
    assert outcomes(verdict)[0] == "differs"
    if told or cause not in ("double_bos", "added_eos"):
        assert verdict.causes == (cause,)
    else:  # one token more, whichever it is
        assert verdict.causes == ("double_bos",)


def test_cut_prompts_are_named() -> None:
    cut = [with_prompt(row, row.asked.expected.prompt_ids[-2:]) for row in ROWS]
    assert judge(cut, "here").causes == ("context_cut",)
    by_number = [with_prompt(row, [0, 0], told=False) for row in ROWS]
    assert judge(by_number, "here").causes == ("context_cut",)
    refused = [
        replace(ROWS[0], by_messages=None, failure=ServerFailed("maximum context length is 2", 400)),
        *ROWS[1:],
    ]
    assert judge(refused, "here").causes == ("context_cut",)


def test_other_prompts_are_another_template() -> None:
    rows = [with_prompt(row, [7, *row.asked.expected.prompt_ids, 8, 9]) for row in ROWS]
    assert judge(rows, "here").causes == ("another_template",)
    rows = [with_prompt(row, [7, *row.asked.expected.prompt_ids, 8, 9, 9], told=False) for row in ROWS]
    assert judge(rows, "here").causes == ("another_template",)


def test_refused_requests_are_told_with_the_servers_words() -> None:
    verdict = judge(
        [replace(row, by_messages=None, failure=ServerFailed("boom", 500)) for row in ROWS], "here"
    )
    assert verdict.causes == ("refused",)
    assert "boom" in str(verdict.findings[0].problems[0])


@pytest.mark.parametrize(
    ("share", "noise", "cause"),
    [
        (1.0, 0.0, None),
        (1.0, 0.02, None),
        (0.0, 0.0, "adapter_not_applied"),
        (0.0, 0.2, "adapter_not_applied"),
        (0.5, 0.05, "adapter_in_part"),
        (2.0, 0.05, "adapter_in_part"),
        (1.0, 0.2, "fewer_bits"),
        (0.75, 0.1, "adapter_in_part"),
        (1.0, 3.0, "other_weights"),
    ],
)
def test_weights_are_judged_by_their_place_between_base_and_trained_model(
    share: float, noise: float, cause: str | None
) -> None:
    verdict = judge([mixed(row, share, noise) for row in ROWS], "here")
    assert verdict.causes == (() if cause is None else (cause,))


@pytest.mark.parametrize(("seed", "cause"), [(None, "another_adapter"), (77, "another_base")])
def test_base_alone_tells_another_adapter_from_another_base(seed: int | None, cause: str) -> None:
    rows = []
    for row in ROWS:
        answer = row.asked.expected
        assert answer.greedy_ids.base is not None
        base = answer.greedy_ids.base if seed is None else numbers(seed + answer.row_number, 6.0)
        rows.append(replace(mixed(row, 1.0, 3.0), base_scores=scores_of(answer, base)))
    assert judge(rows, "here").causes == (cause,)


def test_upper_bound_of_an_unlisted_token_says_only_that_it_is_less_likely() -> None:
    """A server that lists few tokens: where one is missing, the numbers of both models count as the bound at least."""
    answer = expected(1)
    assert answer.greedy_ids.base is not None
    bound = -2.0
    served = [ServedScore(max(number, bound), number < bound) for number in answer.greedy_ids.base]
    assert sum(score.is_upper_bound for score in served) > TOKENS // 3
    row = replace(right(1), scores=ComparedTokens(served, answer.greedy_ids.trained, answer.greedy_ids.base))
    assert judge([row], "here").causes == ("adapter_not_applied",)


def test_fully_trained_model_has_no_base_to_compare_with() -> None:
    rows = [right(row, has_base=False) for row in (1, 2, 3)]
    assert judge(rows, "here").causes == ()
    for shift, cause in ((0.2, "fewer_bits"), (2.0, "other_weights")):
        shifted = [
            replace(
                row,
                scores=scores_of(
                    row.asked.expected, [number - shift for number in row.asked.expected.greedy_ids.trained]
                ),
            )
            for row in rows
        ]
        assert judge(shifted, "here").causes == (cause,)


def test_adapter_that_changes_nothing_is_not_told_from_its_base() -> None:
    rows = []
    for row in ROWS:
        answer = row.asked.expected
        same = ComparedTokens(
            [ServedScore(number) for number in answer.greedy_ids.trained],
            answer.greedy_ids.trained,
            [number + 0.001 for number in answer.greedy_ids.trained],
        )
        rows.append(replace(row, scores=same))
    assert judge(rows, "here").causes == ()


def test_answers_that_go_on_end_early_or_are_penalised_are_named() -> None:
    assert judge([with_answer(row, TEXT + " and on", "length") for row in ROWS], "here").causes == ("no_end",)
    assert judge([with_answer(row, TEXT[:7]) for row in ROWS], "here").causes == ("early_end",)
    penalised = [
        replace(with_answer(row, "storm shuts port"), without_penalty=ServedAnswer(TEXT, "stop"))
        for row in ROWS
    ]
    assert judge(penalised, "here").causes == ("penalty",)


def test_answer_that_training_did_not_end_may_go_on() -> None:
    rows = [with_answer(right(row, ended=False), TEXT + " and on", "length") for row in (1, 2, 3)]
    assert "no_end" not in judge(rows, "here").causes


def test_other_answers_of_right_prompts_and_weights_are_rounding() -> None:
    verdict = judge([with_answer(ROWS[0], "storm shuts port"), *ROWS[1:]], "here")
    assert (outcomes(verdict), verdict.causes) == (["well"] * 3, ())


def test_server_that_tells_only_texts_is_judged_by_them() -> None:
    def told(row: ServedRow, text: str) -> ServedRow:
        return replace(row, by_messages=ServedAnswer(text, "stop"), by_ids=None, scores=None)

    right_texts = judge([told(row, TEXT) for row in ROWS], "here")
    assert (outcomes(right_texts), right_texts.causes) == (["not checked", "not checked", "well"], ())
    of_base = judge([told(row, "the base says so") for row in ROWS], "here")
    assert of_base.causes == ("adapter_not_applied",)
    assert judge([told(row, "something else") for row in ROWS], "here").causes == ("other_answers",)
