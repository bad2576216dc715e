"""The text that a judge is asked with: a rubric with places for a question and two answers, and the form of verdicts.

Built-in rubrics are files under `rubrics/`. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from yeonma.config.settings import JudgeSettings
from yeonma.data.template_syntax import normalised
from yeonma.errors import Problem, UserError, did_you_mean, system_reason
from yeonma.evaluate.metrics import is_korean
from yeonma.files import user_path
from yeonma.messages import tr

BUILT_IN = Path(__file__).parent / "rubrics"
NEEDED = ("question", "first", "second")
REFERENCE = "reference"
_PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_FORM = {
    "en": "You are an impartial judge. Reply with one JSON object and nothing else: "
    '{"reason": "...", "verdict": "..."}. The reason is one or two sentences. The verdict is "A" if the first '
    'answer is better, "B" if the second one is, and "tie" if neither is.',
    "ko": "당신은 공정한 판정자입니다. 다른 말 없이 JSON 객체 하나로만 답하세요: "
    '{"reason": "...", "verdict": "..."}. reason은 한두 문장의 이유입니다. 첫 번째 답이 더 나으면 verdict는 "A", '
    '두 번째 답이 더 나으면 "B", 어느 쪽도 더 낫지 않으면 "tie"입니다.',
}
"""The instruction below every rubric, so that a rubric need not speak of JSON. It shows no verdict: a weak judge would
copy it."""


@dataclass(frozen=True)
class Rubric:
    """A rubric's text, checked. Paragraphs are divided by blank lines."""

    name: str
    """`en`, `ko`, or the name of the user's file."""
    text: str

    @property
    def form(self) -> str:
        """What tells the judge in which form to answer, in the language of the rubric."""
        return _FORM["ko" if is_korean([self.text]) else "en"]

    @property
    def shows_reference(self) -> bool:
        return REFERENCE in _PLACE.findall(self.text)

    def filled(self, question: str, first: str, second: str, reference: str | None) -> str:
        """The text with its places filled. Without a reference, paragraphs with `{reference}` are left out. A place
        within what is filled in stays as it is."""
        values = {"question": question, "first": first, "second": second, REFERENCE: reference}
        paragraphs = re.split(r"\n{2,}", self.text)
        if reference is None:
            paragraphs = [part for part in paragraphs if REFERENCE not in _PLACE.findall(part)]

        def value(match: re.Match[str]) -> str:
            return match[0][0] if match[1] is None else str(values[match[1]])

        return _PLACE.sub(value, "\n\n".join(paragraphs))


def rubric_for(settings: JudgeSettings, texts: Iterable[str]) -> Rubric:
    """The user's rubric, or the built-in one for the script of the `texts`. Raises UserError as `read_rubric`."""
    if settings.rubric is not None:
        return read_rubric(settings.rubric)
    name = "ko" if is_korean(texts) else "en"
    return Rubric(name, normalised((BUILT_IN / f"{name}.txt").read_text("utf-8"), name))


def read_rubric(file: str) -> Rubric:
    """Raises UserError for a file that cannot be read, is not UTF-8, lacks a place or has one of another name."""
    path = user_path(file, "--rubric")
    try:
        text = normalised(path.read_bytes().decode("utf-8"), file)
    except OSError as error:
        problem = tr("cannot be read: {strerror}", strerror=system_reason(error))
        cure = tr("give a text file with {places}", places=_written(NEEDED))
        raise UserError(problem, place=f"--rubric {file}", cure=cure) from error
    except UnicodeDecodeError as error:
        raise UserError(
            tr("is not UTF-8"), place=f"--rubric {file}", cure=tr("save the rubric as UTF-8")
        ) from error
    known = (*NEEDED, REFERENCE)
    problems: list[Problem] = []
    found: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        for match in _PLACE.finditer(line):
            name = match[1]
            if name is not None and name not in known:
                cure = did_you_mean(name, known) or tr(
                    "a rubric has {places}; for braces of its own, write {{{{ and }}}}",
                    places=_written(known),
                )
                what = tr("a rubric has no place {{{name}}}", name=name)
                problems.append(Problem(what, f"{file}:{number}", cure))
            found.add(name or "")
    if missing := [name for name in NEEDED if name not in found]:
        what = tr("the rubric lacks {places}", places=_written(missing))
        cure = tr("write them where the judge should read the question and the two answers")
        problems.append(Problem(what, f"--rubric {file}", cure))
    if problems:
        raise UserError(problems)
    return Rubric(path.name, text)


def _written(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
