"""What others wrote ends within its bounds, whatever it is, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from yeonma.bounded import child
from yeonma.bounded.child import MIB, Bounds, OverBounds, Refused, ask, packed, plain, resident_bytes

SMALL = Bounds(seconds=0.3, memory=64 * MIB, result=MIB)
HELLO = [{"role": "user", "content": "hello"}]


def render(template: str, bounds: Bounds = SMALL, **variables: Any) -> str:
    return ask("render", (packed((template, HELLO, variables)),), bounds).decode()


@pytest.fixture(autouse=True, scope="module")
def ended() -> Iterator[None]:
    yield
    child.end()


TIME = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "powers": "{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "powers of constants": "{{ 9 ** (9 ** 9) }}",
    "macros that call themselves": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(99) }}",
    "a filter of Jinja's own": "{{ lipsum(n=10**6) }}",
    "calls of blocks": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 24
    + "x"
    + "{% endcall %}" * 24,
}
MEMORY = {
    "a product": "{{ 'x' * 10**10 }}",
    "a text that doubles": "{% set ns = namespace(a='xx') %}{% for i in range(99) %}"
    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "a format": "{{ '%9999999999s'|format('a') }}",
    "a format method": "{{ '{:>9999999999}'.format(1) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "indented JSON": "{{ messages|tojson(indent=10**9) }}",
    "a list in a chain of filters": "{{ range(99999)|map('string')|join('x' * 10000)|length }}",
}


@pytest.mark.parametrize("name", sorted(TIME))
def test_a_template_that_takes_long_is_ended(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(OverBounds, match=r"did not end within 0.3 seconds|needs more than 64 MiB"):
        render(TIME[name])
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("name", sorted(MEMORY))
def test_a_template_that_takes_memory_is_ended(name: str) -> None:
    with pytest.raises(OverBounds, match="needs more than 64 MiB of memory"):
        render(MEMORY[name], Bounds(5, 64 * MIB, MIB))


def test_a_template_may_not_write_a_text_that_would_take_long_to_encode() -> None:
    with pytest.raises(OverBounds, match="writes more than 1 MiB"):
        render("{{ 'x' * 2_000_000 }}")


@pytest.mark.parametrize("opened", ["(", "[", "{% if 1 %}", "not ", "-"])
def test_a_template_nested_too_deeply_is_refused(opened: str) -> None:
    template = opened * 3_000 if "%" in opened else "{{ " + opened * 30_000 + "1 }}"
    with pytest.raises((Refused, OverBounds)):
        render(template, Bounds(2, 64 * MIB, MIB))
    assert render("{{ messages[0].content }}") == "hello"


def test_a_long_error_is_cut() -> None:
    with pytest.raises(Refused) as raised:
        render("{{ raise_exception('x' * 100_000) }}")
    assert len(str(raised.value)) == 2_000


def test_the_child_serves_many_requests_and_the_next_after_its_end() -> None:
    assert [render("{{ n }}", n=number) for number in range(50)] == [str(number) for number in range(50)]
    first = child._running[0].process
    with pytest.raises(OverBounds):
        render(MEMORY["a product"])
    assert render("{{ messages[0].content }}") == "hello"
    assert first.returncode is not None, "it was waited for: no zombie"


def test_a_child_that_somebody_ended_is_replaced() -> None:
    render("x")
    os.kill(child._running[0].process.pid, signal.SIGKILL)
    assert render("{{ messages[0].content }}") == "hello"


def test_memory_of_earlier_requests_does_not_count_against_later_ones() -> None:
    large = [{"role": "user", "content": "가" * 4_000_000}]
    request = packed(("{{ messages[0].content|trim }}", large, {}))
    for _ in range(3):
        assert len(ask("render", (request,), SMALL)) == 12_000_000
        assert render("{{ messages[0].content }}") == "hello"


def test_threads_share_the_child() -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda number: render("{{ n }}", n=number), range(200)))
    assert texts == [str(number) for number in range(200)]


def test_an_interrupted_request_leaves_no_answer_for_the_next() -> None:
    render("x")
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        render(TIME["loops in loops"], Bounds(30, 64 * MIB, MIB))
    timer.join()
    assert render("{{ messages[0].content }}") == "hello"


def test_a_fork_has_a_child_of_its_own() -> None:
    render("x")
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.write(writer, render("{{ messages[0].content }}").encode())
            child.end()
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 100) == b"hello"
    os.close(reader)
    os.waitpid(process, 0)
    assert render("{{ messages[0].content }}") == "hello"


@pytest.mark.parametrize("busy", [False, True])
def test_the_child_ends_after_its_parent(busy: bool) -> None:
    """Also when the parent is killed, and while the child computes."""
    program = f"""
        import sys, threading, time
        from yeonma.bounded import child
        bounds = child.Bounds(1, 64 << 20, 1 << 20)
        child.ask("match", ("a", ["a"]), bounds)
        if {busy}:
            threading.Thread(target=child.ask, args=("match", ("(a+)+$", ["a" * 60 + "b"]), bounds)).start()
            time.sleep(0.2)
        print(child._running[0].process.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    number = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 60
    while _runs(number):
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_where_no_process_can_be_started_the_error_says_so() -> None:
    program = """
        import resource
        from yeonma.bounded import child
        from yeonma.errors import UserError
        resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))
        try:
            child.ask("match", ("a", ["a"]), child.Bounds(1, 64 << 20, 1 << 20))
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert "could not be started" in done.stdout and "ulimit" in done.stdout


def test_the_child_knows_no_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    child.end()
    render("x")
    with open(f"/proc/{child._running[0].process.pid}/environ", "rb") as file:
        assert b"hf_secret" not in file.read()


def test_memory_is_watched_where_the_kernel_does_not_limit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: `ps` tells the memory of the child."""
    assert resident_bytes(os.getpid()) > 10 * MIB
    assert resident_bytes(2**22 + 1) == 0
    child.end()
    monkeypatch.setattr(child._Child, "_resident", lambda self: resident_bytes(self.process.pid))
    slow = "{% set many = range(99999)|list * 99 %}" + TIME["loops in loops"]
    with pytest.raises(OverBounds, match="needs more than 40 MiB"):
        render(slow, Bounds(20, 40 * MIB, MIB))


def test_values_of_other_types_become_plain() -> None:
    class Text(str):
        pass

    values = {Text("a"): (1, True, None), "b": {2.5: object()}, "c": Text("한")}
    assert plain(values) == {"a": [1, True, None], "b": {2.5: "<object>"}, "c": "한"}
    assert render("{{ v.c }} {{ v.b[2.5] }}", v=values) == "한 <object>"
