"""The page at `/` on which people try the models that are served.

It holds nothing of this server. Its script asks `/page.json`, which needs the API key, and then the API itself; what
comes from there reaches the page as text nodes. The content policy allows only its own style, script and server.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.responses import Response

from yeonma.adapter.prompt_builder import PromptBuilder
from yeonma.page_style import COLOURS

FILE = Path(__file__).parent / "try_page.html"


def try_page() -> Response:
    """The page, the same for everyone."""
    text = FILE.read_text("utf-8").replace("/* colours */", COLOURS.strip(), 1)
    style, script = (_source(text, tag) for tag in ("style", "script"))
    policy = [
        "default-src 'none'",
        f"style-src {style}",
        f"script-src {script}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(text, headers=headers, media_type="text/html")


def _source(text: str, tag: str) -> str:
    """The content policy's source for the one element of that tag: the hash of what it holds."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def page_model(name: str, prompt_builder: PromptBuilder) -> Mapping[str, Any]:
    """What the page needs to know to ask a model. `kind`: what is asked: a conversation, fields, or a text to continue.
    `variants`: the fields of each variant of the template."""
    template = prompt_builder.adapter.template
    kind = "text" if template.is_text else "turns" if template.takes_turns else "fields"
    return {"name": name, "kind": kind, "variants": [list(one.prompt_fields) for one in template.variants]}
