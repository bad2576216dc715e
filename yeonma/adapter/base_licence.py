"""What licence a base model has: as its own files say, else as a table of well-known names says.

An adapter and a merged model are derived from their base, so its licence reaches them. Nothing here judges what a
licence allows: the note names it, says where it stands, and repeats what it asks of the names and cards of derived
models where that is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

from yeonma.config.yaml_text import read_front_matter, read_value
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.shown import code, markdown

_MOST_CHARACTERS = 200
"""Of what is repeated from a base's files."""


@dataclass(frozen=True)
class BaseLicence:
    """A licence, by the name that the base gives it."""

    name: str
    where: str
    """Where that stands: a file of the base, or a page."""
    asks: str = ""
    """What it asks of derived models: a name, a line on the card, no commercial use."""


_HUB = "https://huggingface.co"
_NC = tr("it allows no commercial use")
TABLE: tuple[tuple[str, BaseLicence], ...] = (
    (
        "LGAI-EXAONE/EXAONE-3.5-*",
        BaseLicence(
            "EXAONE AI Model License Agreement 1.1 - NC",
            "https://github.com/LG-AI-EXAONE/EXAONE-3.5",
            _NC,
        ),
    ),
    (
        "LGAI-EXAONE/EXAONE-4.0-*",
        BaseLicence(
            "EXAONE AI Model License Agreement 1.2 - NC",
            "https://github.com/LG-AI-EXAONE/EXAONE-4.0",
            tr("it allows no commercial use, and no use for models that compete with EXAONE"),
        ),
    ),
    (
        "LGAI-EXAONE/K-EXAONE-*",
        BaseLicence(
            "K-EXAONE AI Model License Agreement",
            "https://github.com/LG-AI-EXAONE/K-EXAONE",
            tr("the name of a derived model begins with K-EXAONE, and the agreement goes with it"),
        ),
    ),
    (
        "naver-hyperclovax/HyperCLOVAX-SEED-*",
        BaseLicence("HyperCLOVA X SEED Model License Agreement", f"{_HUB}/naver-hyperclovax"),
    ),
    (
        "kakaocorp/kanana-2-*",
        BaseLicence(
            "Kanana Open License Agreement",
            f"{_HUB}/kakaocorp",
            tr(
                'the name of a derived model begins with Kanana, its card says "Powered by Kanana", and '
                "the agreement goes with it"
            ),
        ),
    ),
    ("kakaocorp/kanana-1.5-v-*", BaseLicence("Kanana licence", f"{_HUB}/kakaocorp")),
    ("kakaocorp/kanana-1.5-*", BaseLicence("Apache-2.0", f"{_HUB}/kakaocorp")),
    ("skt/A.X-4.0-Light*", BaseLicence("Apache-2.0", f"{_HUB}/skt/A.X-4.0-Light")),
    ("skt/A.X-4.0*", BaseLicence("Qwen licence", f"{_HUB}/skt/A.X-4.0/blob/main/LICENSE")),
    ("skt/A.X-K[12]*", BaseLicence("Apache-2.0", f"{_HUB}/skt")),
    (
        "upstage/Solar-Open-*",
        BaseLicence("Upstage Solar License", f"{_HUB}/upstage/Solar-Open-100B/blob/main/LICENSE"),
    ),
    ("upstage/SOLAR-10.7B-Instruct-*", BaseLicence("CC-BY-NC-4.0", f"{_HUB}/upstage", _NC)),
    ("K-intelligence/Midm-2.0-*", BaseLicence("MIT", f"{_HUB}/K-intelligence")),
    ("KT-AI/midm-bitext-*", BaseLicence("CC-BY-NC-4.0", f"{_HUB}/KT-AI", _NC)),
    (
        "*/[Ll]lama-3*[Bb]llossom*",
        BaseLicence(
            "Llama 3 Community License, as a model built on Llama 3",
            "https://www.llama.com/llama3/license/",
            tr(
                'the name of a derived model begins with Llama 3, and its card says "Built with Meta Llama 3"'
            ),
        ),
    ),
)
"""Names on the hub -> licence, as repositories and copies of the pages had it in November 2026. The first pattern that
fits counts."""
_ASKS: Mapping[str, str] = MappingProxyType(
    {
        "exaone": _NC,
        "k-exaone": tr("the name of a derived model begins with K-EXAONE, and the agreement goes with it"),
        "kanana-open-license": tr(
            'the name of a derived model begins with Kanana, its card says "Powered by Kanana", and '
            "the agreement goes with it"
        ),
    }
)
"""What licences ask whose names stand in a base's README.md."""


def base_licence(base: str) -> BaseLicence | None:
    """The licence of a base: a folder, or a name on the hub. None if nothing is known.

    A folder's README.md comes first, then its LICENSE, then the table by the folder's name. Nothing is downloaded.
    """
    folder = Path(base)
    if folder.is_dir():
        return _of_readme(folder / "README.md") or _of_file(folder) or _of_name(f"*/{folder.resolve().name}")
    return _of_name(base)


def licence_note(base: str) -> list[str]:
    """Lines for the card of a model derived from the base; none if nothing is known."""
    found = base_licence(base)
    if found is None:
        return []
    name = Path(base).name if Path(base).is_absolute() else base
    licence, where, name = markdown(found.name), markdown(found.where), code(name)
    if found.asks:
        text = tr(
            "The base's licence is {licence} ({where}): {asks}. It applies to models derived from {name} too; read it "
            "before you share or use this one.",
            licence=licence,
            where=where,
            asks=markdown(found.asks),
            name=name,
        )
    else:
        text = tr(
            "The base's licence is {licence} ({where}). It applies to models derived from {name} too; read it before "
            "you share or use this one.",
            licence=licence,
            where=where,
            name=name,
        )
    return [text, ""]


def _of_name(name: str) -> BaseLicence | None:
    """By a name on the hub; `*/name` is one by anybody."""
    for pattern, licence in TABLE:
        if name.startswith("*/"):
            pattern, found = pattern.rpartition("/")[2], name.removeprefix("*/")
        else:
            found = name
        if fnmatchcase(found.lower(), pattern.lower()):
            return licence
    return None


def _of_readme(path: Path) -> BaseLicence | None:
    """By the front matter of a model card: `license`, or `license_name` where that is `other`."""
    front = read_front_matter(path)
    try:
        values = None if front is None else read_value(front, path.name)
    except UserError:
        return None
    if not isinstance(values, Mapping):
        return None
    name, link = values.get("license"), values.get("license_link")
    if name in ("other", None) and values.get("license_name"):
        name = values["license_name"]
    if not isinstance(name, str) or not name.strip():
        return None
    link = f", {link[:_MOST_CHARACTERS]}" if isinstance(link, str) else ""
    return BaseLicence(
        name.strip()[:_MOST_CHARACTERS], f"{path.name}{link}", _ASKS.get(name.strip().lower(), "")
    )


def _of_file(folder: Path) -> BaseLicence | None:
    """By the first line of a file LICENSE."""
    for path in sorted(folder.glob("LICEN[CS]E*")):
        try:
            lines = path.read_text("utf-8")[: 1 << 16].splitlines()
        except (OSError, ValueError):
            continue
        first = next((line.strip(" #*") for line in lines if line.strip(" #*")), "")
        if first:
            return BaseLicence(first[:_MOST_CHARACTERS], path.name)
    return None
