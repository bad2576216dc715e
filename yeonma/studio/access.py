"""Who may use the studio: whoever has its key, from its own pages.

The key comes once, in the address or in a form, and becomes a cookie that scripts cannot read and no other site can
have sent. A request with another host name than this machine's (DNS rebinding) and a change that another page asks for
(cross-site requests, pages without an origin) are refused before anything else is read of them.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from secrets import token_urlsafe
from urllib.parse import parse_qsl, urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response

from yeonma.messages import tr
from yeonma.serve.connections import AsgiApp, AsgiReceive, AsgiScope, AsgiSend
from yeonma.serve.listen import names_this_machine
from yeonma.shown import html
from yeonma.studio.studio_page import document, message_page

KEY_PATH = "/key"
MOST_FORM_BYTES = 65_536
_SAFE = ("GET", "HEAD")


class RefusedForm(Exception):
    """A form that cannot be read, with the status to answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Access:
    """The key, and what it becomes."""

    key: str
    port: int
    """Part of the cookie's name: browsers send the cookies of all ports of a host."""
    local_only: bool
    """Whether only this machine can connect."""
    session: str = field(default_factory=lambda: token_urlsafe(32))
    """The cookie's value. It is not the key, and another start of the studio has another."""

    @property
    def cookie(self) -> str:
        return f"yeonma_studio_{self.port}"

    def guard(self, app: AsgiApp) -> AsgiApp:
        """The application for those who may use it."""

        async def guarded_app(scope: AsgiScope, receive: AsgiReceive, send: AsgiSend) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            request = Request(scope, receive)
            response = await self._answer(request)
            await (response or app)(scope, receive, send)

        return guarded_app

    async def _answer(self, request: Request) -> Response | None:
        """What to answer instead of the application; None if the request may pass."""
        host = request.headers.get("host", "")
        if self.local_only and not names_this_machine(host):
            return message_page(
                403, tr("This studio serves its own machine alone: use 127.0.0.1 or localhost.")
            )
        if request.method not in _SAFE and not _is_from_own_page(request, host):
            return message_page(403, tr("This request does not come from a page of this studio."))
        if request.method == "POST" and request.url.path == KEY_PATH:
            try:
                form = await read_form(request)
            except RefusedForm as error:
                return message_page(error.status, str(error))
            return self._enter(form.get("key", ""), "/")
        if request.method in _SAFE and "key" in request.query_params:
            return self._enter(request.query_params["key"], request.url.path)
        if not _equal(request.cookies.get(self.cookie, ""), self.session):
            return key_page(401)
        return None

    def _enter(self, key: str, path: str) -> Response:
        if not _equal(key, self.key):
            return key_page(403, tr("The key is wrong."))
        # one slash: two would name another host
        response = RedirectResponse("/" + path.lstrip("/\\"), status_code=303)
        response.set_cookie(self.cookie, self.session, httponly=True, samesite="strict", path="/")
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-store"
        return response


def _equal(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


def _is_from_own_page(request: Request, host: str) -> bool:
    """Browsers say where a request that changes something comes from; `null` is a page without an origin."""
    origin = request.headers.get("origin", "")
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not host or parts.netloc.lower() != host.lower():
        return False
    return request.headers.get("sec-fetch-site", "same-origin") == "same-origin"


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form of ours. Raises RefusedForm."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise RefusedForm(415, tr("A form of this studio was expected."))
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > MOST_FORM_BYTES:
                raise RefusedForm(413, tr("The form is too large."))
        return dict(parse_qsl(content.decode("utf-8"), keep_blank_values=True, max_num_fields=100))
    except (ClientDisconnect, ValueError):
        raise RefusedForm(400, tr("The form cannot be read.")) from None


def key_page(status: int, problem: str = "") -> Response:
    """A form for the key, which a password manager may fill."""
    said = f'<p class="cut" role="alert">{html(problem)}</p>' if problem else ""
    about = html(
        tr("The address that `yeonma studio` prints has the key; on another machine it is $YEONMA_API_KEY.")
    )
    field_ = '<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>'
    form = (
        f'<form method="post" action="{KEY_PATH}"><label for="key">{html(tr("key"))}</label> {field_} '
        f"<button>{html(tr('Enter'))}</button></form>"
    )
    return document(tr("Key"), f"{said}<p>{about}</p>{form}", status=status, is_inside=False)
