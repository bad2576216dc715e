"""Regular expressions of others, matched with bounds of time and memory."""

from __future__ import annotations

from collections.abc import Sequence

from yeonma.bounded.child import MIB, Bounds, OverBounds, Refused, ask
from yeonma.errors import UserError, brief
from yeonma.messages import tr

EXPRESSION = Bounds(seconds=5, memory=256 * MIB, result=MIB)


def bounded_match(
    pattern: str, names: Sequence[str], *, place: str, cure: str = "", bounds: Bounds = EXPRESSION
) -> list[bool]:
    """Whether the expression matches each name whole, as `re.fullmatch` does.

    Raises UserError with `place` if it is no regular expression, or exceeds its bounds.
    """
    try:
        return [found == 1 for found in ask("match", (pattern, list(names)), bounds)]
    except Refused as error:
        problem = tr(
            '"{pattern}" is no regular expression: {error}', pattern=brief(pattern), error=error.args[0]
        )
        raise UserError(problem, place=place, cure=cure or tr("write it as Python's `re` reads it")) from None
    except OverBounds as error:
        problem = tr('the expression "{pattern}" {error}', pattern=brief(pattern), error=error.args[0])
        cure = cure or tr("list the names, or write an expression without repetitions within repetitions")
        raise UserError(problem, place=place, cure=cure) from None
