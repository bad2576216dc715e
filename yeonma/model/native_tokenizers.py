"""Tokenizers whose only vocabulary file is `tokenizer.model` of sentencepiece or tiktoken, or Mistral's `tekken.json`.

A BPE vocabulary of sentencepiece is converted here: transformers 5.23 merges runs of blanks otherwise than the package
sentencepiece does. A conversion counts only if it gives the package's ids for a set of texts, which contain the
vocabulary's own pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.source import BaseSource
from yeonma.model.weight_files import file_of
from yeonma.packages import install
from yeonma.tokenization.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG

SENTENCEPIECE, TEKKEN = "tokenizer.model", "tekken.json"
TRIALS = (
    "",
    " a",
    "two  blanks,   three,    four\n\n\n\tdef f(x):\n        return 1234567 * 12.5\n",
    "월요일에 폭풍이 항구를 닫았다.  서울, 올겨울 첫 영하 ㅋㅋㅋ",
    "naïve café — “quotes” 😀 ½ ﬁ Å 漢字かなカナ",
    "aaaaaaaaaaaaaaaaaaaaaaaa ................ ================",
)
TRIAL_PIECES = 2000
"""How many of the vocabulary's pieces are tried."""
_OTHER_FILES = (TOKENIZER, "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model")


def native_tokenizer_file(source: BaseSource) -> Path | None:
    """The only vocabulary file of the base, if it is one of these two; else None."""
    folder = Path(source.name)
    if folder.is_dir():
        paths = {name: folder / name for name in (*_OTHER_FILES, SENTENCEPIECE, TEKKEN)}
        found = {name: path for name, path in paths.items() if path.is_file()}
    else:
        found = {}
        for name in (TOKENIZER, SENTENCEPIECE, TEKKEN):
            with suppress(UserError, ValueError):
                path = file_of(source, name)
                found |= {} if path is None else {name: path}
            if TOKENIZER in found:
                return None
    if any(name in found for name in _OTHER_FILES):
        return None
    return found.get(TEKKEN) or found.get(SENTENCEPIECE)


def check_tokenizer_package(path: Path) -> None:
    """Raises UserError if the package that reads the file is not installed."""
    package = _package_of(path)
    if find_spec(package) is None:
        on_pypi = package.replace("_", "-")
        what = tr(
            "the tokenizer is this file alone, and the package {on_pypi} is not installed", on_pypi=on_pypi
        )
        raise UserError(what, place=str(path), cure=install(on_pypi))


def _package_of(path: Path) -> str:
    if path.name == TEKKEN:
        return "mistral_common"
    with path.open("rb") as file:
        first = file.readline(200)
    return "tiktoken" if re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n", first) else "sentencepiece"


def read_native_tokenizer(path: Path, tokenizer: Any) -> Any:
    """The tokenizer of the file. `tokenizer`: what transformers makes of it.

    Raises UserError if neither is the tokenizer that the file's own package reads.
    """
    package = _package_of(path)
    if package == "mistral_common":
        return _with_ends(tokenizer, "<s>", "</s>")
    if package == "tiktoken":
        return tokenizer
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(path))
    converted = _converted(pieces)
    if _is_same(converted, pieces):
        return _with_settings(converted, pieces, path.parent / TOKENIZER_CONFIG)
    if _is_same(tokenizer.backend_tokenizer, pieces):
        return tokenizer
    what = tr("the tokenizer is this file alone, and its conversion does not give the ids of sentencepiece")
    raise UserError(what, place=str(path), cure=tr("give a copy of the model with tokenizer.json"))


def _plain(pieces: Any) -> list[int]:
    """The ids of pieces that are text."""
    return [
        number
        for number in range(pieces.get_piece_size())
        if not (pieces.is_control(number) or pieces.is_unknown(number) or pieces.is_byte(number))
    ]


def _tokens_apart(pieces: Any) -> list[str]:
    """Pieces that the package finds in a text before it merges: marks such as `[INST]`.

    They have the score 0, as has the first merge, which the piece of score -1 follows.
    """
    count = pieces.get_piece_size()
    marks = [
        pieces.id_to_piece(number)
        for number in _plain(pieces)
        if pieces.get_score(number) == 0 and not (number + 1 < count and pieces.get_score(number + 1) == -1)
    ]
    return [mark for mark in marks if len(mark) > 1 and pieces.piece_to_id(mark) in pieces.encode(mark)]


def _splits(name: str, names: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that give a piece, in the order of their ids."""
    parts = [(name[:at], name[at:]) for at in range(1, len(name))]
    known = [part for part in parts if part[0] in names and part[1] in names]
    return sorted(known, key=lambda part: (names[part[0]], names[part[1]]))


def _converted(pieces: Any) -> Tokenizer:
    """The vocabulary as one of the package tokenizers: merges in the order of the pieces' scores."""
    count = pieces.get_piece_size()
    names = [pieces.id_to_piece(number) for number in range(count)]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges: list[tuple[float, tuple[str, str]]] = []
    for number in _plain(pieces):
        merges += [(pieces.get_score(number), part) for part in _splits(names[number], vocabulary)]
    merges.sort(key=lambda merge: -merge[0])  # stable: equal scores stay in the order of the pieces
    has_bytes = any(pieces.is_byte(number) for number in range(count))
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [part for _, part in merges],
            unk_token=names[pieces.unk_id()],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    has_prefix = pieces.encode("a", out_type=str)[0].startswith("▁")
    blanks = normalizers.Replace(" ", "▁")
    prefix = normalizers.Prepend("▁")
    tokenizer.normalizer = normalizers.Sequence([prefix, blanks]) if has_prefix else blanks
    parts_of_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*parts_of_text, decoders.Strip(content=" ", left=1)] if has_prefix else parts_of_text
    )
    return tokenizer


def _is_same(tokenizer: Tokenizer, pieces: Any) -> bool:
    """Whether it gives the ids that sentencepiece gives."""
    apart = set(_tokens_apart(pieces))
    names = [pieces.id_to_piece(number) for number in _plain(pieces)]
    plain = [name for name in names if name not in apart]
    some = plain[:: max(1, len(plain) // TRIAL_PIECES)]
    texts = [*TRIALS, " ".join(some).replace("▁", " "), "".join(some).replace("▁", " ")]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return all(one.ids == pieces.encode(text) for one, text in zip(encoded, texts, strict=True))


def _with_settings(tokenizer: Tokenizer, pieces: Any, config_file: Path) -> Any:
    """With the special tokens and the chat template of tokenizer_config.json, or else those of the vocabulary."""
    config: Mapping[str, Any] = {}
    with suppress(OSError, ValueError):
        config = json.loads(config_file.read_text("utf-8"))
    numbers = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    names = {name: pieces.id_to_piece(number) for name, number in numbers.items() if number >= 0}
    names |= {name: text for name in (*numbers, "pad_token") if (text := _text(config.get(name)))}
    added = config.get("added_tokens_decoder")
    for entry in added.values() if isinstance(added, Mapping) else ():
        tokenizer.add_tokens([AddedToken(**entry)])
    every = range(pieces.get_piece_size())
    marks = [pieces.id_to_piece(number) for number in every if pieces.is_control(number)]
    marks += _tokens_apart(pieces)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in marks])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    template = config_file.parent / "chat_template.jinja"
    made.chat_template = config.get("chat_template")
    if template.is_file():
        made.chat_template = template.read_text("utf-8")
    if made.bos_token is not None and config.get("add_bos_token", True):
        _add_start(made)
    return made


def _text(token: Any) -> str | None:
    """The text of a token in tokenizer_config.json, where it may be an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _with_ends(tokenizer: Any, start: str, end: str) -> Any:
    """With start and end tokens of the vocabulary, if it has none."""
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token is None and start in vocabulary and end in vocabulary:
        tokenizer.add_special_tokens({"bos_token": start, "eos_token": end})
        _add_start(tokenizer)
    return tokenizer


def _add_start(tokenizer: Any) -> None:
    start, number = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, number)]
    )
