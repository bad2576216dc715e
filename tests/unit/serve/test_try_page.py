"""The page at `/`, by HTTP and in headless Chromium: it asks the server what is typed, and runs no data."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import adapter_on, tiny_base
from tests.chromium import Browser, browser, contrast, in_chromium
from tests.servers import Server, serving
from tests.tokenizers import byte_level
from yeonma import load
from yeonma.serve.try_page import FILE, try_page

KEY = "sesame-and-lily"
TOKENS = 8
HOSTILE = "It's <img src=x onerror='window.ran = 1'> \u202e</script> 서울 \\ \" `$(echo ran)`"
TITLES = "<b>titles"


@dataclass(frozen=True)
class Place:
    root: Path
    server: Server

    @property
    def url(self) -> str:
        return self.server.url.removesuffix("v1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("page")
    base = tiny_base(root / "base", byte_level())
    templates = {
        TITLES: "below is an article.\n\n{document}\n\ntitle: {title}",
        "talks": "chat",
        "tasks": "alpaca",
        "texts": "text",
    }
    folders = [
        adapter_on(base, root / name, template, seed=seed)
        for seed, (name, template) in enumerate(templates.items())
    ]
    options = ("--max_new_tokens", str(TOKENS), "--max_new_tokens_limit", "50")
    with serving(root / "errors", *folders, *options, environment={"YEONMA_API_KEY": KEY}) as server:
        yield Place(root, server)


def ask(place: Place, method: str, path: str, **fields: str) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection(re.findall(r"//([^/]+)", place.url)[0], timeout=60)
    connection.request(method, path, headers=fields)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


# by HTTP


def test_the_page_is_the_same_for_everyone_and_holds_nothing_of_the_server(place: Place) -> None:
    response, body = ask(place, "GET", "/")
    assert (response.status, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert body == bytes(try_page().body)
    for secret in (KEY, "titles", "instruction", str(place.root)):
        assert secret.encode() not in body
    assert len(body) < 20_000
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"https?://", FILE.read_text("utf-8"))


def test_only_get_and_head_of_the_own_host_are_answered(place: Place) -> None:
    response, body = ask(place, "HEAD", "/")
    assert (response.status, body) == (200, b"")
    assert response.headers["Content-Length"] == str(len(bytes(try_page().body)))
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        response, _ = ask(place, method, "/")
        assert response.status == 405
        assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD"}
    assert ask(place, "GET", "/", Host="evil.example")[0].status == 403


def test_models_are_told_only_with_the_key(place: Place) -> None:
    for fields in ({}, {"Authorization": "Bearer wrong"}):
        response, body = ask(place, "GET", "/page.json", **fields)
        assert response.status == 401 and b"titles" not in body
    _, body = ask(place, "GET", "/page.json", Authorization=f"Bearer {KEY}")
    told = json.loads(body)
    assert [(model["name"], model["kind"]) for model in told["models"]] == [
        (TITLES, "fields"),
        ("talks", "turns"),
        ("tasks", "fields"),
        ("texts", "text"),
        ("base", "fields"),
    ]
    assert told["models"][0]["variants"] == [["document"]]
    assert told["models"][2]["variants"] == [["instruction", "input"], ["instruction"]]
    assert (told["max_new_tokens"], told["max_new_tokens_limit"], told["temperature"]) == (TOKENS, 50, 0)


# in a browser


@pytest.fixture(scope="module")
def tab(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.server = place.url
        yield opened


def until(tab: Browser, script: str) -> None:
    end = time.monotonic() + 60
    while not tab.run(script):
        assert time.monotonic() < end, (script, tab.run("document.body.innerText"))
        tab.run("new Promise((resolve) => setTimeout(resolve, 50))")


def text_of(tab: Browser, name: str) -> str:
    return str(tab.run(f"document.getElementById('{name}').textContent"))


@pytest.fixture
def page(tab: Browser, place: Place) -> Iterator[Browser]:
    """The page with the key entered. The test fails if the page logs an error, except that a request was refused."""
    tab.look(390, 800)
    tab.open(place.url)
    until(tab, "!document.getElementById('enter').hidden")
    tab.type(KEY)  # the field has the focus
    tab.key("Enter", 13, "\r")
    until(tab, "!document.getElementById('ask').hidden")
    yield tab
    assert [problem for problem in tab.problems if "a status of 40" not in problem] == []
    assert tab.run("window.ran") is None


def choose(tab: Browser, model: str) -> None:
    tab.run(
        f"(() => {{ const m = document.getElementById('model'); m.value = {json.dumps(model)}; "
        "m.dispatchEvent(new Event('change')); })()"
    )


def type_in(tab: Browser, text: str, number: int = 0) -> None:
    tab.run(f"document.querySelectorAll('#fields textarea')[{number}].focus()")
    tab.type(text)


def send(tab: Browser) -> None:
    """By the keyboard."""
    tab.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13, modifiers=2)
    until(tab, "document.getElementById('stop').hidden")


def posted(curl: str) -> Any:
    """The answer to what a curl line sends, as bash reads it."""
    script = f"curl() {{ printf '%s\\0' \"$@\"; }}\n{curl}"
    run = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"YEONMA_API_KEY": KEY})
    url, *words = run.stdout.decode().split("\0")[:-1]
    headers = dict(word.split(": ", 1) for word in words[1:-2:2])
    assert (words[-2], headers["Authorization"]) == ("-d", f"Bearer {KEY}")
    with urllib.request.urlopen(urllib.request.Request(url, words[-1].encode(), headers)) as response:
        return json.load(response)["choices"][0]


@in_chromium
def test_a_field_is_asked_and_the_curl_line_gives_the_same_answer(page: Browser, place: Place) -> None:
    type_in(page, HOSTILE)
    curl = text_of(page, "curl")
    assert KEY not in curl and "\u202e" not in curl
    send(page)
    expected = load(place.root / TITLES).generate({"document": HOSTILE}, max_new_tokens=TOKENS)
    assert text_of(page, "answer") == expected
    assert posted(curl)["message"]["content"] == expected
    assert text_of(page, "problem") == ""
    assert page.run("document.getElementById('model').value") == TITLES
    assert page.run("document.querySelector('#fields span').textContent") == "document"
    assert KEY not in page.run(
        "document.documentElement.outerHTML + JSON.stringify(localStorage) + document.cookie"
    )
    assert page.run("document.getElementById('key').value") == ""


@in_chromium
def test_several_fields_are_asked_by_name_and_may_stay_empty(page: Browser, place: Place) -> None:
    choose(page, "tasks")
    loaded = load(place.root / "tasks")
    type_in(page, "Add")
    send(page)
    assert text_of(page, "answer") == loaded.generate({"instruction": "Add"}, max_new_tokens=TOKENS)
    type_in(page, "1 and 2", 1)
    curl = text_of(page, "curl")
    send(page)
    expected = loaded.generate({"instruction": "Add", "input": "1 and 2"}, max_new_tokens=TOKENS)
    assert text_of(page, "answer") == posted(curl)["message"]["content"] == expected


@in_chromium
def test_a_conversation_goes_on_and_begins_anew(page: Browser, place: Place) -> None:
    choose(page, "talks")
    loaded = load(place.root / "talks")
    turns: list[dict[str, str]] = []
    for text in ("Who is it?", "And now?"):
        type_in(page, text)
        send(page)
        turns.append({"role": "user", "content": text})
        answer = loaded.generate({"messages": turns}, max_new_tokens=TOKENS)
        turns.append({"role": "assistant", "content": answer})
        assert page.run("[...document.querySelectorAll('#turns .assistant')].pop().textContent") == answer
    page.click("#anew")
    assert text_of(page, "turns") == ""


@in_chromium
def test_a_text_is_continued_and_limits_are_the_requests(page: Browser, place: Place) -> None:
    choose(page, "texts")
    type_in(page, "Who is")
    curl = text_of(page, "curl")
    assert "/v1/completions " in curl
    send(page)
    assert text_of(page, "answer") == posted(curl)["text"]
    page.run("document.getElementById('tokens').value = 60")
    page.run("document.getElementById('ask').noValidate = true")
    page.run("document.getElementById('ask').requestSubmit()")
    until(page, "document.getElementById('problem').textContent")
    assert text_of(page, "problem") == "max_tokens is 60, but this server allows at most 50"


@in_chromium
def test_a_wrong_key_is_said_and_can_be_entered_again(tab: Browser, place: Place) -> None:
    tab.open(place.url)
    until(tab, "!document.getElementById('enter').hidden")
    tab.type("wrong")
    tab.key("Enter", 13, "\r")
    until(tab, "document.getElementById('problem').textContent")
    assert text_of(tab, "problem") == "This is not the server's key."
    assert tab.run("document.activeElement.id") == "key"
    tab.run("document.getElementById('key').select()")
    tab.type(KEY)
    tab.click("#connect")
    until(tab, "!document.getElementById('ask').hidden")


@in_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_can_be_read(page: Browser, dark: bool) -> None:
    page.look(390, 800, dark=dark)
    type_in(page, "x" * 300)
    assert page.run("document.documentElement.scrollWidth") == 390
    for selector in ("h1", ".dim", "label span", "#send", "#curl"):
        colour, behind = page.run(
            f"(() => {{ const s = getComputedStyle(document.querySelector('{selector}')); "
            "const b = s.backgroundColor; return [s.color, b === 'rgba(0, 0, 0, 0)' ? "
            "getComputedStyle(document.body).backgroundColor : b]; })()"
        )
        assert contrast(colour, behind) >= 4.5, selector
    heights = page.run(
        "[...document.querySelectorAll('button')].filter(b => b.offsetHeight).map(b => b.offsetHeight)"
    )
    assert min(heights) >= 40
