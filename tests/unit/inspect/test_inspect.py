"""`yeonma inspect` shows what `yeonma sft` trains on, in text, in JSON and as a page, and writes nothing."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.text import Text

from tests.chat_habits import HABITS
from tests.chromium import browser, contrast, in_chromium
from tests.models import tiny_model
from tests.runs import (
    SETTINGS,
    Done,
    arguments,
    articles,
    characters,
    command,
    model_folder,
    trained,
    write_jsonl,
)
from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.adapter.adapter_folder import read_adapter_folder
from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.errors import UserError
from yeonma.inspect.row_views import RowSelection, select_rows
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.example_encoder import encode_prompts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", articles(20))


def inspect(base: Path, data: Path, **settings: object) -> Done:
    return command(
        data.parent, "inspect", *arguments({"base_model": base, "data_path": data, **SETTINGS, **settings})
    )


def json_lines(done: Done) -> list[dict[str, Any]]:
    assert done.status == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_json_has_one_object_per_row_and_then_the_audit(base: Path, data: Path) -> None:
    *rows, last = json_lines(inspect(base, data, json=True, rows="all"))
    keys = ["row", "token_ids", "trained", "prompt", "answer", "cut_characters", "variant", "left_out"]
    assert all(list(row) == keys for row in rows)
    assert [row["row"] for row in rows] == list(range(1, 21))
    assert "audit" in last
    tokenizer = characters()
    for row, article in zip(rows, articles(20), strict=True):
        assert len(row["token_ids"]) == len(row["trained"])
        assert set(row["trained"]) == {0, 1}
        assert row["prompt"] == f"below is an article.\n\n{article['document']}\n\ntitle: "
        assert row["answer"] == article["title"]
        assert tokenizer.decode(row["token_ids"]) == row["prompt"] + row["answer"] + "</s>"
        assert (row["cut_characters"], row["variant"], row["left_out"]) == (0, 0, None)


def test_audit_counts_match_training(base: Path, data: Path, tmp_path: Path) -> None:
    settings = {"val_set_size": 4, "cutoff_len": 60, "over_limit": "drop"}
    done = trained(tmp_path / "out", base, data, **settings)
    *rows, last = json_lines(inspect(base, data, json=True, rows="all", **settings))
    used = [row for row in rows if row["left_out"] is None]
    audit = last["audit"]
    assert audit["train"]["rows"] + audit["validation"]["rows"] == len(used) < 20
    assert audit["sources"][0]["left_out"] == 20 - len(used)
    assert audit["steps"] == done.steps[-1]["step"]
    assert audit["trained_tokens_per_epoch"] == sum(step["trained_tokens"] for step in done.steps)
    assert audit["tokens_per_epoch"] == sum(step["tokens"] for step in done.steps)
    details = read_adapter_folder(done.folder).details["trained_on"]
    assert details["trained_tokens"] == audit["trained_tokens_per_epoch"]
    assert details["left_out"] == audit["sources"][0]["left_out"]
    shortened = audit["train"]["shortened"] + audit["validation"]["shortened"]
    assert details["shortened"] == shortened == sum(row["cut_characters"] > 0 for row in rows)


def test_json_is_english_in_every_language(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON is for programs."""
    rows = articles(20)
    rows[1]["title"], rows[4]["document"] = "", "a\u200b"
    data = write_jsonl(tmp_path / "dirty.jsonl", rows)
    settings = {"bad_rows": "skip", "rows": "all", "max_steps": 30, "gpu": "24GB"}
    english = inspect(base, data, json=True, **settings)
    assert "zero-width" in english.out
    monkeypatch.setenv("YEONMA_LANG", "ko")
    korean = inspect(base, data, json=True, **settings)
    assert korean.out == english.out
    assert "작업 공간" in inspect(base, data, **settings).out


def test_bad_rows_are_shown_and_counted_as_in_training(base: Path, tmp_path: Path) -> None:
    rows = articles(20)
    rows[1]["title"], rows[4]["document"], rows[12]["title"] = "", " ", ""
    data = write_jsonl(tmp_path / "dirty.jsonl", rows)
    with data.open("a") as file:
        file.write("no json\n")
    assert inspect(base, data).status == 2
    *views, last = json_lines(inspect(base, data, json=True, rows="all", bad_rows="skip"))
    assert [view["row"] for view in views] == list(range(1, 22))
    empty, cannot = 'field "title" is empty', "not JSON: expecting value"
    reasons = {2: empty, 5: 'field "document" is empty', 13: empty, 21: cannot}
    assert {view["row"]: view["left_out"] for view in views if view["left_out"] is not None} == reasons
    assert all(not view["token_ids"] and not view["prompt"] for view in views if view["row"] in reasons)
    (source,) = last["audit"]["sources"]
    assert (source["rows"], source["left_out"]) == (21, 4)
    assert [(fault["what"], fault["count"], fault["rows"]) for fault in source["bad_rows"]] == [
        (empty, 2, [2, 13]),
        ('field "document" is empty', 1, [5]),
        (cannot, 1, [21]),
    ]
    shown = inspect(base, data, bad_rows="skip", rows="13").out
    assert f"row 13 · {data}:13 · left out: {empty}" in shown
    assert f"bad rows, {empty}: 2 (rows 2, 13)" in shown
    done = trained(tmp_path / "out", base, data, bad_rows="skip")
    details = read_adapter_folder(done.folder).details["trained_on"]
    assert (details["examples"], details["left_out"]) == (17, 4)
    assert details["bad_rows"] == {fault["what"]: fault["count"] for fault in source["bad_rows"]}
    card = (done.folder / "README.md").read_text()
    assert f"Bad rows among those left out:\n\n- `{empty}`: 2\n- `field" in card
    assert f"{data}: bad rows left out, {empty}: 2 (rows 2, 13)" in done.out
    trained_rows = [
        row
        for line in (done.folder / "trained_rows.jsonl").read_text().splitlines()
        for row in json.loads(line)["rows"]
    ]
    assert set(trained_rows) == set(range(1, 22)) - set(reasons)


def test_nothing_is_written_and_no_weights_are_read(base: Path, data: Path, tmp_path: Path) -> None:
    nan_base = tmp_path / "blind"
    nan_base.mkdir()
    for path in base.iterdir():
        content = path.read_bytes()
        if path.name == "model.safetensors":  # the same header and length, but every value is NaN
            size = 8 + int.from_bytes(content[:8], "little")
            content = content[:size] + b"\xff" * (len(content) - size)
        (nan_base / path.name).write_bytes(content)
    before = sorted(data.parent.rglob("*"))
    assert inspect(nan_base, data, output_dir=tmp_path / "out").status == 0
    assert sorted(data.parent.rglob("*")) == before


def test_inspect_accepts_and_checks_the_arguments_of_sft(base: Path, data: Path, tmp_path: Path) -> None:
    settings = {"base_model": base, "data_path": data, "output_dir": tmp_path / "out", **SETTINGS}
    assert command(tmp_path, "inspect", *arguments(settings)).status == 0
    refused = command(tmp_path, "inspect", *arguments({**settings, "output_dir": base}))
    assert (refused.status, "folder of the base model" in refused.err) == (2, True)
    missing = command(tmp_path, "inspect")
    assert missing.status == 2
    assert "base_model" in missing.err
    assert "output_dir" not in missing.err


def test_inspect_reports_the_same_errors_as_sft(base: Path, data: Path, tmp_path: Path) -> None:
    rows = articles(5)
    rows[1]["title"], rows[3]["document"] = "", " "
    bad = write_jsonl(tmp_path / "bad.jsonl", rows)
    settings = {"base_model": base, "data_path": bad, "output_dir": tmp_path / "out", **SETTINGS}
    shown, refused = (command(tmp_path, verb, *arguments(settings)) for verb in ("inspect", "sft"))
    assert shown.status == refused.status == 2
    assert shown.err.removeprefix("yeonma: tokenised 5 rows\n") == refused.err
    assert "bad.jsonl:2" in shown.err
    assert "bad.jsonl:4" in shown.err


def test_invalid_adapter_folder_is_reported(base: Path, data: Path) -> None:
    done = inspect(base, data, adapter=base)
    assert (done.status, "adapter_config.json" in done.err or "yeonma.json" in done.err) == (2, True)
    assert "Traceback" not in done.err


def test_text_output_without_colour_marks_the_trained_answer(base: Path, data: Path) -> None:
    rows = articles(20)
    done = inspect(base, data, rows="2")
    assert f"{rows[1]['document']}\n\ntitle: «{rows[1]['title']}</s>»" in done.out
    assert f"── row 2 · {data}:2 · " in done.out
    assert "row 1 ·" not in done.out
    assert "20 rows read, none left out" in done.out


def test_cut_text_is_shown_at_its_position(base: Path, data: Path) -> None:
    rows = articles(20)
    longest_row = max(range(20), key=lambda number: len(rows[number]["document"]))
    document = rows[longest_row]["document"]
    done = inspect(base, data, rows=str(longest_row + 1), cutoff_len=90, shrink_side="start")
    match = re.search(r"⟨(\d+) characters cut: (.*?)⟩(.*)\n", done.out)
    assert match is not None
    assert match[2] + match[3] == document
    assert len(match[2]) == int(match[1])
    assert f"{match[1]} characters cut from document" in done.out


def test_tokens_are_listed_with_ids(base: Path, data: Path) -> None:
    done = inspect(base, data, rows="1", tokens=True)
    (row, _) = json_lines(inspect(base, data, rows="1", json=True))
    listed = [line.split() for line in done.out.splitlines() if re.match(r" *\d+ +\d+ ", line)]
    assert [int(words[1]) for words in listed] == row["token_ids"]
    assert [int(words[-1] == "trained") for words in listed] == row["trained"]


def test_validation_rows_are_marked(base: Path, data: Path) -> None:
    done = inspect(base, data, rows="all", val_set_size=5)
    assert sum(line.endswith("· validation ──") for line in done.out.splitlines()) == 5
    assert "validation: 5 rows" in done.out


def test_control_characters_do_not_reach_the_terminal(base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"document": "a \x1b[31m b\u200b", "title": "c\rd"}])
    done = inspect(base, data, base_model=base)
    assert "\x1b" not in done.out
    assert "⟨U+001B⟩" in done.out or "<unk>" in done.out


def test_html_page_matches_json_and_fetches_nothing(base: Path, tmp_path: Path) -> None:
    rows = articles(6)
    rows[0]["document"] += " <script>alert(1)</script>"
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    page = tmp_path / "page.html"
    done = inspect(base, data, rows="1-2", html=page)
    assert done.status == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<script>") == 1
    assert not re.search(r"(src|href)=", text)
    (first, second, _) = json_lines(inspect(base, data, rows="1-2", json=True))
    for shown, row in zip(re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)[:2], (first, second), strict=True):
        ids = re.findall(r'title="(\d+) ', shown)
        assert [int(number) for number in ids] == row["token_ids"]
        plain = unescape(re.sub(r"<[^>]*>", "", shown))
        assert plain == characters().decode(row["token_ids"])
        answer = "".join(
            unescape(part) for part in re.findall(r'<span class="t answer"[^>]*>(.*?)</span>', shown)
        )
        assert answer == row["answer"]
    assert list(tmp_path.glob(".*")) == []
    second_page = tmp_path / "beside.html"
    html_and_json = inspect(base, data, rows="1-2", html=second_page, json=True)
    assert json_lines(html_and_json)[:2] == [first, second]
    assert without_measurements(second_page.read_text(encoding="utf-8")) == without_measurements(text)
    verdict = r"needs [\d.]+ [GM]B of [\d.]+ [GM]B on cpu: fits; (about \d+|under 1)"
    assert re.search(rf'</h1>\n<p class="verdict">{verdict}', text)


KOREAN_ROWS = [
    {
        "document": f"{number}번째 기사입니다. " + "항구에 폭풍이 불어 배가 모두 멈추었다. " * 3,
        "title": "폭풍에 멈춘 항구",
    }
    for number in range(12)
]


@pytest.mark.parametrize("width", [80, 50])
def test_a_terminal_breaks_no_line_within_a_word(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    folder = tmp_path / "한국어 자료가 들어 있는 폴더"
    folder.mkdir()
    data = write_jsonl(folder / "기사와 제목.jsonl", KOREAN_ROWS)
    settings = {"rows": "none", "val_set_size": 3, "template": "{document}\n\n{title}", "device": "cpu"}
    whole = inspect(base, data, **settings)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    done = inspect(base, data, **settings)
    assert (whole.status, done.status) == (0, 0), done.err
    lines = Text.from_ansi(done.out).plain.split("\n")
    assert [line for line in lines if cell_len(line) > width and "█" not in line] == []
    words = {word for line in whole.out.split("\n") for word in line.split()}
    words |= {"under", "about"}  # the two runs may have measured times on either side of a second
    broken = [word for line in lines for word in line.split() if word not in words and "█" not in word]
    assert [word for word in broken if not re.search(r"\d", word) and str(tmp_path) not in word] == []
    assert max(map(cell_len, whole.out.split("\n"))) > width  # a file or a pipe gets whole lines


def without_measurements(page: str) -> str:
    """A page without its forecast, which has measured numbers."""
    return re.sub(r'<p class="verdict">.*</p>', "", page.partition("<h1>Forecast")[0])


CHATML_WITH_TOOLS = next(habit for habit in HABITS if habit.name == "block of special tokens")


def test_reasoning_tools_and_weights_are_marked_in_every_output(tmp_path: Path) -> None:
    base, tokenizer, model = tmp_path / "base", CHATML_WITH_TOOLS.tokenizer(), tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 512
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    turns = [
        {"role": "user", "content": "q", "name": "kim"},
        {"role": "assistant", "content": "first", "weight": 0},
        {"role": "user", "content": "again"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "why",
            "tool_calls": [call],
            "weight": 0.5,
        },
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns, "tools": [tool]}] * 3)
    page = tmp_path / "page.html"
    settings = {"template": "chat", "rows": "1", "cutoff_len": 512}
    shown = inspect(base, data, html=page, **settings)
    assert shown.status == 0, shown.err
    assert "«×0.5 <think>\n⟦reasoning: why⟧\n</think>" in shown.out
    assert '⟦tool call: <tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>⟧<|im_end|>»' in shown.out
    assert "⟦untrained answer: first⟧" in shown.out and "⟦tools: " in shown.out
    assert 'ignores the key "name" of user turns: 3 (rows 1, 2, 3)' in shown.out
    text = page.read_text(encoding="utf-8")
    for kind in ("tools", "untrained", "reasoning trained", "call trained"):
        assert f'<span class="t {kind}"' in text
    assert text.count('<span class="weight">×0.5 </span>') == 1
    (row, _) = json_lines(inspect(base, data, json=True, **settings))
    halves = [weight for weight, trained in zip(row["weights"], row["trained"], strict=True) if trained]
    assert set(halves) == {0.5} and len(row["weights"]) == len(row["token_ids"])


def test_unwritable_html_page_is_reported_before_any_output(base: Path, data: Path, tmp_path: Path) -> None:
    before = data.read_bytes()
    for target, reason in (
        (tmp_path / "no" / "page.html", "no such folder"),
        (tmp_path, "this is a folder"),
        (data, "this is the data file itself"),
    ):
        done = inspect(base, data, html=target)
        assert (done.status, done.out) == (2, "")
        assert f"--html {target}: {reason}" in done.err
    assert data.read_bytes() == before


PAIRS = [
    {
        "prompt": f"{number}. write a title for the harbour.\n",
        "chosen": "storm closes harbour" + " and wind" * (number % 3),
        "rejected": "boats " * (number % 4 + 1) + "wait",
    }
    for number in range(12)
]


def test_shown_pairs_and_audit_match_dpo_training(base: Path, tmp_path: Path) -> None:
    rows = [dict(row) for row in PAIRS]
    rows[4]["rejected"] = rows[4]["chosen"]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    settings = {**SETTINGS, "template": None, "base_model": base, "data_path": data}
    done = command(tmp_path, "dpo", *arguments({**settings, "output_dir": tmp_path / "out"}))
    assert done.status == 0, done.err
    steps = Done(0, tmp_path / "out", "", "").steps
    shown = command(
        tmp_path, "inspect", *arguments({**settings, "objective": "dpo", "json": True, "rows": "all"})
    )
    *views, last = json_lines(shown)
    audit = last["audit"]
    assert [(view["row"], view["role"]) for view in views] == [
        (number, role) for number in range(1, 13) for role in ("chosen", "rejected")
    ]
    for chosen, rejected, row in zip(views[::2], views[1::2], rows, strict=True):
        assert chosen["prompt"] == rejected["prompt"] == row["prompt"]
        assert (chosen["answer"], rejected["answer"]) == (row["chosen"], row["rejected"])
    used = [view for view in views if view["left_out"] is None]
    assert len(used) == 22
    assert audit["train"]["units"] == 11
    assert audit["train"]["trained_tokens"] == sum(sum(view["trained"]) for view in used)
    assert audit["trained_tokens_per_epoch"] == sum(step["trained_tokens"] for step in steps)
    assert audit["steps"] == len(steps)
    assert audit["kind"] == "pairs"
    assert (audit["sources"][0]["left_out"], audit["sources"][0]["identical"]) == (1, 1)
    lengths = [(sum(a["trained"]), sum(b["trained"])) for a, b in zip(used[::2], used[1::2], strict=True)]
    bias = audit["train"]["bias"]
    assert bias["chosen_longer"] == sum(chosen > rejected for chosen, rejected in lengths)
    assert bias["rejected_longer"] == sum(chosen < rejected for chosen, rejected in lengths)
    assert bias["chosen_mean"] == pytest.approx(np.mean([chosen for chosen, _ in lengths]))


def test_pair_shows_its_prompt_once_and_warns_of_length_bias(base: Path, tmp_path: Path) -> None:
    rows = [{**row, "rejected": row["chosen"] + " and on and on"} for row in PAIRS]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    done = inspect(base, data, template=None, objective="dpo", rows="2")
    assert done.out.count(rows[1]["prompt"].strip()) == 1
    assert f"«{rows[1]['chosen']}</s>»" in done.out
    assert f"\n«{rows[1]['rejected']}</s>»" in done.out
    assert "the rejected one in 100%" in done.out
    assert "a model can learn length alone from this" in done.out


def test_labelled_answers_are_shown_with_their_labels(base: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{number}. a title?\n", "completion": f"title {number}", "label": number % 2 == 0}
        for number in range(6)
    ]
    data = write_jsonl(tmp_path / "labelled.jsonl", rows)
    done = inspect(base, data, template=None, objective="dpo", loss="kto", json=True, rows="all")
    *views, last = json_lines(done)
    assert [view["role"] for view in views] == ["desirable", "undesirable"] * 3
    assert last["audit"]["train"]["examples"] == 6
    assert last["audit"]["train"]["bias"] is None
    assert last["audit"]["train"]["tokens"] == sum(len(view["token_ids"]) for view in views)


@in_chromium
def test_html_page_fits_a_phone_and_has_contrast_in_both_themes(base: Path, tmp_path: Path) -> None:
    rows = [*articles(19), {"document": "x" * 400, "title": "storm"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    page = tmp_path / "page.html"
    assert inspect(base, data, rows="18-20", cutoff_len=120, html=page, val_set_size=4).status == 0
    with browser(tmp_path / "profile") as tab:
        for width, dark in ((390, False), (390, True), (1100, False), (1100, True)):
            tab.look(width, 740, dark=dark)
            tab.open(page)
            assert tab.run("document.documentElement.scrollWidth") == width
            texts = "h1, h2, pre, pre span, caption, td, .legend span, label"
            colours = tab.run(
                f"[...document.querySelectorAll('{texts}')].map(e => [getComputedStyle(e).color, "
                "[getComputedStyle(e), getComputedStyle(document.body)].map(s => s.backgroundColor)"
                ".find(c => c !== 'rgba(0, 0, 0, 0)')])"
            )
            assert len(colours) > 20
            assert min(contrast(*pair) for pair in colours) >= 4.5
            assert tab.problems == []


@pytest.mark.parametrize(
    ("rows", "numbers"),
    [(None, {1, 2, 3}), ("17,40", {17, 40}), (" 5 - 7 , 2", {2, 5, 6, 7}), ("none", set()), ("100", {100})],
)
def test_rows_option_selects_rows_by_number(rows: str | None, numbers: set[int]) -> None:
    assert select_rows(rows, 100) == RowSelection(frozenset(numbers))
    assert 17 in select_rows("all", 100)


@pytest.mark.parametrize("rows", ["0", "101", "a", "", "3-2", "1,,2", "-1", "99-101"])
def test_invalid_row_numbers_are_refused(rows: str) -> None:
    with pytest.raises(UserError, match="no row"):
        select_rows(rows, 100)


LONG = [
    {
        "document": " ".join(
            f"{word} 폭풍이 항구를 닫았고 {number}" for word in ("storm", "library", "배 마흔 척이") * 12
        ),
        "title": f"제목 {number} " + "harbour " * (number % 5 + 1),
    }
    for number in range(12)
]


@pytest.mark.parametrize("side", ["end", "start", "middle"])
@pytest.mark.parametrize("make_tokenizer", [byte_level, sentencepiece_bpe, unigram])
@pytest.mark.parametrize(
    "template",
    [
        load_template("title"),
        Template.parse("[system]\nWrite.\n[user]\n본문: {document}\n!\n[assistant]\n{title}\n"),
    ],
    ids=["plain", "turns"],
)
def test_long_articles_keep_template_text_and_answer_whole(
    base: Path, tmp_path: Path, template: Template, make_tokenizer: Any, side: str
) -> None:
    """Generation with the answer's length as its budget uses the prompts of training."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 700}))
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    data = write_jsonl(tmp_path / "rows.jsonl", LONG)
    cutoff_len = 200
    settings = {"template": template.text, "cutoff_len": cutoff_len, "shrink_side": side}
    *rows, last = json_lines(inspect(folder, data, json=True, rows="all", **settings))
    assert len(rows) == len(LONG)
    template_texts = [
        piece.text for turn in template.variants[0].turns for piece in turn.parts if hasattr(piece, "text")
    ]
    for row, article in zip(rows, LONG, strict=True):
        assert row["left_out"] is None
        assert row["cut_characters"] > 0
        assert len(row["token_ids"]) <= cutoff_len
        assert all(text.strip() in row["prompt"] for text in template_texts)
        assert row["answer"].strip().startswith(article["title"].strip())
        prompt_length = row["trained"].index(1)
        assert all(row["trained"][prompt_length:])
        rules = TokenRules(cutoff_len=cutoff_len, shrink_side=side)  # type: ignore[arg-type]
        rendered = template.render(Row(row["row"], article, "rows:1"), with_answer=False)
        (prompt,) = encode_prompts(
            [rendered],
            [Row(row["row"], article, "rows:1")],
            tokenizer,
            rules,
            len(row["token_ids"]) - prompt_length,
        )
        assert np.array_equal(prompt, row["token_ids"][:prompt_length])
    assert last["audit"]["train"]["shortened"] == len(LONG)
