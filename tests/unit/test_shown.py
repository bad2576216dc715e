"""How text of others is shown: escaped, in every kind of place, and ordinary text unchanged."""

from __future__ import annotations

import ast
import json
import logging
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from unicodedata import category

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import yeonma
from yeonma.config.yaml_text import front_matter, read_items, write_item
from yeonma.data.task import TASKS, Task
from yeonma.errors import MOST_OF_A_MESSAGE, Problem, UserError
from yeonma.messages import counted
from yeonma.shown import (
    MOST_OF_A_LINE,
    GrowingText,
    code,
    code_block,
    has_hidden,
    html,
    indented,
    json_text,
    many_lines,
    markdown,
    one_line,
    shell_word,
    size_text,
    traceback_text,
)
from yeonma.streams import escape_other_libraries, give, log_line

NASTY = "a\x1b[31m\r\nb\u202e\u2066\u200b\ufeff\x9b\x7f\x00\u2028\u2029\x85\udc80\U000e0041`|<b>---"
TEXTS = st.text(st.characters(), max_size=40)
PIECES = st.lists(
    st.sampled_from(
        [*NASTY, "\u200d", "\ufe0f", "👩", "가", "क्", "ष", "1", "*", "_", "[", "]", "(", "&lt;", "\\", "``"]
    )
).map("".join)
ORDINARY = [
    "The storm closed the harbour.",
    "서울의 아침, \u1112\u1161\u11ab글 1,234원 「제목」 한국어\u3000문장\u00a0끝",
    "👨\u200d👩\u200d👧\u200d👦 ❤\ufe0f 1\ufe0f\u20e3 🏳\ufe0f\u200d🌈 👍🏽",
    "نامه\u200cای، क्\u200dष, עברית, ไทย, e\u0301",
    "葛\U000e0100 C:\\new\\x1b path\\name \t tab",
    "data/my_rows_v2.jsonl:41: 3 * 4 < 5, ~/x, a & b, 50% (#1)",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert one_line(text) == many_lines(text) == text
    assert str(Problem(text, text, text)) == f"{text}: {text}; {text}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\r\nb\x1b[0m\x00", "a\\r\\nb\\x1b[0m\\x00"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("제\u200d목", "제\\u200d목"),
        ("a\u200cb\u200d", "a\\u200cb\\u200d"),
        ("x\ufe0f\ufe0f", "x\\ufe0f\\ufe0f"),
        ("가\U000e0101\U000e0041", "가\\U000e0101\\U000e0041"),
        ("\x9b\x85\ud800\ufffe", "\\x9b\\x85\\ud800\\ufffe"),
    ],
)
def test_what_hides_is_shown_by_its_number(text: str, shown: str) -> None:
    assert one_line(text) == shown == one_line(shown)
    assert has_hidden(text) and not has_hidden(shown)


@given(TEXTS | PIECES)
def test_nothing_invisible_is_left_in_any_form(text: str) -> None:
    for shown in (
        one_line(text),
        code(text),
        markdown(text),
        html(text),
        json_text({text: text}),
        shell_word(text),
    ):
        _check(shown)
        assert "\n" not in shown
    _check(many_lines(text).replace("\n", ""))
    assert many_lines(text).count("\n") == text.count("\n")


def _check(shown: str) -> None:
    for char in shown.replace("\t", ""):
        assert category(char) not in ("Cc", "Cs", "Zl", "Zp"), ascii(shown)
        assert not "\u202a" <= char <= "\u202e" and not "\u2066" <= char <= "\u2069", ascii(shown)
        assert char not in "\u200b\u200e\u200f\u061c\ufeff", ascii(shown)


@given(st.lists(PIECES, max_size=5))
def test_a_text_that_grows_is_shown_as_the_whole(pieces: list[str]) -> None:
    growing = GrowingText()
    assert "".join(map(growing.shown, pieces)) + growing.rest() == many_lines("".join(pieces))


@given(TEXTS | PIECES)
def test_json_and_yaml_keep_the_value(text: str) -> None:
    assert json.loads(json_text({text: [text]})) == {text: [text]}
    for value in (text, [text], {"x": text}):
        written = write_item("name", value)
        _check(written.replace("\n", ""))
        if not any("\ud800" <= char <= "\udfff" for char in text):
            ((key, read, _),) = read_items(written, "test")
            assert (key, read) == ("name", value)


@pytest.mark.parametrize(
    "base", [NASTY.replace("\udc80", ""), "a: b", "x\n---\ntags: [evil]", "- x", "null", "1", "'\"#"]
)
def test_front_matter_has_the_keys_that_it_should(base: str) -> None:
    lines = front_matter({"base_model": base, "library_name": "peft", "tags": ["lora", "yeonma"]})
    assert lines[0] == lines[-2] == "---" and "---" not in lines[1:-2]
    assert yaml.safe_load("\n".join(lines[1:-2])) == {
        "base_model": base,
        "library_name": "peft",
        "tags": ["lora", "yeonma"],
    }


def test_front_matter_of_an_ordinary_base_is_plain() -> None:
    about = {"base_model": "org/model-1B", "library_name": "peft", "tags": ["lora", "yeonma"]}
    assert front_matter(about) == [
        *("---", "base_model: org/model-1B", "library_name: peft", "tags: [lora, yeonma]", "---", "")
    ]


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(TEXTS | PIECES)
def test_html_shows_the_escaped_text_and_makes_no_element(text: str) -> None:
    seen = _Seen()
    seen.feed(f"<p>{html(text)}</p>")
    seen.close()
    assert seen.tags == ["p"] and seen.text == one_line(text)


@given(TEXTS | PIECES)
def test_no_text_ends_its_code_in_markdown(text: str) -> None:
    fence, *inside, end = "\n".join(code_block(text)).split("\n")
    assert fence == f"{end}text" and set(end) == {"`"} and len(end) >= 3
    assert not any(end in line for line in inside)
    inline = code(text)
    marks = len(inline) - len(inline.lstrip("`"))
    assert inline.endswith("`" * marks) and "`" * marks not in inline[marks:-marks]
    assert all(cell.endswith("\\") for cell in code(text, in_table=True).split("|")[:-1])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[x](http://y) ![z](q)", "\\[x\\](http://y) !\\[z\\](q)"),
        ("<script>x</script> &lt;", "&lt;script>x&lt;/script> &amp;lt;"),
        ("**a** _b_ `c` ~~d~~ e|f \\[", "\\*\\*a\\*\\* \\_b\\_ \\`c\\` \\~~d\\~~ e\\|f \\\\\\["),
        ("my_model-v2 (rank 8), q_proj: 3 * 4 < 5.", "my_model-v2 (rank 8), q_proj: 3 * 4 &lt; 5."),
    ],
)
def test_markdown_has_no_marks_of_the_text(text: str, shown: str) -> None:
    assert markdown(text) == shown


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    "word", ["a b", "it's", "\x1b[31m\nx\u202e'\\n'\r\t", "한\u200b글\x9b", "\udc80\udcff"]
)
def test_a_shell_reads_the_word_back(word: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"printf %s {shell_word(word)}"],
        capture_output=True,
        check=True,
        env={"LC_ALL": "C.UTF-8"},
    )
    assert done.stdout.decode("utf-8", "surrogateescape") == word


# messages


@pytest.mark.parametrize("unit", ["x", "\x1b", "가", "\n"])
def test_no_message_is_long(unit: str) -> None:
    huge = unit * 1_000_000
    error = UserError([Problem(huge, huge, huge)] * 50_000)
    printed = StringIO()
    with redirect_stderr(printed):
        for line in str(error).split("\n"):
            log_line(line)
        log_line(huge)
    assert len(str(error)) < MOST_OF_A_MESSAGE
    *lines, log = printed.getvalue().splitlines()
    assert sum(len(line) + 1 for line in lines) <= MOST_OF_A_MESSAGE
    assert lines[-1].endswith(f"... and {50_000 - len(lines) + 1:,} more problems") and len(lines) > 5
    assert len(log) <= MOST_OF_A_LINE + len("yeonma: ")


def test_a_long_name_stays_recognisable() -> None:
    name = f"data/{'n' * 4000}.jsonl"
    text = str(Problem("no such file", name, "check the path"))
    assert len(text) < 600
    assert text.startswith("data/nnn") and f"[... {len(name):,} characters ...]" in text
    assert text.endswith("nnn.jsonl: no such file; check the path")


def test_all_of_a_few_problems_are_told() -> None:
    problems = [Problem(f"problem {number}", f"rows.jsonl:{number}", "fix it") for number in range(200)]
    assert str(UserError(problems)) == "\n".join(map(str, problems))


# the ways out


def test_only_one_module_writes_on_the_terminal() -> None:
    """No other calls print or writes to a standard stream; rich's consoles, which escape, are in these modules."""
    consoles = {"inspect/terminal.py", "evaluate/report.py", "run_folder/progress.py"}
    consoles |= {"evaluate/eval_part.py"}  # beside the report, of which it is a part
    consoles |= {"python_api/results.py"}  # whose console writes into memory
    own = {"streams.py", "commands/chat.py", "commands/generate.py"}
    package = Path(yeonma.__file__).parent
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called == "print":
                assert name == "streams.py", f"{name}:{node.lineno}"
            if called in ("sys.stdout.write", "sys.stderr.write"):
                assert name in own or "traceback_text" in ast.unparse(node), f"{name}:{node.lineno}"
            if called.endswith(("console.print", "console.out")):
                assert name in consoles, f"{name}:{node.lineno}"


class _Screen(StringIO):
    def isatty(self) -> bool:
        return True


def test_an_answer_is_escaped_on_a_terminal_and_exact_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((StringIO(), NASTY), (_Screen(), many_lines(NASTY))):
        monkeypatch.setattr(sys, "stdout", stream)
        give(NASTY)
        assert stream.getvalue() == shown


def test_warnings_logs_and_tracebacks_of_libraries_are_escaped() -> None:
    escape_other_libraries()
    escape_other_libraries()
    said = f"odd\nyeonma: done {NASTY}"
    texts = [warnings.formatwarning(said, UserWarning, "x\x1b.py", 1, "")]
    handler = logging.StreamHandler(StringIO())
    logger = logging.getLogger("yeonma.test")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        try:
            raise ValueError(said)
        except ValueError as error:
            logger.error("%s failed, %s", said, {"x": 1}, exc_info=error)
            texts.append(traceback_text(error))
        logger.error("as it is: %s", "한글 👍🏽")
    finally:
        logger.removeHandler(handler)
    texts.append(handler.stream.getvalue())
    for text in texts:
        assert "odd" in text and "\\x1b[31m" in text
        assert not any(line.startswith("yeonma:") for line in text.splitlines())
        _check(text.replace("\n", ""))
    assert texts[-1].count("ValueError: odd") == 1 and "as it is: 한글 👍🏽\n" in texts[-1]


def test_indented_lines_of_others() -> None:
    assert indented("a") == "a"
    assert indented("a\nb\n  c\n") == "a\n  b\n  c\n"


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (0, ("row",), "0 rows"),
        (1, ("row",), "1 row"),
        (1200, ("row",), "1,200 rows"),
        (1, ("process", "processes"), "1 process"),
        (2, ("process", "processes"), "2 processes"),
    ],
)
def test_numbers_stand_with_the_right_form_of_what_they_count(
    number: int, words: tuple[str, ...], expected: str
) -> None:
    assert counted(number, *words) == expected


@pytest.mark.parametrize("task", [TASKS[name] for name in sorted(TASKS)], ids=lambda task: task.name)
def test_units_of_every_task_have_a_singular(task: Task) -> None:
    assert task.units.endswith("s") and not task.units.endswith("ss")


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (999, "999 B"), (1200, "1.2 kB"), (541_600_000, "541.6 MB"), (3e12, "3.0 TB")],
)
def test_sizes_have_a_unit(count: int, expected: str) -> None:
    assert size_text(count) == expected
