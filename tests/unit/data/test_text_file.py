"""Text files, plain or compressed: the same text, the same faults with their places, and damaged compression."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tests.tables import TABLE, Write, error_of, jsonl, values
from yeonma.data.rows import open_rows


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


PACKED: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd}


@pytest.mark.parametrize("packing", PACKED)
def test_compressed_parts_after_one_another_are_one_text(write: Write, packing: str) -> None:
    pack = PACKED[packing]
    content = pack(jsonl(TABLE[:1]).encode()) + pack(jsonl(TABLE[1:]).encode())
    assert values(open_rows(write(f"a.jsonl.{packing}", content))) == TABLE


@pytest.mark.parametrize("packing", PACKED)
def test_compressed_text_is_read_in_the_given_encoding(write: Write, packing: str) -> None:
    path = write(f"a.csv.{packing}", PACKED[packing]("본문,제목\n가나,다라\n".encode("cp949")))
    assert values(open_rows(path, encoding="cp949")) == [{"본문": "가나", "제목": "다라"}]


@pytest.mark.parametrize("packing", PACKED)
def test_faults_in_compressed_text_have_line_column_and_suggestion(write: Write, packing: str) -> None:
    name, pack = f"a.jsonl.{packing}", PACKED[packing]
    assert error_of(write(name, pack(b'{"a": 1}\n{"a": NaN}\n'))).startswith(f"{name}:2:7: NaN is not JSON")
    rows = jsonl(TABLE[:1]).encode() * 2000
    message = error_of(write(name, pack(rows + '{"a": "한국어 글"}\n'.encode("cp949"))))
    assert message == (
        f"{name}:2001:8: not utf-8 text; if that is the file's encoding, give --encoding cp949"
    )
    assert "give --encoding utf-16-le" in error_of(write(name, pack('{"a": 1}\n'.encode("utf-16-le"))))


@pytest.mark.parametrize("packing", PACKED)
def test_damaged_compression_is_an_error(write: Write, packing: str) -> None:
    name = f"a.jsonl.{packing}"
    content = PACKED[packing](jsonl(TABLE).encode() * 100)
    for damaged in (content[: len(content) // 2], b"no such thing", content + b"more of something else"):
        message = error_of(write(name, damaged))
        assert message.startswith(f"{name}: a damaged .{packing} file: ")
        assert message.endswith("; write the file again")


def test_a_plain_file_beside_its_compressed_copy_is_not_read_twice(write: Write, tmp_path: Path) -> None:
    for packing in ("", ".gz"):
        write(f"a.jsonl{packing}", gzip.compress(b"{}") if packing else "{}")
    assert "files of several formats: .jsonl, .jsonl.gz" in error_of(str(tmp_path))


def test_identity_is_that_of_the_file_as_it_lies_on_the_disk(write: Write) -> None:
    plain = open_rows(write("a.jsonl", jsonl(TABLE))).identity
    packed = open_rows(write("a.jsonl.zst", zstd(jsonl(TABLE).encode()))).identity
    assert plain != packed == open_rows(write("b.jsonl.zst", zstd(jsonl(TABLE).encode()))).identity
