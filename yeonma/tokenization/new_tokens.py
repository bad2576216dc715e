"""Tokens that a run adds to the tokenizer: `--new_tokens`, a file with one token a line or a list.

They are ordinary tokens: wherever their text stands, in rows as in prompts, it is this one token, before any other rule
of the tokenizer, and decoding writes it. The tokenizer with them is part of the adapter folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from yeonma.errors import Problem, UserError, brief
from yeonma.files import user_path

PLACE = "new_tokens"
MAX_PROBLEMS = 10
EXAMPLE = "a file with one token a line, or a list such as '[<a>, <b>]'"


def read_new_tokens(setting: Sequence[str] | str | None) -> list[str] | None:
    """The tokens of the setting: those of the list, or the lines of the file as they are, without empty ones.

    Raises UserError for a file that cannot be read, and for tokens that are empty or stand there twice.
    """
    if setting is None:
        return None
    tokens = _lines(setting) if isinstance(setting, str) else list(setting)
    problems = [
        Problem(f'"{brief(token)}" is blank', PLACE, "leave it out") for token in tokens if not token.strip()
    ]
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    problems += [Problem(f'"{brief(token)}" stands there twice', PLACE, "give it once") for token in twice]
    if not tokens:
        problems = [Problem("there are none", PLACE, f"give {EXAMPLE}")]
    _raise_if(problems)
    return tokens


def _lines(name: str) -> list[str]:
    path = user_path(name, PLACE)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"not UTF-8, at byte {error.start + 1}"
        raise UserError(what, place=f"{PLACE} {name}", cure="save it as UTF-8") from None
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", place=f"{PLACE} {name}", cure=f"give {EXAMPLE}"
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
            what = f'"{brief(token)}" is one token already, with the id {found}'
            problems.append(Problem(what, PLACE, "leave it out"))
    _raise_if(problems)
    try:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
        ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        what = f"the model's tokenizer takes no more tokens ({brief(str(error))})"
        raise UserError(what, place=PLACE, cure="leave it out") from error
    for token, number in zip(tokens, ids, strict=True):
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [number]:
            what = (
                f'the model\'s tokenizer does not read "{brief(token)}" as one token, although it was added'
            )
            problems.append(Problem(what, PLACE, "leave it out, or write it otherwise"))
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
        rest = [Problem(f"there are {more} more such tokens", PLACE)] if more > 0 else []
        raise UserError([*problems[:MAX_PROBLEMS], *rest])
