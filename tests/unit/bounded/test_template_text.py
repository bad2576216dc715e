"""A chat template writes in the child what transformers writes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from tests.chat_habits import HABITS
from tests.tokenizers import CHATML, LLAMA2_CHAT, byte_level
from yeonma.bounded import child, template_text
from yeonma.bounded.child import MIB, Bounds, OverBounds, Refused
from yeonma.bounded.template_text import TextsAhead, names_in, request_for, text_of
from yeonma.data.rows import Row
from yeonma.data.template import load_template
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.example_encoder import encode

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "한": "<&>"}}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be 'brief' & <kind>.\n"},
    {"role": "user", "content": "한글\x00\ud800 {{ x }} {% raw %}"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "why",
        "tool_calls": [{"function": {"a": 1}}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "b"}], "reasoning": "r"},
    {"role": "user", "content": "", "thinking": "t", "weight": 0.5, "ok": True},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "documents": [{"title": "t", "text": "x"}]}

TEMPLATES = {
    "every key": "{{ messages|tojson }}{{ tools|tojson(indent=2) }}{{ documents }}{{ bos_token }}{{ missing }}",
    "JSON's arguments": "{{ {'b': '한', 'a': 1}|tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=true) }}",
    "generation": "{% for m in messages %}\n  {%- set n = 1 %}\n{% generation %}{{ m.role }}{% set n = 2 %}"
    "{% endgeneration %}{{ n }}\n  {% if loop.first %}\n a\n {% endif %}\n{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "namespaces": "{% set ns = namespace(a=1, b='x') %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}"
    "{{ ns.a }}{{ ns.b }}{{ namespace({'c': 3}).c }}",
    "dictionaries": "{{ dict(a=1, b=2) }}{{ dict([('x', 1)]) }}{{ dict.fromkeys('ab', 3) }}",
    "blanks": "  {% if true %}\n   x\n  {% endif %}\n\n{{- ' y ' -}}\n {# a comment #} z\n",
    "methods": "{{ messages[0].content.strip().split(' ')[-1].upper() }}{{ messages[1]['role'][::-1] }}",
    "macros": "{% macro f(x, y=2) %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}{{ f(1) }}"
    "{% call f(3) %}c{% endcall %}",
    "filters": "{{ messages|map(attribute='role')|join(',') }}{{ messages|selectattr('ok')|list|length }}"
    "{{ 'a b'|title }}{{ 3.14159|round(2) }}{{ messages|groupby('role')|length }}",
    "autoescape is off": "{{ '<&>' }}{{ messages[0].content|e }}",
}
REFUSED = {
    "raise": "{{ raise_exception('no: ' ~ messages[1].role) }}",
    "raise a number": "{{ raise_exception(5) }}",
    "syntax": "{% for %}",
    "undefined": "{{ missing.a }}",
    "types": "{{ 'a' + 1 }}",
    "files": "{% include 'x' %}",
    "private attributes": "{{ ''.__class__.__mro__ }}",
    "a list changed": "{{ messages.append(1) }}",
    "a namespace's private name": "{% set ns = namespace(_x=1) %}",
    "set a namespace's private name": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "a long range": "{{ range(100001)|list }}",
    "division": "{{ 1 / 0 }}",
}


def written_text(template: object, turns: Any, **given: Any) -> str:
    return text_of(request_for(template, turns, **given))


def by_transformers(
    template: str, turns: list[dict[str, Any]], tools: Any, generate: bool, given: Any
) -> str:
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    (text,), _ = render_jinja_template(
        conversations=[turns], tools=tools, chat_template=template, add_generation_prompt=generate, **given
    )
    return str(text)


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_text_is_that_of_transformers(name: str, tools: Any) -> None:
    if name == "every key" and not hasattr(chat_template_utils, "_REASONING_FIELDS"):
        pytest.skip("this version of transformers gives templates reasoning under one name alone")
    text = written_text(TEMPLATES[name], TURNS, tools=tools, add_generation_prompt=True, variables=SPECIAL)
    assert text == by_transformers(TEMPLATES[name], TURNS, tools, True, SPECIAL)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_transformers_refuses_is_refused_with_its_words(name: str) -> None:
    with pytest.raises(Refused) as raised:
        written_text(REFUSED[name], TURNS, variables={})
    if (
        "namespace" not in name
    ):  # older versions of transformers do not refuse these, later ones in other words
        with pytest.raises(Exception) as expected:
            by_transformers(REFUSED[name], TURNS, None, False, {})
        assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("template", [CHATML, LLAMA2_CHAT, *(habit.template for habit in HABITS)])
@pytest.mark.parametrize("generate", [False, True])
def test_templates_with_the_habits_of_published_ones(template: str, generate: bool) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "because"},
        {"role": "user", "content": "q2"},
    ]
    given = {"bos_token": "<s>", "eos_token": "</s>", "enable_thinking": False}
    expected = by_transformers(template, turns, None, generate, given)
    assert written_text(template, turns, add_generation_prompt=generate, variables=given) == expected


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_arguments_do_not_replace_the_conversation(name: str) -> None:
    with pytest.raises(Refused, match=name):
        written_text(CHATML, TURNS, variables={name: []})


@pytest.mark.parametrize("template", [5, ["x"], {"a": 1}, None])
def test_what_is_no_text_is_no_template(template: object) -> None:
    with pytest.raises(Refused, match="it is no text"):
        written_text(template, TURNS, variables={})


def test_names_in_a_template() -> None:
    found = names_in(
        "{% set a = tools %}{% generation %}{{ messages[0]['role'] ~ m.tool_calls }}{% endgeneration %}"
    )
    assert found == ({"tools", "messages", "m"}, {"role", "tool_calls"}, {"a"})
    assert names_in("{% for %}") is None


def test_texts_ahead_are_those_rendered_one_by_one() -> None:
    requests = [request_for(CHATML, TURNS[:number], variables={}) for number in range(1, 5)]
    requests += [request_for(template, TURNS, variables={}) for template in REFUSED.values()]
    ahead = TextsAhead()
    ahead.prepare(requests[:-1])
    for request in requests:
        assert outcome(ahead.text_of, request) == outcome(text_of, request)


def test_where_texts_ahead_exceed_the_bounds_each_is_rendered_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_text, "CHAT_TEMPLATE", Bounds(0.3, 64 * MIB, MIB))
    loop = "{% if messages|length > 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = loop + "{% endif %}{{ messages|length }}"
    short, long = (request_for(template, TURNS[:number], variables={}) for number in (1, 2))
    ahead = TextsAhead()
    ahead.prepare([short, long])
    assert ahead.text_of(short) == "1"
    with pytest.raises(OverBounds, match="did not end within"):
        ahead.text_of(long)


def test_requests_are_equal_whatever_their_texts_share() -> None:
    role = "".join(["us", "er"])
    shared = [{"role": role, "content": role}, {"role": role, "content": "x" * 3}]
    apart = [{"role": "us" + "er"[:2], "content": str(["user"][0])}, {"role": "user", "content": "xxx"}]
    assert request_for("t", shared, variables={}) == request_for("t", apart, variables={})


def test_texts_ahead_serve_all_plain_rows_of_a_set() -> None:
    """Hardly any row waits for the child by itself."""
    template = load_template("chat")
    turns = [{"role": role, "content": f"{role} x"} for role in ("user", "assistant") * 2]
    rows = [Row(n + 1, {"messages": [{**turns[0], "content": f"{n}"}, *turns[1:]]}, "t") for n in range(200)]
    tokenizer = byte_level(CHATML)
    encode(
        [template.render(rows[0], None)], rows[:1], tokenizer, TokenRules(512)
    )  # the habits are known then
    before = child._running[0].requests
    encode([template.render(row, None) for row in rows], rows, tokenizer, TokenRules(512))
    assert child._running[0].requests - before <= 8


def outcome(function: Any, request: bytes) -> tuple[str, str]:
    try:
        return "text", function(request)
    except Refused as error:
        return "refused", str(error)
