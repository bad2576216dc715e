"""Finds secrets in text: forms of known services, names such as `api_key` beside values that look random, private keys,
passwords in addresses, and the values of this machine's own secret environment variables.

It finds mistakes, not what somebody hides on purpose. A scan takes time in proportion to the text: literals are
searched for, and what is tried at each of them has an upper bound.
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple
from urllib.parse import unquote

from yeonma.export.secret_forms import FORMS, KEYED
from yeonma.messages import tr

SECRET_NAMES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")
"""Environment variables whose values are searched for literally."""
MIN_SECRET_LENGTH = 12
MIN_VALUE_LENGTH = 8
"""The shortest value beside a name such as `password` that counts."""


class Secret(NamedTuple):
    """A secret that was found: the bytes before it, what it is, and its own bytes, which no message repeats."""

    at: int
    name: str
    value: bytes


def find_secrets(text: str | bytes, environment: Mapping[str, str]) -> list[Secret]:
    """The secrets in a text, in their order, each once. Positions count bytes of UTF-8."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    found: dict[bytes, Secret] = {}
    for secret in _of_environment(data, environment):
        found.setdefault(secret.value, secret)
    for finder in (_of_forms, _private_keys, _of_addresses, _of_headers, _of_kubernetes, _assigned):
        for secret in finder(data):
            found.setdefault(secret.value, secret)
    return sorted(found.values())


_PERCENT = re.compile("%[2-7][0-9a-fA-F]")
_ESCAPE = re.compile(r"\\(?:u\{([0-9a-fA-F]{1,6})\}|u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([nrtbfv])|(.))")


def plain_readings(text: str) -> list[str]:
    """The text as readers see it: without the escapes of JSON and programs and character references, and once more
    without percent signs for characters. Readings that are like the text are left out.

    Escaped line ends become blanks, so that lines keep their numbers.
    """
    plain = text
    for _ in range(3):  # JSON within JSON
        if "\\" not in plain:
            break
        plain = _ESCAPE.sub(_unescaped, plain)
    if "&" in plain:
        plain = html.unescape(plain)
    readings = [plain] if plain != text else []
    if _PERCENT.search(plain):
        readings.append(unquote(plain))
    return readings


def _unescaped(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    if code:
        number = int(code, 16)
        return chr(number) if number < 0x110000 else match[0]
    return " " if match[4] else match[5]


def _of_environment(data: bytes, environment: Mapping[str, str]) -> Iterator[Secret]:
    for name, value in environment.items():
        if SECRET_NAMES.search(name) and len(value) >= MIN_SECRET_LENGTH:
            sought = value.encode("utf-8", "surrogateescape")
            if (at := data.find(sought)) >= 0:
                yield Secret(at, tr("the value of ${name}", name=name), sought)


_WORD_BYTES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.+/=:~@|%\\-"
_ONLY_WORDS = bytes(byte if byte in _WORD_BYTES else ord(" ") for byte in range(256))
_SHORTEST_FORM = 13
_BLOCK = 1 << 20


def _long_words(data: bytes) -> bytes:
    """The words that are long enough for a secret, a line each: of a vocabulary or of prose little is left."""
    kept: list[bytes] = []
    start = 0
    while start < len(data):
        stop = start + _BLOCK
        block = data[start:stop].translate(_ONLY_WORDS)
        if stop < len(data) and (cut := block.rfind(b" ")) >= 0:
            block = block[:cut]
        elif stop < len(data):  # one word, perhaps of several blocks
            block = data[start : _end_of_word(data, stop)].translate(_ONLY_WORDS)
        kept += [word for word in block.split() if len(word) >= _SHORTEST_FORM]
        start += len(block) + 1
    return b"\n".join(kept)


_WORD_END = re.compile(b"[^" + re.escape(_WORD_BYTES) + b"]")


def _end_of_word(data: bytes, start: int) -> int:
    match = _WORD_END.search(data, start)
    return match.start() if match else len(data)


def _of_forms(data: bytes) -> Iterator[Secret]:
    words = _long_words(data)
    for form in FORMS:
        text = data if form.has_blanks else words
        at = text.find(form.anchor)
        while at >= 0:
            start = at - form.before
            match = form.pattern.match(text, start) if start >= 0 else None
            if match is None:
                at = text.find(form.anchor, at + 1)
                continue
            value = match[0]
            if not is_placeholder(value) and not (form.weak and not is_mixed(value)):
                yield Secret(data.find(value), form.name, value)
            at = text.find(form.anchor, max(match.end(), at + 1))


_PRIVATE_KEY = re.compile(rb"-----BEGIN[ A-Z0-9_-]{0,100}PRIVATE KEY(?: BLOCK)?-----", re.IGNORECASE)


def _private_keys(data: bytes) -> Iterator[Secret]:
    for match in _PRIVATE_KEY.finditer(data):
        yield Secret(match.start(), tr("a private key"), data[match.start() : match.end() + 40])


_SCHEME = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]{0,30}\Z")
_LOGIN = re.compile(rb"([^\s/:@\"'<>`]{0,100}):([^\s/:@\"'<>`]{1,200})@")


def _of_addresses(data: bytes) -> Iterator[Secret]:
    """Passwords in URLs."""
    at = data.find(b"://")
    while at >= 0:
        match = _LOGIN.match(data, at + 3)
        if match and _SCHEME.search(data, max(0, at - 31), at):
            user, password = match[1], match[2]
            if not (is_placeholder(password) or _are_plain_words(user, password)):
                yield Secret(at, tr("a password in a URL"), match[0])
        at = data.find(b"://", at + 3)


_HEADER = re.compile(
    rb"authorization[\"']?[ \t]{0,5}[:=][ \t]{0,5}[\"']?(?:(?:basic|bearer|token|api-token)[ \t]{1,5})?"
    rb"([\w=~@.+/-]{8,2000})",
    re.IGNORECASE,
)
_USER_OPTION = re.compile(
    rb"(?<=[\s-])-u(?:ser)?(?:=|[ \t]{0,5})[\"']?([^\s\"':]{0,100})[\"']?:[\"']?([^\s\"']{3,200})"
)
_CURL_COMMAND_LENGTH = 1000


def _of_headers(data: bytes) -> Iterator[Secret]:
    """Keys in HTTP headers, and logins of curl commands."""
    for match in _at_each(b"authorization", _HEADER, data):
        value = match[1]
        if looks_random(value) and not _has_plain_words(value):
            yield Secret(match.start(), tr("a key in an HTTP header"), value)
    for match in _at_each(b"-u", _USER_OPTION, data) if b"curl" in data else ():
        is_curl = data.rfind(b"curl", max(0, match.start() - _CURL_COMMAND_LENGTH), match.start()) >= 0
        if is_curl and not (is_placeholder(match[2]) or _are_plain_words(match[1], match[2])):
            yield Secret(match.start(), tr("a login of curl"), match[0])


_KUBERNETES = re.compile(rb"kind:[ \t]{0,9}[\"']?secret\b", re.IGNORECASE)
_KUBERNETES_DATA = re.compile(
    rb"\b(?:string)?data:\s{1,200}[\w.-]{1,100}:[ \t]{0,9}(?:[|>][+-]?\s{1,99})?[\"']?[a-z0-9+/]{10}",
    re.IGNORECASE,
)
_KUBERNETES_REACH = 400


def _at_each(literal: bytes, pattern: re.Pattern[bytes], data: bytes) -> Iterator[re.Match[bytes]]:
    """Tries a pattern at each place of its first literal, in small letters or capitals."""
    small = data.lower()
    at = small.find(literal)
    while at >= 0:
        if match := pattern.match(data, at):
            yield match
        at = small.find(literal, at + 1)


def _of_kubernetes(data: bytes) -> Iterator[Secret]:
    """Manifests of the kind Secret, with data in base64."""
    for match in _at_each(b"kind:", _KUBERNETES, data):
        start = max(0, match.start() - _KUBERNETES_REACH)
        near = _KUBERNETES_DATA.search(data, start, match.end() + _KUBERNETES_REACH)
        if near and not is_placeholder(near[0]):
            yield Secret(match.start(), tr("a Kubernetes secret"), near[0])


_ASSIGNMENT = re.compile(
    rb"[=>:,|?][=>:|]{0,3}[`'\"\s=]{0,5}(?=([A-Za-z0-9_/+.-][A-Za-z0-9_.=+/~%-]{7,199}))"
)
"""What stands between a name and its value, and the value."""
_NAME_BEFORE = re.compile(rb"[\s'\"`]{0,3}([\w.\- \t]{2,75})")
"""The name before an assignment, both read from right to left."""
_WORD = re.compile(rb"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET_WORDS = frozenset(
    b"access api apikey apitoken auth credential credentials creds pass passphrase passwd password pwd secret".split()
)
_SECRET_ENDINGS = (
    b"key",
    b"token",
    b"secret",
    b"password",
    b"passwd",
    b"creds",
    b"credential",
    b"credentials",
)
_HASH_WORDS = frozenset(
    b"hash sha sha1 sha256 sha512 md5 digest checksum etag commit revision fingerprint".split()
)
_HARMLESS_WORDS = frozenset(
    b"public pub foreign primary cache sort partition turkey monkey tokenizer author licence license".split()
)
_HARMLESS_LAST_WORDS = frozenset(
    b"id ids name names file files path paths dir folder url uri endpoint host size length len count max min num number"
    b" version versions class type kind index idx template format time date".split()
)
"""Words in a name that make even a random value no secret: `tokenizer_sha256`, `public_key`, `key_id`."""


def _assigned(data: bytes) -> Iterator[Secret]:
    """Values that look random, beside the name of a service or a word such as `password`."""
    for match in _ASSIGNMENT.finditer(data):
        value = match[1]
        if _DIGIT.search(value) is None:
            continue
        start = match.start()
        name = _NAME_BEFORE.match(data[max(0, start - 80) : start][::-1])
        found = _secret_name(name[1][::-1], value) if name else None
        if found:
            yield Secret(start, found, value)


def _secret_name(name: bytes, value: bytes) -> str | None:
    """What a value of this name is, or None if it is no secret."""
    words = [word.lower() for word in _WORD.findall(name)]
    known = {*words, *(first + second for first, second in pairwise(words))}
    if not words or known & _HASH_WORDS:
        return None
    for word in known:
        for service in _services(word):
            own = value.rstrip(b"./,")
            if len(own) in KEYED[service] and (own.isdigit() or looks_random(own, changes_in=8)):
                return tr("a key of {service}", service=service)
    if not (known & _SECRET_WORDS or any(word.endswith(_SECRET_ENDINGS) for word in words)):
        return None
    if known & _HARMLESS_WORDS or words[-1] in _HARMLESS_LAST_WORDS:
        return None
    is_secret = len(value) >= MIN_VALUE_LENGTH and looks_random(value) and not _has_plain_words(value)
    return tr("a secret beside its name") if is_secret else None


_SERVICES = tuple(sorted(KEYED))


def _services(word: bytes) -> list[str]:
    text = word.decode("ascii", "replace")
    return [service for service in _SERVICES if text == service or (len(service) >= 5 and service in text)]


_DIGIT = re.compile(rb"[0-9]")
_LETTER = re.compile(rb"[A-Za-z]")
_CHANGES = re.compile(
    rb"(?<=[a-z])(?=[A-Z0-9])|(?<=[0-9])(?=[A-Za-z])|(?<=[A-Z])(?=[0-9])|(?<=[A-Z]{2})(?=[a-z])"
)
"""Borders between kinds of characters, but for one capital before small letters."""


def is_mixed(value: bytes, changes_in: int = 6) -> bool:
    """Whether digits, capitals and small letters change once in `changes_in` characters, as in no word or name."""
    if _DIGIT.search(value) is None or _LETTER.search(value) is None:
        return False
    return len(_CHANGES.findall(value)) >= max(2, len(value) / changes_in)


def looks_random(value: bytes, changes_in: int = 6) -> bool:
    """Whether text is unlike words and names: mixed, and no character stands in it often."""
    return is_mixed(value, changes_in) and entropy(value) >= min(3.0, 0.65 * math.log2(len(value)))


def entropy(value: bytes) -> float:
    """Shannon's entropy of the bytes, in bits each."""
    size = len(value)
    return -sum(count / size * math.log2(count / size) for count in Counter(value).values())


_FILLER = re.compile(
    rb"x{4}|X{4}|0{8}|\*{3}|\.{3}|[<>${}]|(?i:example|placeholder|your|dummy|redacted|changeme)"
)
_PLAIN = re.compile(
    rb"token|secret|passw|\bkey|[_-]key|login|sample|123456|abcdef|abc123|environ|getenv|optional",
    re.IGNORECASE,
)
_PLAIN_USERS = frozenset(b"user username name login admin root oauth2 owner account".split())
_PLAIN_PASSWORDS = frozenset(b"pass password passwd pwd token secret key apikey api_key access_token".split())


def is_placeholder(value: bytes) -> bool:
    """Whether a text stands for a secret that the reader should fill in: `hf_xxxxxxxx`, `sk-your-key`, `${TOKEN}`."""
    return _FILLER.search(value) is not None


def _has_plain_words(value: bytes) -> bool:
    return is_placeholder(value) or _PLAIN.search(value) is not None


def _are_plain_words(user: bytes, password: bytes) -> bool:
    """Whether a login is one of documentation: user:password, guest:guest."""
    user, password = user.lower(), password.lower()
    return user == password or (user in _PLAIN_USERS and password in _PLAIN_PASSWORDS)
