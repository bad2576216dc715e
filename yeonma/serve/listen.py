"""Where a server listens, and the key that its requests must bring. No torch here."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Mapping

from yeonma.errors import UserError

KEY = "YEONMA_API_KEY"


def key_of(given: str | None, environment: Mapping[str, str]) -> str | None:
    """The key that requests must bring. Raises UserError for one that no header can hold."""
    key = given or environment.get(KEY) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        what = "the key holds blanks or characters other than ASCII's"
        raise UserError(what, place="--api_key" if given else KEY, cure="choose another one")
    return key


def listen(host: str, port: int, key: str | None) -> socket.socket:
    """A socket that listens. Raises UserError where that cannot be, and where others could ask without a key."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UserError("no such address", place=f"--host {host}", cure="use 127.0.0.1 or 0.0.0.0") from None
    family, kind, protocol, _, address = found[0]
    if not _is_loopback(str(address[0])) and key is None:
        what = "other machines could ask, and there is no key"
        raise UserError(what, place=f"--host {host}", cure=f"set ${KEY}, or leave --host out")
    try:
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)  # whoever asks before the weights are loaded waits
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        cure = "stop the other server, or choose another port; --port 0 takes a free one"
        return UserError(f"the port is in use at {host}", place=f"--port {port}", cure=cure)
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError("you may not listen there", place=f"--port {port}", cure="use one from 1024 on")
    reason = error.strerror or str(error)
    return UserError(f"cannot listen there ({reason})", place=f"--host {host}", cure="use 127.0.0.1")


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return _is_loopback(listener.getsockname()[0])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
