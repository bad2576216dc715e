"""The text of a file, plain or compressed, streamed as lines or chunks. Wrong bytes get a place and a suggestion."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from yeonma.errors import Problem, UserError
from yeonma.messages import tr

CHUNK = 1 << 18  # characters, or bytes where bytes are read
NUL, BOM = "\0", "\ufeff"
# Joined files leave a byte order mark at the beginning of a line. Within a text it is an invisible space, which gives a
# warning later.
_STRAY = re.compile(f"{NUL}|(?:\\A|(?<=[\n\r])){BOM}")
WRITE_AGAIN = tr("write the file again")
COMPRESSIONS = (".gz", ".zst")
"""Endings of compressed text files, after the ending of the text: `rows.jsonl.gz`."""


@dataclass(frozen=True)
class TextFile:
    """A text file, compressed or not. `name`: what messages call it; `encoding`: never guessed."""

    path: Path
    name: str
    encoding: str

    def lines(self) -> Iterator[str]:
        """The lines with their line ends, without a byte order mark at the start.

        Raises UserError for bytes that are not text, a NUL, a later byte order mark, and damaged compression.
        """
        with self._opened() as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(BOM)
                if NUL in line or (not line.isascii() and line[0] == BOM):
                    raise UserError([self.stray_character(line, number, 1)])
                yield line

    def raw_lines(self) -> Iterator[str]:
        """Like `lines`, without the search for NUL and byte order marks."""
        with self._opened() as file:
            for line in file:
                yield line.removeprefix(BOM)
                break
            yield from file

    def chunks(self) -> Iterator[str]:
        """The text in pieces of CHUNK characters. Raises UserError for wrong bytes and damaged compression."""
        with self._opened() as file:
            yield file.read(CHUNK).removeprefix(BOM)
            while chunk := file.read(CHUNK):
                yield chunk

    def check(self, text: str, line: int, column: int) -> None:
        """Raises UserError for a NUL or a byte order mark in `text`, which begins at `line` and `column`."""
        if (NUL in text or BOM in text) and _STRAY.search(text):
            raise UserError([self.stray_character(text, line, column)])

    def stray_character(self, text: str, line: int, column: int) -> Problem:
        """The first NUL or byte order mark of `text`, which begins at `line` and `column`."""
        match = _STRAY.search(text)
        assert match is not None
        line, column = place_after(line, column, text[: match.start()])
        place = f"{self.name}:{line}:{column}"
        if match[0] == BOM:
            cure = tr("remove it; joining files leaves such marks")
            return Problem(tr("a byte order mark (U+FEFF) in the middle of the file"), place, cure)
        suggestion = self._unicode_suggestion()
        cure = (
            tr("if that is the file's encoding, give {suggestion}", suggestion=suggestion)
            if suggestion
            else tr("remove it")
        )
        return Problem(tr("a NUL character (U+0000)"), place, cure)

    @contextmanager
    def _opened(self) -> Iterator[TextIO]:
        try:
            if self.path.suffix.lower() not in COMPRESSIONS:
                with self.path.open(encoding=self.encoding, newline="") as file:
                    yield file
            else:
                with (
                    self._bytes() as content,
                    io.TextIOWrapper(content, encoding=self.encoding, newline="") as unpacked,
                ):
                    yield unpacked
        except UnicodeError:
            raise UserError([self._wrong_bytes()]) from None

    @contextmanager
    def _bytes(self) -> Iterator[BinaryIO]:
        """The bytes of the text, unpacked as they are read."""
        ending = self.path.suffix.lower()
        if ending not in COMPRESSIONS:
            with self.path.open("rb") as file:
                yield file
            return
        try:
            with _unpacked(self.path, ending) as file:
                yield file
        except (EOFError, OSError, zlib.error) as error:
            problem = tr(
                "a damaged {ending} file: {error}", ending=ending, error=" ".join(str(error).split())
            )
            raise UserError(problem, place=self.name, cure=WRITE_AGAIN) from None

    def _wrong_bytes(self) -> Problem:
        """The place of the first bytes that are not text in the encoding. Reads again; errors may be slow."""
        codec = (
            "utf-8-sig" if self.encoding == "utf-8" else self.encoding
        )  # columns count from behind the mark
        decoder = codecs.getincrementaldecoder(codec)()
        line, column, offset = 1, 1, 0
        with self._bytes() as file:
            while chunk := file.read(CHUNK):
                state = decoder.getstate()
                try:
                    line, column = place_after(line, column, decoder.decode(chunk))
                except UnicodeError:
                    break
                offset += len(chunk)
        if not chunk:
            problem = tr(
                "the file ends inside a {encoding} character: its last line is truncated",
                encoding=self.encoding,
            )
            return Problem(problem, f"{self.name}:{line}:{column}", WRITE_AGAIN)
        decoder.setstate(state)
        for byte in chunk:
            try:
                line, column = place_after(line, column, decoder.decode(bytes([byte])))
            except UnicodeError:
                break
            offset += 1
        problem, cure = tr("not {encoding} text", encoding=self.encoding), self._encoding_cure(offset)
        return Problem(problem, f"{self.name}:{line}:{column}", cure)

    def _encoding_cure(self, offset: int) -> str:
        """A suggestion for `--encoding`. Only a message guesses the encoding; reading never does."""
        suggestion = self._unicode_suggestion()
        with self._bytes() as file:
            for start in range(0, max(offset - 1000, 0), CHUNK):
                file.read(min(CHUNK, offset - 1000 - start))
            before, after = file.read(min(offset, 1000)), file.read(1000)
        line = before[before.rfind(b"\n") + 1 :] + after.split(b"\n")[0]
        for candidate in ("utf-8", "cp949"):
            text = line.decode(candidate, "replace")
            korean = sum("가" <= character <= "힣" for character in text)
            if not suggestion and candidate != self.encoding and korean > 10 * text.count("\ufffd"):
                suggestion = f"--encoding {candidate}"
        if suggestion:
            return tr("if that is the file's encoding, give {suggestion}", suggestion=suggestion)
        return tr("give the file's encoding, such as --encoding cp949, or save it as UTF-8")

    def _unicode_suggestion(self) -> str:
        """The option for UTF-16 or UTF-32 if the file's first bytes look like it, else an empty string."""
        with self._bytes() as file:
            head = file.read(1000)
        if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
            return "--encoding utf-32"
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "--encoding utf-16"
        even, odd = head[::2].count(0), head[1::2].count(0)
        if even + odd <= len(head) // 10:
            return ""
        return "--encoding utf-16-le" if odd > even else "--encoding utf-16-be"


def is_stray(line: str) -> bool:
    """Whether a line has a NUL, or a byte order mark at its beginning."""
    return NUL in line or (not line.isascii() and line[0] == BOM)


def place_after(line: int, column: int, text: str) -> tuple[int, int]:
    """Line and column after `text`, which begins at `line` and `column`."""
    breaks = text.count("\n")
    return (line + breaks, len(text) - text.rfind("\n")) if breaks else (line, column + len(text))


def _unpacked(path: Path, ending: str) -> BinaryIO:
    if ending == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    import pyarrow

    return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))
