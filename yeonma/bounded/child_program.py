"""The program of the child process that runs what others wrote: chat templates, regular expressions, tokenizers.

It is started by its path, with little imported, and imports nothing of Yeonma. `child.py` is its other end. A request
is a header (bytes of the request, seconds, bytes of memory, bytes of the result) and the request itself, marshalled. An
answer is a letter (`DONE` ...), the number of bytes that follow, and these.

The kernel keeps the bounds, so that no loop in C escapes them: the timer of processor time ends the process, and memory
beyond the limit is not given.
"""

from __future__ import annotations

import json
import marshal
import os
import re
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any

HEADER = struct.Struct("<QdQQ")
ANSWER = struct.Struct("<cQ")
READY, DONE, REFUSED, OUT_OF_MEMORY, TOO_LARGE = b"k", b"r", b"e", b"m", b"s"
MOST_ERROR = 2_000
"""Characters of an error's text that are sent back."""
_MOST_TEMPLATES = 16
_LINUX = sys.platform.startswith("linux")


# Chat templates, as transformers renders them


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates. A test compares the two."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}`: marks what an assistant writes, and changes nothing of the text."""

        tags = {"generation"}  # noqa: RUF012  # as its base class has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Callable[[], str]) -> str:
            return caller()

    class Dictionary:
        """`dict`, without the attributes of the class."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> Any:
            return dict.fromkeys(*args)

    class PlainNamespace(Namespace):
        """`namespace`, without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *values = args
            given = dict(*values, **kwargs)
            for name in given:
                check_name(name)
            Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no names that begin with an underscore, such as {name!r}")

    def raise_exception(message: object) -> None:
        raise TemplateError(message)  # type: ignore[arg-type]  # a template may pass anything

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(form: str) -> str:
        from datetime import datetime

        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dictionary(),
        "namespace": PlainNamespace,
    }
    return environment


_environments: list[Any] = []
_templates: dict[str, Any] = {}

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which reasoning is given. As in transformers, the first and the second are filled from the others."""


def _as_transformers_gives(message: Any) -> Any:
    """A message without the keys that are None, and with its reasoning under the names that templates read."""
    if not isinstance(message, dict):
        raise TypeError(f"a message is a mapping, not {message!r:.100}")
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def render(template: str, messages: list[Any], variables: Mapping[str, Any]) -> bytes:
    """The text that a chat template writes, in UTF-8. `variables`: all that it reads besides the messages."""
    compiled = _templates.get(template)
    if compiled is None:
        if len(_templates) >= _MOST_TEMPLATES:
            _templates.clear()
        compiled = _templates[template] = _environments[0].from_string(template)
    given = [_as_transformers_gives(message) for message in messages]
    text: str = compiled.render({**variables, "messages": given})
    return text.encode("utf-8", "surrogatepass")


def render_many(requests: list[bytes]) -> bytes:
    """The answers to several marshalled arguments of `render`, one after the other: letter, length, content."""
    parts = []
    for request in requests:
        try:
            kind, content = DONE, render(*marshal.loads(request))
        except MemoryError:
            raise
        except Exception as error:
            kind, content = REFUSED, _words(error)
        parts += [ANSWER.pack(kind, len(content)), content]
    return b"".join(parts)


def names_in(template: str) -> bytes:
    """What reading a chat template tells, as JSON: the variables that it reads, the names of keys and attributes, the
    variables that it sets. All of it is `null` where the template is not Jinja."""
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes

    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except TemplateSyntaxError:  # rendering reports it
        return b"null"
    names = {attribute.attr for attribute in tree.find_all(nodes.Getattr)}
    names |= {const.value for const in tree.find_all(nodes.Const) if isinstance(const.value, str)}
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    found = [sorted(part) for part in (meta.find_undeclared_variables(tree), names, assigned)]
    return json.dumps(found).encode()


# Regular expressions


def match(pattern: str, names: list[str]) -> bytes:
    """One byte for each name: whether the expression matches it whole."""
    compiled = re.compile(pattern)
    return bytes(compiled.fullmatch(name) is not None for name in names)


# Tokenizers


_RUN, _LINE = 500, 20_000
"""Characters of the texts with which a tokenizer is tried: for each character of its own, and for each kind."""
_KINDS = ("a", "A", "1", " ", "\n", "가", "!", "a ", "aA", "😀", "Hello, 세계! 123 \t'll ")
_ENDS = ("", "\u241f!")
"""What ends a monotonous text: an expression that runs back and forth in it does so when something else follows."""
_MOST_OWN = 64
_TOKENS_PER_CHARACTER = 64
"""More than any published tokenizer makes: 4 bytes of a character, or 18 letters of a ligature."""


def try_tokenizer(path: str) -> bytes:
    """Reads a tokenizer.json, and encodes and decodes long monotonous texts with it: letters, blanks, digits, and what
    its own expressions mention. Returns what is wrong with the result, or nothing."""
    from tokenizers import Tokenizer

    with open(path, encoding="utf-8") as file:
        own = _own_characters(json.load(file))
    try:
        tokenizer = Tokenizer.from_file(path)
        texts = [(kind * _LINE)[:_LINE] + _ENDS[1] for kind in _KINDS]
        texts += [(part * _RUN)[:_RUN] + end for part in [*"\t.-_'é\u0301", *own] for end in _ENDS]
        for text in texts:
            ids = tokenizer.encode(text).ids
            if len(ids) > _TOKENS_PER_CHARACTER * len(text):
                return f"makes {len(ids):,} tokens of {len(text):,} characters".encode()
            back = tokenizer.decode(ids[:_RUN])
            if len(back) > _TOKENS_PER_CHARACTER * 2 * _RUN:
                return f"makes {len(back):,} characters of {len(ids[:_RUN]):,} tokens".encode()
    except (Exception, MemoryError):
        raise
    except BaseException as error:  # a panic of the library in Rust
        return b"stops the library that reads it: " + _words(error)
    return b""


def _own_characters(description: Any) -> list[str]:
    """Characters and words in the expressions and replacements of a tokenizer.json."""
    found: dict[str, None] = {}
    waiting = [description.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while waiting and len(found) < _MOST_OWN:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            value = value[:1_000]
            found |= dict.fromkeys([*re.findall(r"[^\W_]{2,20}", value), *value])
    return list(found)[:_MOST_OWN]


_WORK: dict[str, Callable[..., bytes]] = {
    "render": lambda request: render(*marshal.loads(request)),
    "render many": render_many,
    "names": names_in,
    "match": match,
    "tokenizer": try_tokenizer,
}


# The process


def _limit_memory(allowed: int) -> None:
    """Allows `allowed` bytes of address space, but not more than the system does. On Linux alone: elsewhere the other
    end watches the memory."""
    import resource

    if not _LINUX:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = allowed if hard == resource.RLIM_INFINITY else min(allowed, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _size() -> int:
    """The address space of this process in bytes; 0 where the system does not say."""
    import resource

    if not _LINUX:
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _read(count: int) -> bytes:
    """Exactly `count` bytes of a request. Ends the process when the other end has closed its pipe."""
    parts = []
    while count:
        part = os.read(0, min(count, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _write(kind: bytes, content: bytes) -> None:
    for part in (ANSWER.pack(kind, len(content)), content):
        view = memoryview(part)
        while view:
            view = view[os.write(1, view) :]


def _answer(kind: str, arguments: tuple[Any, ...], most: int) -> tuple[bytes, bytes]:
    try:
        result = _WORK[kind](*arguments)
    except MemoryError:
        return OUT_OF_MEMORY, b""
    except Exception as error:
        return REFUSED, _words(error)
    return (DONE, result) if len(result) <= most else (TOO_LARGE, b"")


def _words(error: BaseException) -> bytes:
    text = (
        "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
    )
    return text[:MOST_ERROR].encode("utf-8", "replace")


def _import_for(kind: str) -> None:
    """What a kind of work needs, imported before its bounds begin."""
    if kind in ("render", "render many", "names") and not _environments:
        _environments.append(_environment())
    elif kind == "tokenizer":
        import tokenizers  # noqa: F401  # it is there when it is needed


def _prepare() -> None:
    """Signals for the other end's process group do not concern this one: it ends with the pipe. No file grows here."""
    import resource

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))


def main() -> None:
    """Answers requests until the pipe closes."""
    import resource

    _prepare()
    sys.path[:] = json.loads(sys.argv[1])
    sizes: dict[str, int] = {}
    unlimited = resource.getrlimit(resource.RLIMIT_AS)[1]
    _write(READY, b"")
    while True:
        count, seconds, memory, most = HEADER.unpack(_read(HEADER.size))
        kind, arguments = marshal.loads(_read(count))
        if kind not in sizes:
            _import_for(kind)
            sizes[kind] = _size()
        _limit_memory(sizes[kind] + memory)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer, content = _answer(kind, arguments, most)
        except BaseException:  # memory again, while an error was put into words
            answer, content = OUT_OF_MEMORY, b""
        signal.setitimer(signal.ITIMER_PROF, 0)
        _limit_memory(unlimited)
        _write(answer, content)
        arguments, content = (), b""


if __name__ == "__main__":
    main()
