"""Pages by requests: what they show, in both languages, and that text of others stays text."""

from __future__ import annotations

import asyncio
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.hostile import MARK, NAME, TEXT, check_shown
from tests.studios import Client, run_folder, step_line
from yeonma.language import speaking
from yeonma.studio.found_runs import key_of
from yeonma.studio.studio_app import _changes
from yeonma.studio.tokens_page import TokenChoice


class _Elements(HTMLParser):
    """What no page of the studio has: events, styles and addresses of others."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        links = [value or "" for name, value in attrs if name in ("href", "action", "src", "data-events")]
        if (
            tag in ("img", "iframe")
            or any(name.startswith("on") or name == "style" for name, _ in attrs)
            or any(not link.startswith("/") and link != "data:," for link in links)
        ):
            self.foreign.append(f"<{tag} {attrs}>")


def check_studio_page(text: str) -> None:
    seen = _Elements()
    seen.feed(text)
    seen.close()
    assert (seen.foreign, seen.scripts) == ([], 1)
    outside = re.sub(r"<(pre|style|script)\b.*?</\1>", "", text, flags=re.DOTALL)
    check_shown(outside)
    check_shown(text.replace(MARK, "x"))


def test_home_shows_runs_with_state_curve_and_message(tmp_path: Path) -> None:
    run_folder(tmp_path / "titles", finished=True)
    run_folder(tmp_path / "broken", steps=3, log="2026-12-01 00:00:00  failed: the disk is full\n")
    text = Client.on(tmp_path).get("/").text
    assert "step 20 of 20" in text and "step 3 of 20" in text and "the disk is full" in text
    assert text.count('class="spark"') == 2
    assert re.search(r"titles</a> <span class=\"state finished\">finished", text)
    assert re.search(r"broken</a> <span class=\"state failed\">failed", text)
    for heading in (
        "Titles",
        "Classifier",
        "Chatbot",
        "Preferences",
        "Demo",
        "This machine",
        "memory",
        "disk",
    ):
        assert heading in text
    check_studio_page(text)


def test_every_link_of_a_page_leads_somewhere(tmp_path: Path) -> None:
    run_folder(tmp_path / "titles")
    client = Client.on(tmp_path)
    pages, seen = ["/"], set()
    while pages:
        page = pages.pop()
        seen.add(page)
        answer = client.get(page)
        assert answer.status == 200, page
        links = [link.replace("&amp;", "&") for link in re.findall(r'<a href="([^"]*)"', answer.text)]
        pages += [link for link in links if link not in seen]
    assert len(seen) > 5


def test_a_page_of_a_run_has_labels_and_the_command_of_a_terminal(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "titles", log="what it printed\n")
    text = Client.on(tmp_path).get(f"/run/{key_of(folder)}").text
    assert f"yeonma sft --config {folder}/settings.yaml" in text
    assert "output_dir" in text and 'data-copy="command"' in text and "what it printed" in text
    assert text.count("<figure>") == 4 and text.count('role="img"') == 4
    assert "Resume" in text and "Stop" not in text
    assert 'lang="en"' in text and 'name="viewport"' in text
    check_studio_page(text)


def test_pages_speak_korean(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "titles")
    with speaking("ko"):
        client = Client.on(tmp_path)
        for address in ("/", f"/run/{key_of(folder)}", "/tokens", "/data", "/data?data_path=sample:news_ko"):
            text = client.get(address).text
            assert '<html lang="ko">' in text
            shown = re.sub(
                r"<(pre|style|script|datalist|select)\b.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL
            )
            words = re.findall(r"[A-Za-z]{4,}", shown)
            assert set(words) <= {"Yeonma", "titles", "YAML", "yeonma", "demo", *words_of(tmp_path)}, words


def words_of(path: Path) -> set[str]:
    known = {"prompt", "completion", "messages", "nvidia", "tokens", "title", "document", "sample", "news"}
    return known | set(re.findall(r"[A-Za-z]{4,}", str(path)))


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / NAME.replace("/", "_"), log=f"{TEXT}\n", note=TEXT)
    (folder / "run.json").write_text(
        json.dumps({"identity": {"objective": TEXT, "steps": 5}, "finished": False})
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**json.loads(step_line(21)), "<b>x": 1.0}) + "\n")
    client = Client.on(tmp_path)
    for address in ("/", f"/run/{key_of(folder)}", "/tokens"):
        check_studio_page(client.get(address).text)
    mark = quote('"><script>alert(1)</script>')
    hostile = f"/tokens?data_path={mark}&base_model={mark}&template={mark}&show={mark}&page={mark}"
    check_studio_page(client.get(hostile).text)
    check_studio_page(client.get("/run/%3Cscript%3E").text)


def test_a_run_of_100_000_steps_and_many_runs_answer_in_time(tmp_path: Path) -> None:
    long = run_folder(tmp_path / "long", steps=100_000, every=200)
    for number in range(20):
        run_folder(tmp_path / f"run{number}", steps=200)
    client = Client.on(tmp_path)
    for address in (f"/run/{key_of(long)}", "/", f"/run/{key_of(long)}", "/"):
        began = time.process_time()
        assert client.get(address).status == 200
        last = time.process_time() - began
    assert last < 0.3
    began = time.process_time()
    client.get(f"/run/{key_of(long)}")
    assert time.process_time() - began < 0.3


def test_what_changes_comes_as_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yeonma.studio.studio_app.POLL_SECONDS", 0.01)
    folder = run_folder(tmp_path / "titles", steps=5)
    client = Client.on(tmp_path)

    async def listen() -> list[dict[str, str]]:
        stream = _changes(client.studio, folder)
        events = [json.loads((await anext(stream)).removeprefix("data: "))]
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(step_line(6))
        events.append(json.loads((await anext(stream)).removeprefix("data: ")))
        assert client.studio.streams == 1
        client.studio.ending = lambda: True
        assert [part async for part in stream] == []
        return events

    first, second = asyncio.run(listen())
    assert set(first) == {"state", "facts", "controls", "charts", "log"}
    assert set(second) == {"facts", "charts"} and "step 6 of 20" in second["facts"]
    assert client.studio.streams == 0


def test_a_problem_of_a_request_is_said_on_the_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "titles", trust_remote_code=True)
    answer = Client.on(tmp_path).ask("POST", f"/run/{key_of(folder)}/resume")
    assert answer.status == 409 and "--allow_code" in answer.text and 'role="alert"' in answer.text


def test_choices_of_the_form_are_bounded() -> None:
    choice = TokenChoice.of({"cutoff_len": "9" * 11, "page": "-3", "show": "x", "objective": "y"})
    assert (choice.cutoff_len, choice.page, choice.show, choice.objective) == (1_000_000, 1, "all", "sft")
    assert TokenChoice.of({"cutoff_len": "\u0663", "page": "0"}) == TokenChoice()


def test_a_file_is_shown_with_its_columns_labels_and_oddities(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}\u200b", "label": "yes" if number % 3 else "no"} for number in range(30)]
    lines = [json.dumps(row) for row in [*rows, rows[0], {"text": "", "label": None}]] + ["nonsense"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    text = Client.on(tmp_path).get("/data?data_path=rows.jsonl&template=title").text
    assert "33 rows, which is all." in text and "1 row cannot be read" in text and "1 row repeat" in text
    assert "The values of label look like labels: yes 20, no 11" in text
    assert '<th scope="row">text</th><td>31</td><td>30</td><td>7</td><td>7</td><td>31</td>' in text
    assert "row 0\\u200b" in text  # the invisible character is seen
    assert "/tokens?data_path=rows.jsonl&amp;template=title&amp;objective=sft" in text
    check_studio_page(text)


def test_a_file_in_another_encoding_is_read_as_chosen(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("글;제목\n강을 끼고;열차\n".encode("cp949"))
    client = Client.on(tmp_path)
    assert "--encoding cp949" in client.get("/data?data_path=rows.csv").text
    text = client.get("/data?data_path=rows.csv&encoding=cp949&delimiter=%3B").text
    assert "강을 끼고" in text and "encoding=cp949&amp;delimiter=%3B" in text
    check_studio_page(text)


def test_rows_of_others_stay_text(tmp_path: Path) -> None:
    name = f"{NAME.replace('/', '_')}.jsonl"
    rows = [{"prompt": TEXT, "completion": NAME, "<b>": [TEXT], "n": {"a": NAME}}, {"prompt": 3}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / name).write_text(json.dumps(rows[0]) + "\n")
    client = Client.on(tmp_path)
    check_studio_page(client.get("/data?data_path=rows.jsonl").text)
    check_studio_page(client.get(f"/data?data_path={quote(name)}").text)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x.jsonl", "missing.jsonl", "some/hub-set", "sample:none", "."]
)
def test_only_files_below_the_roots_are_read(tmp_path: Path, path: str) -> None:
    text = Client.on(tmp_path).get(f"/data?data_path={quote(path)}").text
    assert 'role="alert"' in text and "root:" not in text
    check_studio_page(text)


@pytest.mark.slow
def test_rows_are_shown_as_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.runs import articles, model_folder, write_jsonl

    monkeypatch.setenv("YEONMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("yeonma.studio.token_views.FIRST_SECONDS", 60.0)
    model_folder(tmp_path / "base")
    rows = articles(25)
    rows[3]["document"] = "<script>alert(1)</script> " + "storm " * 60
    rows[4]["title"] = "x" * 400
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "short.txt").write_text("{document}\n{title}")
    client = Client.on(tmp_path)
    address = "/tokens?data_path=rows.jsonl&template=short.txt&base_model=base&cutoff_len=200"
    try:
        text = client.get(address).text
        assert (
            "page 1 of 3, 25 rows" in text
            and text.count("<h2>row ") + text.count('<h2 class="left-out">row ') == 10
        )
        check_studio_page(text)
        for show, rows_shown in (("left_out", "1 row"), ("shortened", "1 row"), ("longest", "24 rows")):
            shown = client.get(f"{address}&show={show}").text
            assert f"page 1 of {3 if show == 'longest' else 1}, {rows_shown}" in shown, show
            check_studio_page(shown)
        assert "page 3 of 3" in client.get(f"{address}&page=3").text
        missing = client.get("/tokens?data_path=rows.jsonl&template=alpaca&base_model=base").text
        assert 'role="alert"' in missing and "instruction" in missing
        outside = client.get("/tokens?data_path=/etc/passwd&template=title&base_model=base").text
        assert "outside of the folders" in outside
    finally:
        client.studio.views.close()
