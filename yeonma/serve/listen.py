"""The listening socket, and the API key that requests must send. No torch here."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from yeonma.errors import UserError, system_reason
from yeonma.messages import tr

KEY = "YEONMA_API_KEY"
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")


def api_key(setting: str | None, environment: Mapping[str, str]) -> str | None:
    """The key that requests must send. Raises UserError if it cannot be sent in a header."""
    key = setting or environment.get(KEY) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        problem = tr("the key contains spaces or non-ASCII characters")
        raise UserError(problem, place="--api_key" if setting else KEY, cure=tr("choose another key"))
    return key


def listen(host: str, port: int, key: str | None) -> socket.socket:
    """A listening socket. Raises UserError if it cannot be opened, or if other machines could connect without a key."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UserError(
            tr("no such address"), place=f"--host {host}", cure=tr("use 127.0.0.1 or 0.0.0.0")
        ) from None
    family, kind, protocol, _, address = addresses[0]
    if not _is_loopback(str(address[0])) and key is None:
        problem = tr("other machines could connect, and no API key is set")
        raise UserError(problem, place=f"--host {host}", cure=tr("set ${key}, or leave out --host", key=KEY))
    try:
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _listen_error(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)  # connections wait until the weights are loaded
    except OSError as error:
        listener.close()
        raise _listen_error(host, port, error) from error
    return listener


def _listen_error(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        cure = tr("stop the other server, or choose another port; --port 0 picks a free one")
        return UserError(tr("the port is in use at {host}", host=host), place=f"--port {port}", cure=cure)
    if error.errno in (errno.EACCES, errno.EPERM):
        problem = tr("you are not allowed to listen on this port")
        return UserError(problem, place=f"--port {port}", cure=tr("use a port from 1024 on"))
    reason = system_reason(error)
    return UserError(
        tr("cannot listen there ({reason})", reason=reason), place=f"--host {host}", cure=tr("use 127.0.0.1")
    )


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return _is_loopback(listener.getsockname()[0])


def names_this_machine(host: str) -> bool:
    """Whether a request's header Host names this machine itself, as it does unless a web page abuses the browser (DNS
    rebinding)."""
    try:
        return urlsplit(f"//{host}").hostname in LOCAL_NAMES
    except ValueError:
        return False


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
