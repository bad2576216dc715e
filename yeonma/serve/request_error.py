"""A request that is refused: what an OpenAI-compatible server answers then. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yeonma.shown import MOST_OF_A_LINE, many_lines, one_line


class RequestError(Exception):
    """A request that is refused, with its HTTP status and OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(many_lines(without_lone_surrogates(message), MOST_OF_A_LINE))
        self.status, self.code, self.headers = status, code, headers
        self.param = None if param is None else one_line(without_lone_surrogates(param), MOST_OF_A_LINE)

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def without_lone_surrogates(text: str) -> str:
    """JSON can contain half of a surrogate pair, which UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
