"""Random secrets of the forms in secret_shapes.txt, in each place of an adapter folder that holds text.

`python -m tests.secret_shapes` prints how many of them a push finds in each place.
"""

from __future__ import annotations

import json
import random
import re
import string
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from yeonma.errors import UserError
from yeonma.export.hub_push import collect

SHAPES = Path(__file__).with_suffix(".txt")
ALPHABETS = {
    "digit": string.digits,
    "hex": "0123456789abcdef",
    "Hex": string.hexdigits,
    "HEX": "0123456789ABCDEF",
    "hexgh": "0123456789abcdefgh",
    "low": string.digits + string.ascii_lowercase,
    "lowletter": string.ascii_lowercase,
    "up": string.digits + string.ascii_uppercase,
    "base32": "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567",
    "bech": "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L",
    "alnum": string.digits + string.ascii_letters,
}


class Example(NamedTuple):
    """A secret of a rule; `name` stands beside it, or is empty where the secret tells itself."""

    rule: str
    name: str
    value: str

    @property
    def line(self) -> str:
        return f'{self.name} = "{self.value}"' if self.name else self.value


def examples(seed: int) -> list[Example]:
    """One example of each rule."""
    numbers = random.Random(seed)
    found = []
    for line in SHAPES.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            rule, shape = line.split(None, 1)
            name, _, value = (
                shape.rpartition(" = ") if re.match(r"[a-zA-Z_-]+ = ", shape) else ("", "", shape)
            )
            found.append(Example(rule, name, _filled(value.replace("\\n", "\n"), numbers)))
    return found


def _filled(shape: str, numbers: random.Random) -> str:
    def drawn(match: re.Match[str]) -> str:
        base, more, count = match[1], match[2], int(match[3])
        characters = ALPHABETS[base] + more
        text = "".join(numbers.choice(characters) for _ in range(count))
        return _begun(text, ALPHABETS[base], numbers)

    return re.sub(r"\{([A-Za-z0-9]+?)([^A-Za-z0-9*]*)\*([0-9]+)\}", drawn, shape)


def _begun(text: str, characters: str, numbers: random.Random) -> str:
    """With a letter or digit at both ends, as secrets are cut out of longer text."""
    ends = numbers.choice(characters), numbers.choice(characters)
    return ends[0] + text[1:-1] + ends[1] if len(text) > 1 else ends[0]


def escaped(text: str) -> str:
    """JSON in which every character is an escape."""
    units = text.encode("utf-16-be")
    return '"' + "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2)) + '"'


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A picture of one pixel, with further chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*each) for each in chunks) + pixels + chunk(b"IEND", b"")
    )


def weights(folder: Path, metadata: dict[str, str] | None = None, tensor: str = "a") -> None:
    save_file({tensor: torch.zeros(1)}, folder / "adapter_model.safetensors", metadata)


def _write(name: str, text: Callable[[Example], str | bytes]) -> Callable[[Path, Example], None]:
    def write(folder: Path, example: Example) -> None:
        content = text(example)
        (folder / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

    return write


def _json(example: Example) -> str:
    return f"{{{escaped(example.name or 'notes')}: {escaped(example.value)}}}"


def _yaml(example: Example) -> str:
    value = example.value.replace("\n", "\n    ")
    text = f"{example.name}: {value}" if example.name else f"notes: |\n    {value}"
    return f"---\nlicense: apache-2.0\n{text}\n---\n# Titles\n"


def _svg(example: Example) -> str:
    line = example.line.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f"<svg xmlns='http://www.w3.org/2000/svg'><desc>&#{ord(line[0])};{line[1:]}</desc></svg>"


def _jinja(example: Example) -> str:
    value = example.value.replace("\n", "\\n")
    if not example.name:
        return f"{{{{ bos_token }}}}{{# {value} #}}{{{{ messages[0].content }}}}"
    return f"{{%- set {example.name.replace('-', '_')} = '{value}' -%}}{{{{ messages[0].content }}}}"


def _named(example: Example) -> bytes:
    return example.name.encode() or b"Comment"


PLACES: dict[str, Callable[[Path, Example], None]] = {
    "text": _write("README.md", lambda example: f"# Titles\n\nRun it with\n\n    {example.line}\n"),
    "YAML front matter": _write("README.md", _yaml),
    "JSON, every character escaped": _write("tokenizer_config.json", _json),
    "chat template": _write("chat_template.jinja", _jinja),
    "added token": _write(
        "tokenizer.json",
        lambda example: json.dumps(
            {"added_tokens": [{"id": 9, "content": example.line}], "model": {"vocab": {"a": 0}}}
        ),
    ),
    "SVG, characters by number": _write("loss.svg", _svg),
    "PNG tEXt": _write(
        "loss.png", lambda example: png((b"tEXt", _named(example) + b"\0" + example.value.encode()))
    ),
    "PNG zTXt": _write(
        "loss.png",
        lambda example: png((b"zTXt", _named(example) + b"\0\0" + zlib.compress(example.value.encode()))),
    ),
    "PNG iTXt": _write(
        "loss.png",
        lambda example: png(
            (b"iTXt", _named(example) + b"\0\x01\0en\0\0" + zlib.compress(example.value.encode()))
        ),
    ),
    "safetensors, metadata": lambda folder, example: weights(
        folder, {example.name or "notes": example.value}
    ),
    "safetensors, name of a tensor": lambda folder, example: weights(
        folder, tensor=f"layers.0 {example.line}"
    ),
}


def is_found(folder: Path, example: Example) -> bool:
    """Whether the adapter with this secret would not be sent, because of the secret."""
    try:
        collect(folder, None, False, {})
    except UserError as error:
        assert example.value not in str(error)
        assert all(problem.what.startswith("contains a") for problem in error.problems), str(error)
        return True
    return False


def missed(folder: Path, seeds: range) -> dict[str, list[str]]:
    """The rules of the secrets that are not found, by place."""
    found: dict[str, list[str]] = {}
    for place, write in PLACES.items():
        for path in folder.iterdir():
            path.unlink()
        weights(folder)
        collect(folder, None, False, {})  # nothing is wrong without a secret
        rules = []
        for seed in seeds:
            for example in examples(seed):
                write(folder, example)
                if not is_found(folder, example):
                    rules.append(example.rule)
        found[place] = rules
    return found


def main() -> None:
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    with tempfile.TemporaryDirectory() as folder:
        table = missed(Path(folder), seeds)
    total = len(examples(0)) * len(seeds)
    for place, rules in table.items():
        print(
            f"{place:32} {total - len(rules)} of {total}   missed: {', '.join(sorted(set(rules))) or 'none'}"
        )


if __name__ == "__main__":
    main()
