"""`yeonma studio`: runs and rows in the browser."""

from __future__ import annotations

import os
import socket
from functools import partial
from importlib.util import find_spec
from secrets import token_urlsafe

from yeonma.config.settings import StudioSettings
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.packages import install
from yeonma.serve.listen import api_key, is_local, listen, url_of
from yeonma.streams import log_line, say

PACKAGES = ("starlette", "uvicorn")


def run(settings: StudioSettings) -> int:
    """Serves until Ctrl-C. Raises UserError for an address or a folder that cannot be used."""
    if settings.lang != "auto":
        os.environ["YEONMA_LANG"] = settings.lang  # also for the runs that are resumed
    given_key = api_key(None, os.environ)
    with listen(settings.host, settings.port, given_key) as listener:
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            names = " ".join(missing)
            cure = tr("install it with: {install}", install=install(*missing))
            raise UserError(tr("missing packages: {names}", names=names), place="yeonma studio", cure=cure)
        from yeonma.studio.access import Access
        from yeonma.studio.roots import Roots
        from yeonma.studio.run_control import RunControl
        from yeonma.studio.studio_app import Studio
        from yeonma.studio.studio_server import run_studio
        from yeonma.studio.token_views import TokenViews

        roots = Roots.of(settings.root or ["."])
        access = Access(given_key or token_urlsafe(32), listener.getsockname()[1], is_local(listener))
        studio = Studio(roots, RunControl(settings.allow_code), TokenViews(roots.folders[0]))
        address = f"/?key={access.key}" if given_key is None else "/"
        try:
            run_studio(studio, access, listener, partial(_print_ready, listener, address), log_line)
        except KeyboardInterrupt:
            log_line(tr("the studio has ended; runs go on"))
    return 0


def _print_ready(listener: socket.socket, address: str) -> None:
    say(tr("Open in a browser: {address}", address=f"{url_of(listener)}{address}"))
    say(
        tr(
            "The address has a key: whoever has it can look at your runs and stop them. Ctrl-C ends the studio."
        )
        if address != "/"
        else tr("The page asks for the API key. Ctrl-C ends the studio; runs go on.")
    )
