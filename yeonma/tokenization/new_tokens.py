"""Tokens that a run adds to the tokenizer: `--new_tokens`, a file with one token a line or a list.

They are ordinary tokens: wherever their text stands, in rows as in prompts, it is this one token, before any other rule
of the tokenizer, and decoding writes it. The tokenizer with them is part of the adapter folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from yeonma.errors import Problem, UserError, brief, system_reason
from yeonma.files import user_path
from yeonma.messages import tr

PLACE = "new_tokens"
MAX_PROBLEMS = 10
EXAMPLE = tr("a file with one token a line, or a list such as '[<a>, <b>]'")


def read_new_tokens(setting: Sequence[str] | str | None) -> list[str] | None:
    """The tokens of the setting: those of the list, or the lines of the file as they are, without empty ones.

    Raises UserError for a file that cannot be read, and for tokens that are empty or stand there twice.
    """
    if setting is None:
        return None
    tokens = _lines(setting) if isinstance(setting, str) else list(setting)
    problems = [
        Problem(tr('"{token}" is blank', token=brief(token)), PLACE, tr("leave it out"))
        for token in tokens
        if not token.strip()
    ]
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    problems += [
        Problem(tr('"{token}" stands there twice', token=brief(token)), PLACE, tr("give it once"))
        for token in twice
    ]
    if not tokens:
        problems = [Problem(tr("there are none"), PLACE, tr("give {example}", example=EXAMPLE))]
    _raise_if(problems)
    return tokens


def _lines(name: str) -> list[str]:
    path = user_path(name, PLACE)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = tr("not UTF-8, at byte {start}", start=error.start + 1)
        raise UserError(what, place=f"{PLACE} {name}", cure=tr("save it as UTF-8")) from None
    except OSError as error:
        raise UserError(
            tr("cannot be read ({strerror})", strerror=system_reason(error)),
            place=f"{PLACE} {name}",
            cure=tr("give {example}", example=EXAMPLE),
        ) from None
    return [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip()]


def add_new_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Adds the tokens to the tokenizer, in their order. Returns their ids.

    Raises UserError for texts that are one token already, and for a tokenizer that does not take them.
    """
    if not tokens:
        return ()
    problems = []
    for token in tokens:
        if (found := _as_one_token(tokenizer, token)) is not None:
            what = tr('"{token}" is one token already, with the id {found}', token=brief(token), found=found)
            problems.append(Problem(what, PLACE, tr("leave it out")))
    _raise_if(problems)
    try:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
        ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        what = tr("the model's tokenizer takes no more tokens ({error})", error=brief(str(error)))
        raise UserError(what, place=PLACE, cure=tr("leave it out")) from error
    for token, number in zip(tokens, ids, strict=True):
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [number]:
            what = tr(
                'the model\'s tokenizer does not read "{token}" as one token, although it was added',
                token=brief(token),
            )
            problems.append(Problem(what, PLACE, tr("leave it out, or write it otherwise")))
    _raise_if(problems)
    return tuple(ids)


def _as_one_token(tokenizer: Any, token: str) -> int | None:
    """The id of the one token that a text is already; None if it is none or several."""
    known: int | None = tokenizer.get_vocab().get(token)
    if known is not None:
        return known
    ids = list(tokenizer(token, add_special_tokens=False)["input_ids"])
    is_text = len(ids) == 1 and ids[0] != tokenizer.unk_token_id
    return ids[0] if is_text and tokenizer.decode(ids).strip() == token.strip() else None


def _raise_if(problems: Sequence[Problem]) -> None:
    if problems:
        more = len(problems) - MAX_PROBLEMS
        rest = [Problem(tr("there are {more} more such tokens", more=more), PLACE)] if more > 0 else []
        raise UserError([*problems[:MAX_PROBLEMS], *rest])
