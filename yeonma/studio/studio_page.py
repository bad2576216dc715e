"""The frame of every page: style, script, links, and the content policy that allows nothing else.

Pages are HTML made here. Text of others goes through `yeonma.shown`, and no attribute holds a style or a script.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from starlette.responses import Response

from yeonma.language import language
from yeonma.messages import tr
from yeonma.page_style import COLOURS, SPANS
from yeonma.shown import html, one_line

PARTS = Path(__file__).parent / "page_parts"
HOME_PATH, DATA_PATH, TOKENS_PATH = "/", "/data", "/tokens"


def document(
    title: str, body: str, *, status: int = 200, here: str = "", refresh: int = 0, is_inside: bool = True
) -> Response:
    """A page around `body`, which is HTML. here: the path of the page among the links above it. refresh: seconds after
    which the browser asks again. is_inside: whether the links are shown."""
    style, script = _style(), _script()
    links = "".join(
        f'<a href="{path}"{" aria-current=page" if path == here else ""}>{html(name)}</a>'
        for path, name in ((HOME_PATH, tr("Runs")), (DATA_PATH, tr("Data")), (TOKENS_PATH, tr("Tokens")))
        if is_inside
    )
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    text = "\n".join(
        [
            "<!doctype html>",
            f'<html lang="{language()}"><head><meta charset="utf-8">{again}',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{html(title)} - Yeonma</title><style>{style}</style></head><body>",
            f'<header><nav aria-label="{html(tr("pages"))}"><b>Yeonma</b>{links}</nav></header>',
            f"<main><h1>{html(title)}</h1>",
            body,
            f"</main><script>{script}</script></body></html>",
            "",
        ]
    )
    return Response(text, status_code=status, headers=_headers(style, script), media_type="text/html")


def message_page(status: int, message: str) -> Response:
    """A page of one sentence."""
    return document(
        tr("Not possible"), f'<p role="alert">{html(message)}</p>', status=status, is_inside=False
    )


def copied_text(name: str, text: str, label: str) -> str:
    """A text of several lines with a button that copies it. name: its id in the page. `text` is HTML already."""
    return (
        f'<div class="copied"><pre id="{name}" tabindex="0" aria-label="{html(label)}">{text}</pre>'
        f'<button type="button" data-copy="{name}" data-done="{html(tr("copied"))}">{html(tr("Copy"))}</button></div>'
    )


def input_field(name: str, label: str, value: str, listed: Iterable[str]) -> str:
    """A text field with proposals. Names that are not shown as they are cannot be typed, and are not proposed."""
    options = "".join(f'<option value="{html(one)}">' for one in listed if one_line(one) == one)
    return (
        f'<label>{html(label)}<input name="{name}" value="{html(value)}" list="{name}-list" required '
        f'autocomplete="off" spellcheck="false"></label><datalist id="{name}-list">{options}</datalist>'
    )


def select_field(name: str, label: str, choices: Iterable[tuple[str, str]], selected: str) -> str:
    """A field with choices: (value, text)."""
    options = "".join(
        f'<option value="{html(value)}"{" selected" if value == selected else ""}>{html(text)}</option>'
        for value, text in choices
    )
    return f'<label>{html(label)}<select name="{name}">{options}</select></label>'


@cache
def _style() -> str:
    return COLOURS + SPANS + (PARTS / "studio.css").read_text("utf-8")


@cache
def _script() -> str:
    return (PARTS / "studio.js").read_text("utf-8")


@cache
def _headers(style: str, script: str) -> dict[str, str]:
    policy = [
        "default-src 'none'",
        f"style-src {_hash_of(style)}",
        f"script-src {_hash_of(script)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
    return {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        # with no-referrer, browsers call the origin of a form null
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _hash_of(content: str) -> str:
    """The content policy's source for an element that holds this."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
