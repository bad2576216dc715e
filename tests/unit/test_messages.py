"""Messages in the language of help."""

from __future__ import annotations

import ast
import errno
import os
import sys
from pathlib import Path
from string import Formatter

import numpy as np
import pytest
from babel.messages.catalog import Catalog

from scripts.messages import compiled, messages, read, updated, written
from yeonma import errors
from yeonma.errors import system_reason
from yeonma.language import language, speaking
from yeonma.messages import (
    CATALOGUES,
    counted,
    counted_in_english,
    in_english,
    in_every_language,
    tr,
    translated,
)

PATHS = sorted(CATALOGUES.glob("*.po"))
ANSWERS_OF_THE_API = ("json_grammar.py",)
"""What only clients of the server are told, in English."""
PACKAGE = Path(__file__).parents[2] / "yeonma"


def places(text: str) -> set[tuple[str | None, str | None, str | None]]:
    """Names, formats and conversions."""
    return {(name, spec, how) for _, name, spec, how in Formatter().parse(text) if name is not None}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture
def catalogue(path: Path) -> Catalog:
    return read(path)


def test_every_message_of_the_code_has_a_translation_and_no_other_has(catalogue: Catalog) -> None:
    in_code = {message.forms[0] for message in messages()}
    translated_ids = {
        message.id if isinstance(message.id, str) else message.id[0]
        for message in catalogue
        if message.id and message.string and all(message.string)
    }
    assert in_code == translated_ids


def test_translations_have_the_places_of_their_messages(catalogue: Catalog) -> None:
    wrong = []
    for message in catalogue:
        ids = [message.id] if isinstance(message.id, str) else list(message.id)
        strings = [message.string] if isinstance(message.string, str) else list(message.string)
        expected = set().union(*map(places, ids))
        wrong += [text for text in strings if message.id and places(text) != expected]
    assert wrong == []


def test_files_are_up_to_date(path: Path) -> None:
    assert path.read_bytes() == written(updated(read(path))), "run: python scripts/messages.py"
    assert path.with_suffix(".mo").read_bytes() == compiled(read(path)), "run: python scripts/messages.py"


def test_no_error_is_raised_with_a_text_that_no_catalogue_has() -> None:
    """What and cure of a UserError or a Problem are no literals with words in them: those go through `tr`."""
    bare = []
    for module in sorted(PACKAGE.rglob("*.py")):
        if module.name in ANSWERS_OF_THE_API:
            continue
        for node in ast.walk(ast.parse(module.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id not in ("UserError", "Problem"):
                continue
            texts = [
                *node.args[:1],
                *node.args[2:3],
                *(one.value for one in node.keywords if one.arg == "cure"),
            ]
            bare += [
                f"{module.relative_to(PACKAGE)}:{text.lineno}"
                for text in texts
                if isinstance(text, (ast.Constant, ast.JoinedStr)) and has_words(text)
            ]
    assert bare == []


def has_words(text: ast.Constant | ast.JoinedStr) -> bool:
    parts = [text] if isinstance(text, ast.Constant) else text.values
    literal = " ".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
    return len([word for word in literal.split() if word.isalpha() and word.islower()]) > 1


def test_messages_and_numbers_are_said_in_the_language_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def both() -> tuple[str, str, str]:
        rows = counted(3, "row")
        return (
            language(),
            rows,
            tr("With only {rows}, confidence intervals tend to be too narrow.", rows=rows),
        )

    monkeypatch.setenv("YEONMA_LANG", "en")
    english = both()
    monkeypatch.setenv("YEONMA_LANG", "ko")
    korean = both()
    assert english == ("en", "3 rows", "With only 3 rows, confidence intervals tend to be too narrow.")
    assert korean[:2] == ("ko", "3행") and "3행" in korean[2] and "rows" not in korean[2]
    assert in_english(korean[2]) == english[2]
    assert counted_in_english(3, "row") == "3 rows"
    assert counted(np.int64(3), "row") == "3행"
    assert translated(english[2]) == korean[2]
    assert (
        in_every_language("With only {rows}, confidence intervals tend to be too narrow.", rows="3 rows")[0]
        == (english[2])
    )


def test_a_block_speaks_a_language_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YEONMA_LANG", "ko")
    rows = counted(3, "row")
    with speaking("en"):
        assert (language(), counted(3, "row"), tr("all {count} settings", count=rows)) == (
            "en",
            "3 rows",
            "all 3 rows settings",  # of a message that was made before
        )
        with speaking("ko"):
            assert counted(3, "row") == rows
        assert language() == "en"
    assert (language(), rows, os.environ["YEONMA_LANG"]) == ("ko", "3행", "ko")


def test_errors_of_the_system_are_said_in_the_language_of_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        (tmp_path / "nothing").read_bytes()
    assert system_reason(raised.value) == "No such file or directory"
    assert system_reason(ValueError("no file")) == system_reason(OSError("no file")) == "no file"
    assert system_reason(errno.ECHILD) == os.strerror(errno.ECHILD)  # an error without a message of ours
    monkeypatch.setenv("YEONMA_LANG", "ko")
    assert system_reason(raised.value) == "그런 파일이나 폴더가 없습니다"
    assert in_english(system_reason(raised.value)) == "No such file or directory"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems use other words")
def test_english_errors_of_the_system_are_those_of_linux() -> None:
    numbers = errors._SYSTEM_REASONS
    assert {number: os.strerror(number) for number in numbers} == numbers
