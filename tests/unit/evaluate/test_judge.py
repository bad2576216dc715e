"""A judge of a comparison: verdicts, results, requests, retries, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

import yeonma
from tests.adapters import Folders, tiny_adapter
from tests.comparing import ROWS, TEMPLATE, compare
from tests.judge_server import (
    RuledJudge,
    always_first,
    broken,
    busy,
    dropped,
    garbage,
    judging,
    longer,
    prompt_in,
    send,
    torn,
    written,
)
from tests.runs import characters, write_jsonl
from tests.tokenizers import byte_level
from yeonma.config.settings import JudgeSettings
from yeonma.errors import UserError
from yeonma.evaluate import judge_server
from yeonma.evaluate.answer_cache import open_answer_cache
from yeonma.evaluate.judge import (
    JUDGE_RECORDS,
    Judged,
    JudgeMaterial,
    is_judge_record,
    judge_all,
    start_judge,
)
from yeonma.evaluate.judge_report import judge_entry, judge_notes, judge_sentences
from yeonma.evaluate.judge_rubric import Rubric, read_rubric, rubric_for
from yeonma.evaluate.judge_server import judge_of
from yeonma.evaluate.judge_verdicts import JudgedRow, judged_pairs, verdict_in

NAMES = ["base", "tuned"]
SHORT, LONG = [f"s{row}" for row in range(6)], [f"long {row}" for row in range(6)]
TWO = list(zip(SHORT, LONG, strict=True))


@contextmanager
def ruled(judge: RuledJudge, monkeypatch: pytest.MonkeyPatch) -> Iterator[RuledJudge]:
    monkeypatch.setattr(judge_server, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with judging(judge):
        yield judge


def judged(
    judge: RuledJudge,
    folder: Path,
    answers: Sequence[Sequence[str]] = (SHORT, LONG),
    references: Sequence[str | None] | None = None,
    lines: list[str] | None = None,
    **settings: Any,
) -> Judged:
    given = JudgeSettings(judge=judge.url, judge_model="judge", **settings)
    rows = len(answers[0])
    names = [*NAMES, "other"][: len(answers)]
    material = JudgeMaterial(
        names, [f"question {row}" for row in range(rows)], references or [None] * rows, characters()
    )
    log = [].append if lines is None else lines.append
    asked = judge_of(given, 42)
    assert asked is not None
    with open_answer_cache(folder / JUDGE_RECORDS, is_judge_record) as cache:
        session = start_judge(asked, rubric_for(given, material.texts), cache, log)
        return judge_all(session, material, answers, log)


# ---------------------------------------------------------------------------- verdicts and results


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (written("A"), "first"),
        (written("B"), "second"),
        (written("tie"), "tie"),
        (f"```json\n{written('B')}\n```", "second"),
        (f"<think>\nA is good. {written('A')}</think>\n\n{written('B')}", "second"),
        ("A", "first"),
        (" tie\n", "tie"),
        ('{"verdict": "A"}', "first"),
        # nothing is guessed
        ("", None),
        ("The better answer is A.", None),
        ("A is better", None),
        ("a", None),
        ('{"verdict": "a"}', None),
        ('{"verdict": "both"}', None),
        ('{"verdict": ["A"]}', None),
        ('{"verdict": "A", "verdict": "B"}', None),
        ('{"reason": "the verd', None),
        (f"Here it is: {written('A')}", None),
        ("[" * 100_000, None),
        ("<think>it goes on", None),
        ("null", None),
    ],
)
def test_verdict_is_read_strictly(text: str, verdict: str | None) -> None:
    assert verdict_in(text) == verdict


def test_single_letter_that_was_cut_is_no_verdict() -> None:
    assert verdict_in("A", cut=True) is None
    assert verdict_in(written("A"), cut=True) == "first"


def test_a_win_needs_both_orders() -> None:
    results = {
        (given, swapped): JudgedRow(False, given, swapped).result
        for given in ("first", "second", "tie", None)
        for swapped in ("first", "second", "tie", None)
    }
    assert {two for two, result in results.items() if result == "first"} == {("first", "second")}
    assert {two for two, result in results.items() if result == "second"} == {("second", "first")}
    assert all((result == "none") == (None in two) for two, result in results.items())
    by_place = {two for two in results if JudgedRow(False, *two).by_place}
    assert by_place == {("first", "first"), ("second", "second")}


def test_numbers_of_a_pair_follow_from_its_rows() -> None:
    rows = [
        *[JudgedRow(False, "second", "first")] * 12,  # the second model wins
        *[JudgedRow(False, "first", "second")] * 3,
        *[JudgedRow(False, "first", "first")] * 4,  # the place decides
        *[JudgedRow(False, "tie", "tie")] * 1,
        *[JudgedRow(is_equal=True)] * 2,
        *[JudgedRow(False, "first", None)] * 5,
    ]
    (pair,) = judged_pairs([rows], seed=1)
    assert (pair.wins, pair.ties, pair.equal, pair.unjudged) == ((3, 12), 5, 2, 5)
    assert pair.win_rate == pytest.approx((12 + 0.5 * 7) / 22)
    assert pair.agreement == pytest.approx(16 / 20)
    assert pair.place_bias == pytest.approx(4 / 20)
    assert pair.win_interval is not None
    assert pair.win_interval[0] < pair.win_rate < pair.win_interval[1]
    assert pair.p is not None and pair.p < 0.05
    (other,) = judged_pairs([[row for row in rows if row.result != "none"]], seed=1)
    assert other.win_rate == pair.win_rate  # rows without a result count nowhere
    (empty,) = judged_pairs([[JudgedRow()]], seed=1)
    assert (empty.win_rate, empty.win_interval, empty.p, empty.agreement) == (None, None, None, None)


# ---------------------------------------------------------------------------- rubrics


def test_reference_paragraph_is_left_out_without_one() -> None:
    rubric = Rubric("own", "Q {question}\n\nRef: {reference}\n\n{first} or {second}? {{second}}\n")
    assert rubric.filled("{first}", "x{second}", "y", None) == "Q {first}\n\nx{second} or y? {second}\n"
    assert "Ref: {question}" in rubric.filled("q", "x", "y", "{question}")


def test_built_in_rubric_follows_the_script_of_the_data() -> None:
    for texts, name, form in ((["A title"], "en", "impartial"), (["도서관이 다시 열어"], "ko", "판정자")):
        rubric = rubric_for(JudgeSettings(), texts)
        assert rubric.name == name and form in rubric.form
        text = rubric.filled("the question", "one", "two", "three")
        assert all(part in text for part in ("the question", "one", "two", "three"))
        assert "{" not in text
        assert "three" not in rubric.filled("the question", "one", "two", None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "{question} {first} {second} {refrence}",
            'r.txt:1: a rubric has no place {refrence}; did you mean "ref',
        ),
        ("{question}\n{first}", "the rubric lacks {second}"),
        ("{question} {first} {second} {score}", "write {{ and }}"),
        ("\0", "U+0000"),
    ],
)
def test_mistake_in_a_rubric_has_a_place_and_a_cure(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        read_rubric("r.txt")
    assert told in str(caught.value)


def test_rubric_must_be_there_and_utf8(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--rubric .*: cannot be read: No such file"):
        read_rubric(str(tmp_path / "none.txt"))
    (tmp_path / "cp949.txt").write_bytes("{question} 판정".encode("cp949"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_rubric(str(tmp_path / "cp949.txt"))


# ---------------------------------------------------------------------------- requests


def test_longer_answers_win_in_both_orders_and_nothing_is_asked_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with ruled(RuledJudge(longer), monkeypatch) as judge:
        found = judged(judge, tmp_path, lines=lines)
        assert [row.result for row in found.rows[0]] == ["second"] * 6
        assert sorted(judge.questions) == sorted([*TWO, *(two[::-1] for two in TWO)])
        assert found.rows[0][0].reasons == ("because of B", "because of A")
        assert len(judge.bodies) == 13  # with the trial
        body = judge.bodies[-1]
        assert (body["temperature"], body["seed"], body["max_tokens"]) == (0, 42, 512)
        assert body["response_format"]["json_schema"]["schema"]["required"] == ["reason", "verdict"]
    again = judged(judge, tmp_path)  # with the server gone
    assert (again.rows, len(judge.bodies)) == (found.rows, 13)
    host = judge.url.removeprefix("http://")
    assert lines[0] == f"the rows' prompts and answers are sent to {host}, to be judged by judge"
    assert (
        lines[1].startswith("judge judge: 12 requests, with about ") and "6,144 in the verdicts" in lines[1]
    )
    (pair,) = judge_entry(found, 42)["pairs"]
    assert (pair["wins"], pair["win_rate"], pair["place_bias"], pair["agreement"]) == ([0, 6], 1.0, 0.0, 1.0)
    (sentence,) = judge_sentences(judge_entry(found, 42), NAMES)
    assert sentence.startswith("The judge judge prefers tuned to base: tuned wins 100.0% of 6 rows")


def test_judge_of_the_place_brings_ties_and_a_bias_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ruled(RuledJudge(always_first), monkeypatch) as judge:
        found = judged(judge, tmp_path)
    entry = judge_entry(found, 42)
    (pair,) = entry["pairs"]
    assert (pair["wins"], pair["ties"], pair["win_rate"]) == ([0, 0], 6, 0.5)
    assert (pair["place_bias"], pair["agreement"], entry["first_place"]) == (1.0, 0.0, 1.0)
    (sentence,) = judge_sentences(entry, NAMES)
    assert sentence.startswith("The judge judge shows no difference between tuned and base")
    assert "in 100.0% of the rows of tuned and base: trust it little" in next(judge_notes(entry, NAMES))


def test_verdicts_that_cannot_be_read_are_counted_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with ruled(RuledJudge(garbage), monkeypatch) as judge:
        found = judged(judge, tmp_path, lines=lines)
        judged(judge, tmp_path)
        assert len(judge.bodies) == 13
    assert "is no verdict" in lines[1]
    entry = judge_entry(found, 42)
    assert (entry["unreadable"], entry["pairs"][0]["unjudged"], entry["pairs"][0]["ties"]) == (12, 6, 0)
    assert next(judge_notes(entry, NAMES)).startswith("12 verdicts of the judge cannot be read")
    assert "too few verdicts" in next(judge_sentences(entry, NAMES))
    records = [json.loads(line) for line in (tmp_path / JUDGE_RECORDS).read_text().splitlines()]
    assert {record["text"] for record in records} == {garbage("", "")}


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ruled(RuledJudge(longer), monkeypatch) as judge:
        found = judged(judge, tmp_path, [["same", "a"], ["same", "bb"]])
        assert len(judge.questions) == 2
    assert [row.result for row in found.rows[0]] == ["equal", "second"]


def test_all_pairs_of_three_models_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ruled(RuledJudge(longer), monkeypatch) as judge:
        found = judged(judge, tmp_path, [["a"], ["bb"], ["ccc"]])
        assert len(judge.questions) == 6
    assert found.pairs == [(0, 1), (0, 2), (1, 2)]
    assert [rows[0].result for rows in found.rows] == ["second"] * 3
    sentences = list(judge_sentences(judge_entry(found, 42), [*NAMES, "other"]))
    assert len(sentences) == 2  # against the first


def test_trouble_on_the_way_changes_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ruled(RuledJudge(longer), monkeypatch) as judge:
        right = judged(judge, tmp_path)
    kinds = [busy, dropped, broken, torn, busy, dropped, torn, busy]
    troubles = [trouble for kind in kinds for trouble in (kind, lambda request: False)]
    other = tmp_path / "other"
    other.mkdir()
    with ruled(RuledJudge(longer, troubles=troubles), monkeypatch) as judge:
        assert judged(judge, other).rows == right.rows
        assert len(judge.bodies) == 13 + 8


def test_requests_at_once_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ruled(RuledJudge(longer, wait_seconds=0.05), monkeypatch) as judge:
        judged(judge, tmp_path, judge_requests=3)
        assert judge.most_at_once == 3


def test_judge_that_is_lost_ends_the_command_and_the_next_one_asks_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ruled(RuledJudge(longer), monkeypatch) as judge:
        good: list[Any] = [lambda request: False] * 5
        judge.troubles = [*good, *[dropped] * 1000]
        with pytest.raises(UserError) as caught:
            judged(judge, tmp_path, judge_requests=1)
        assert "verdicts so far stay, and the same command goes on" in str(caught.value)
        judge.troubles.clear()
        before = len(judge.bodies)
        found = judged(judge, tmp_path)
        assert len(judge.bodies) - before == 12 - 4
    assert [row.result for row in found.rows[0]] == ["second"] * 6


def test_half_a_line_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ruled(RuledJudge(longer), monkeypatch) as judge:
        found = judged(judge, tmp_path)
        path = tmp_path / JUDGE_RECORDS
        path.write_bytes(path.read_bytes()[:-40])
        assert judged(judge, tmp_path).rows == found.rows
        assert len(judge.bodies) == 14


def test_one_refused_row_is_counted_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    refused = RuledJudge(longer, refuse=lambda body: "too long" if "long 3" in prompt_in(body) else None)
    with ruled(refused, monkeypatch) as judge:
        found = judged(judge, tmp_path, lines=lines)
        assert [row.result for row in found.rows[0]] == [*["second"] * 3, "none", *["second"] * 2]
        assert (found.refused, found.unreadable) == (2, 0)
        judge.refuse = lambda body: None
        assert judged(judge, tmp_path).refused == 0
    assert any("row 4 was refused by the judge: the server says 400: too long" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("temperature", "the judge takes no temperature"),
        ("seed", "the judge takes no seed"),
        ("response_format", None),
        ("max_tokens", None),
    ],
)
def test_parameter_that_a_server_refuses_is_left_out_and_told(
    name: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(body: Mapping[str, Any]) -> str | None:
        cure = ", use max_completion_tokens" if name == "max_tokens" else ""
        return f"Unsupported parameter: '{name}'{cure}" if name in body else None

    lines: list[str] = []
    with ruled(RuledJudge(longer, refuse=refuse), monkeypatch) as judge:
        assert [row.result for row in judged(judge, tmp_path, lines=lines).rows[0]] == ["second"] * 6
        left = {"temperature", "seed", "response_format", "max_tokens"} - set(judge.bodies[-1])
        assert left == {name}
        assert ("max_completion_tokens" in judge.bodies[-1]) == (name == "max_tokens")
        count = len(judge.bodies)
        judged(judge, tmp_path)
        assert len(judge.bodies) == count
    assert told is None or any(line.startswith(told) for line in lines)


def test_key_is_sent_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    with ruled(RuledJudge(longer), monkeypatch) as judge:
        monkeypatch.setenv("YEONMA_JUDGE_KEY", "sk-very-secret")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-others")
        judged(judge, tmp_path, lines=lines)
        assert set(judge.keys) == {"Bearer sk-very-secret"}
    assert "secret" not in "\n".join(lines) + (tmp_path / JUDGE_RECORDS).read_text()


def test_key_does_not_follow_a_redirect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YEONMA_JUDGE_KEY", "sk-very-secret")
    with ruled(RuledJudge(longer), monkeypatch) as other, judging(RuledJudge(longer)) as judge:

        def moved(request: BaseHTTPRequestHandler) -> bool:
            send(request, 302, {"error": "moved"}, Location=f"{other.url}/v1/chat/completions")
            return True

        judge.troubles = [moved]
        with pytest.raises(UserError, match="the server says 302"):
            judged(judge, tmp_path)
        assert other.bodies == []


@pytest.mark.parametrize(
    ("status", "cure"),
    [
        (401, "environment variable YEONMA_JUDGE_KEY"),
        (404, "name one of these with --judge_model: judge, other"),
        (429, "raise the limit of the account"),
    ],
)
def test_judge_that_refuses_everything_is_found_by_the_trial(
    status: int, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: BaseHTTPRequestHandler) -> bool:
        send(request, status, {"error": {"message": "no"}}, Retry_After="0.01")
        return True

    with ruled(RuledJudge(longer, troubles=[refuse] * 20), monkeypatch) as judge:
        given = JudgeSettings(judge=judge.url + "/v1/", judge_model="jgude" if status == 404 else "judge")
        asked = judge_of(given, 42)
        assert asked is not None
        with (
            open_answer_cache(tmp_path / JUDGE_RECORDS, is_judge_record) as cache,
            pytest.raises(UserError) as caught,
        ):
            start_judge(asked, rubric_for(given, ["text"]), cache, [].append)
        told = str(caught.value)
        assert (cure if status != 404 else 'did you mean "judge"') in told
        assert len(judge.bodies) == (6 if status == 429 else 1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"judge": "127.0.0.1:8000", "judge_model": "x"}, "give an address such as http://127.0.0.1:8000"),
        ({"judge": "http://", "judge_model": "x"}, "not the address of a server"),
        ({"judge": "https://me:secret@host/v1", "judge_model": "x"}, "environment variable YEONMA_JUDGE_KEY"),
        ({"judge": "http://127.0.0.1:8000"}, "--judge_model: a judge needs a name"),
        ({"judge_model": "x"}, "--judge_model: it is for a judge, and there is none"),
        ({"rubric": "r.txt"}, "--rubric: it is for a judge, and there is none"),
        ({"judge_reference": False}, "--judge_reference: it is for a judge"),
    ],
)
def test_settings_that_name_no_judge_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        judge_of(JudgeSettings(**settings), 42)
    assert told in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "api"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("https://h/api/v1/chat/completions", "https://h/api/v1"),
    ],
)
def test_address_is_taken_with_and_without_its_path(address: str, api: str) -> None:
    found = judge_of(JudgeSettings(judge=address, judge_model="x"), 42)
    assert found is not None and found.api == api


# ---------------------------------------------------------------------------- the whole command


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return tiny_adapter(tmp_path_factory.mktemp("adapter"), byte_level(), template=TEMPLATE)


def test_command_writes_the_verdicts_into_the_report(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "report"
    models = [str(folders.base), str(folders.adapter)]
    with ruled(RuledJudge(longer), monkeypatch) as judge:
        done = compare(output, *models, data_path=data, judge=judge.url, judge_model="judge")
        assert done.status == 0, done.err
        report = json.loads((output / "report.json").read_text("utf-8"))
        for row in report["rows"]:
            one, other = (len(answer["text"]) for answer in row["answers"])
            (entry,) = row["judge"]
            assert entry["result"] == ("tie" if one == other else "first" if one > other else "second")
        assert "Judged by judge, rubric en" in done.out and "win rate, %" in done.out
        assert report["judge"]["pairs"][0]["models"] == [0, 1]
        assert judge.url not in json.dumps(report)
        prompts = [prompt_in(body) for body in judge.bodies[1:]]
        assert all(any(row["title"] in prompt for row in ROWS) for prompt in prompts)
        assert all("<|" not in prompt for prompt in prompts)
        result = yeonma.compare(
            models=models,
            data_path=str(data),
            output_dir=str(output),
            max_new_tokens=12,
            judge=judge.url,
            judge_model="judge",
        )
        assert result.report["judge"] == report["judge"]
        assert len(judge.bodies) == 1 + len(prompts)
        rubric = tmp_path / "own.txt"
        rubric.write_text("<answer_A>\n{first}\n</a>\n<answer_B>\n{second}\n</a>\n\n{question}\n")
        words = {"rubric": rubric, "judge_reference": "false", "judge": judge.url, "judge_model": "judge"}
        done = compare(output, *models, data_path=data, **words)
        assert done.status == 0, done.err
        assert "rubric own.txt" in done.out
        assert not any(row["title"] in prompt_in(judge.bodies[-1]) for row in ROWS if len(row["title"]) > 9)


def test_command_refuses_a_judge_before_anything_is_computed(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(judge_server, "FIRST_WAIT_SECONDS", 0.001)
    one = compare(tmp_path / "a", folders.base, data_path=data, judge="http://127.0.0.1:9", judge_model="x")
    assert one.status == 2 and "a judge compares two models" in one.err
    models = (folders.base, folders.adapter)
    done = compare(tmp_path / "b", *models, data_path=data, judge="http://127.0.0.1:9", judge_model="x")
    assert done.status == 2 and "judge x at 127.0.0.1:9: no answer from the server" in done.err
    assert not (tmp_path / "b" / "answers.jsonl").read_bytes()
