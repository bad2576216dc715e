"""Answers of a comparison -> what a judge says of them, kept in judge.jsonl so that nothing is asked twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from yeonma.adapter.found_adapter import rendered_prompts
from yeonma.config.settings import CompareSettings
from yeonma.data.rows import Row
from yeonma.errors import Log
from yeonma.evaluate.answer_cache import AnswerCache, CacheRecord
from yeonma.evaluate.candidates import Candidate, columns_for
from yeonma.evaluate.judge_rubric import Rubric
from yeonma.evaluate.judge_server import Judge, JudgeReply, accepted_from, ask_all, tried
from yeonma.evaluate.judge_verdicts import JudgedRow, JudgeVerdict, reason_in, verdict_in
from yeonma.files import content_key
from yeonma.messages import counted, tr
from yeonma.run_folder.progress import passes_a_tenth
from yeonma.tokenization.conversation import as_messages
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.verify.server_client import ServerFailed

JUDGE_RECORDS = "judge.jsonl"
"""The verdicts in a report's folder, as the judge wrote them."""
FORMAT = 1
"""Increased when equal requests should be asked again."""
_TRIAL = ("1 + 1 = ?", "2", "3")


@dataclass(frozen=True)
class JudgeQuestion:
    """Two answers to a row, in one order."""

    row: int
    pair: int
    swapped: bool
    """Whether the second model's answer stands first."""
    prompt: str


@dataclass(frozen=True, eq=False)
class JudgeMaterial:
    """What is judged, but for the answers. `questions` and `references` by row."""

    names: Sequence[str]
    """Of the models."""
    questions: Sequence[str]
    references: Sequence[str | None]
    """Those that the judge sees."""
    tokenizer: Any
    """Counts the tokens that will be sent, though not as the judge's own."""

    @property
    def texts(self) -> list[str]:
        """Of the data, for the language of the rubric."""
        return [*self.questions, *(text for text in self.references if text is not None)]


@dataclass(frozen=True, eq=False)
class Judged:
    """What a judge says. `rows[p][r]`: the verdicts of the pair of models p on row r."""

    judge: Judge
    rubric: Rubric
    with_reference: bool
    """Whether he was shown the reference answers."""
    pairs: Sequence[tuple[int, int]]
    rows: Sequence[Sequence[JudgedRow]]
    refused: int
    """Requests that the server refused, while it answered others."""
    unreadable: int
    """Replies that are no verdict."""
    first: int
    """Verdicts for the answer that stood first."""
    decided: int
    """Verdicts for one of the two."""


@dataclass(frozen=True, eq=False)
class JudgeSession:
    """A judge that has answered, with the file of its verdicts."""

    judge: Judge
    rubric: Rubric
    cache: AnswerCache

    def key(self, question: JudgeQuestion) -> str:
        """Of everything that decides the reply."""
        return content_key(FORMAT, "verdict", self.judge.api, self.judge.body(question.prompt))


def judge_material(
    candidates: Sequence[Candidate],
    rows: Sequence[Row],
    settings: CompareSettings,
    references: Sequence[str | None],
) -> JudgeMaterial:
    """`references`: the rows' own answers that the judge may see."""
    asked = asked_as(candidates)
    names = [candidate.name for candidate in candidates]
    return JudgeMaterial(names, _questions(asked, rows, settings), references, asked.prompt_builder.tokenizer)


def asked_as(candidates: Sequence[Candidate]) -> Candidate:
    """The model whose template says how the rows are asked: the first adapter, else the first model."""
    return next((candidate for candidate in candidates if candidate.is_run), candidates[0])


def _questions(asked: Candidate, rows: Sequence[Row], settings: CompareSettings) -> list[str]:
    """The rows' prompts as text to read: of a plain template as it is trained, of turns each under its role."""
    adapter, columns = asked.prompt_builder.adapter, columns_for(asked, settings.columns)
    texts = []
    for rendered in rendered_prompts(adapter, rows, columns):
        if rendered.answer_role is None:
            texts.append("".join(turn.text for turn in rendered.turns).strip("\n"))
            continue
        messages = as_messages(rendered.turns)
        parts = [] if not rendered.tools else [f"[tools]\n{json.dumps(rendered.tools, ensure_ascii=False)}"]
        for message in messages:
            calls = message.get("tool_calls")
            called = [json.dumps(calls, ensure_ascii=False)] if calls else []
            parts.append("\n".join([f"[{message['role']}]", message["content"] or "", *called]))
        is_one = len(parts) == 1 and messages[0]["role"] == "user"
        texts.append(messages[0]["content"] or "" if is_one else "\n\n".join(parts))
    return texts


def start_judge(judge: Judge, rubric: Rubric, cache: AnswerCache, log: Log) -> JudgeSession:
    """The session with a judge, which is asked one small question first unless it answered that before. Raises
    UserError if it does not answer."""
    log(
        tr(
            "the rows' prompts and answers are sent to {host}, to be judged by {model}",
            host=judge.host,
            model=judge.model,
        )
    )
    key = content_key(FORMAT, "trial", judge.api, judge.model, judge.most_tokens, rubric.name, rubric.text)
    accepted = accepted_from(cache.records.get(key, {}).get("accepted"))
    if accepted is not None:
        return JudgeSession(replace(judge, accepted=accepted), rubric, cache)
    judge, reply = tried(judge, _prompt(rubric, *_TRIAL, None), log)
    record = {"judge": judge.model, "trial": True, "text": reply.text, "accepted": asdict(judge.accepted)}
    cache.add(key, record)
    return JudgeSession(judge, rubric, cache)


def _prompt(rubric: Rubric, question: str, first: str, second: str, reference: str | None) -> str:
    return f"{rubric.filled(question, first, second, reference).strip()}\n\n{rubric.form}"


def judge_all(
    session: JudgeSession, material: JudgeMaterial, answers: Sequence[Sequence[str]], log: Log
) -> Judged:
    """The verdicts on each two models' answers to each row. `answers[m][r]`: the text of model m for row r.

    Asks what is not in the cache and adds it there. Raises UserError if the judge does not answer any more.
    """
    pairs = list(combinations(range(len(answers)), 2))
    asked = _asked(session.rubric, material, pairs, answers)
    if missing := {key: one for one in asked if (key := session.key(one)) not in session.cache.records}:
        _ask(session, material, pairs, list(missing.values()), len(asked), log)
    records = {(one.pair, one.row, one.swapped): session.cache.records.get(session.key(one)) for one in asked}
    rows = [
        [
            JudgedRow(is_equal=True)
            if answers[a][row] == answers[b][row]
            else _judged_row(records[pair, row, False], records[pair, row, True])
            for row in range(len(material.questions))
        ]
        for pair, (a, b) in enumerate(pairs)
    ]
    verdicts = [_verdict(record) for record in records.values() if record is not None]
    return Judged(
        session.judge,
        session.rubric,
        any(text is not None for text in material.references) and session.rubric.shows_reference,
        pairs,
        rows,
        refused=list(records.values()).count(None),
        unreadable=verdicts.count(None),
        first=verdicts.count("first"),
        decided=len(verdicts) - verdicts.count(None) - verdicts.count("tie"),
    )


def _judged_row(given: CacheRecord | None, swapped: CacheRecord | None) -> JudgedRow:
    return JudgedRow(
        given=_verdict(given),
        swapped=_verdict(swapped),
        reasons=(_reason(given), _reason(swapped)),
    )


def _asked(
    rubric: Rubric,
    material: JudgeMaterial,
    pairs: Sequence[tuple[int, int]],
    answers: Sequence[Sequence[str]],
) -> list[JudgeQuestion]:
    """Two for each row and pair; none where both answers are the same text."""
    asked = []
    for row, (question, reference) in enumerate(zip(material.questions, material.references, strict=True)):
        for pair, (a, b) in enumerate(pairs):
            one, other = answers[a][row], answers[b][row]
            if one == other:
                continue
            for swapped, (first, second) in enumerate(((one, other), (other, one))):
                prompt = _prompt(rubric, question, first, second, reference)
                asked.append(JudgeQuestion(row, pair, bool(swapped), prompt))
    return asked


def _ask(
    session: JudgeSession,
    material: JudgeMaterial,
    pairs: Sequence[tuple[int, int]],
    missing: Sequence[JudgeQuestion],
    total: int,
    log: Log,
) -> None:
    """Asks the questions, of which no two are equal. One that the server refuses stays without a record."""
    judge, cache = session.judge, session.cache
    ids = TextEncoder.of(material.tokenizer).batch([question.prompt for question in missing])
    log(
        tr(
            "judge {model}: {requests}, with about {tokens} in the prompts and at most {most:,} in the verdicts",
            model=judge.model,
            requests=counted(len(missing), "request"),
            tokens=counted(sum(map(len, ids)), "token"),
            most=len(missing) * judge.most_tokens,
        )
    )
    if before := total - len(missing):
        log(
            tr(
                "judge {model}: {requests} not needed again",
                model=judge.model,
                requests=counted(before, "request"),
            )
        )
    done = refused = 0

    def add(place: int, outcome: JudgeReply | ServerFailed) -> None:
        nonlocal done, refused
        question = missing[place]
        if isinstance(outcome, ServerFailed):
            refused += 1
            if refused == 1:
                row = question.row + 1
                log(tr("warning: row {row} was refused by the judge: {reason}", row=row, reason=outcome))
        else:
            cache.add(session.key(question), _record(judge, question, material.names, pairs, outcome))
        done += 1
        if passes_a_tenth(done, done - 1, len(missing)):
            log(
                tr(
                    "judge {model}: {done} of {requests}",
                    model=judge.model,
                    done=done,
                    requests=counted(len(missing), "request"),
                )
            )

    ask_all(judge, [question.prompt for question in missing], add)


def _record(
    judge: Judge,
    question: JudgeQuestion,
    names: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    reply: JudgeReply,
) -> dict[str, Any]:
    a, b = pairs[question.pair]
    first, second = (b, a) if question.swapped else (a, b)
    return {
        "judge": judge.model,
        "row": question.row + 1,
        "first": names[first],
        "second": names[second],
        "verdict": verdict_in(reply.text, cut=reply.finish == "length"),
        **asdict(reply),
    }


def _verdict(record: CacheRecord | None) -> JudgeVerdict | None:
    """Read anew from what the judge wrote."""
    return None if record is None else verdict_in(record["text"], cut=record.get("finish") == "length")


def _reason(record: CacheRecord | None) -> str:
    return "" if record is None else reason_in(record["text"])


def is_judge_record(record: Mapping[str, Any]) -> bool:
    """Whether a line of judge.jsonl is complete."""
    return isinstance(record.get("text"), str) and (
        "accepted" in record or isinstance(record.get("finish"), str)
    )
