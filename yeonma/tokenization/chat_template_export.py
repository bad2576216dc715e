"""The training template as a chat template, so that other tools prompt with the tokens of training.

`apply_chat_template`, vLLM and similar tools take a list of messages. The user message fills the template's field; if
there are several fields, its content is a flat JSON object of texts. Other tools treat special-token text in data as
special tokens; Yeonma does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yeonma.bounded.template_text import request_for, text_of
from yeonma.data.columns import Columns, column_of, field_text
from yeonma.data.rows import Row
from yeonma.data.template import Rendered, Template
from yeonma.data.template_syntax import Placeholder, TemplatePart, Variant
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.tokenization.chat_template import chat_of
from yeonma.tokenization.conversation import FIXED_DATE, ChatMessage, Conversation, text_by_tokenizer
from yeonma.tokenization.example import DEFAULT_RULES, TokenRules
from yeonma.tokenization.example_encoder import encode_prompts
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.tokenization.trained_turns import prompt_part

BASE_CHAT_TEMPLATE = "base_chat_template.jinja"
"""The file for the base's own chat template, next to an exported one; empty if the base has none."""
MARK = f"{{#- A training template, for messages; the base model's own chat template is in {BASE_CHAT_TEMPLATE} -#}}\n"
"""The first line of an exported chat template."""

_LEAD_PROBES = ("x", "가", "\n", "###", "x  y")
_TRIAL_TEXTS = ("x", "서울의 아침, -3 °C.", '  A storm\n\nclosed "it" {x} {{y}}\n', "\n\\ é 😀\tend ")
_UNLIMITED = 2**40


@dataclass(frozen=True)
class ExportedChatTemplate:
    """A chat template that gives the tokens of training in a trial; or None, and why there is none."""

    text: str | None
    why: str = ""


def export_chat_template(
    template: Template, tokenizer: Any, rules: TokenRules = DEFAULT_RULES
) -> ExportedChatTemplate:
    """The chat template for `template`, tried on a few texts. `tokenizer` has the base's own chat template."""
    if template.is_text:
        return ExportedChatTemplate(None, tr("it was trained on whole texts, without prompts"))
    text = chat_template_for(template, tokenizer, rules)
    if text is None:
        return ExportedChatTemplate(None, tr("the base model has no chat template to write turns with"))
    reason = why_not_exported(template, tokenizer, text, rules)
    return ExportedChatTemplate(None if reason else text, reason)


def why_not_exported(template: Template, tokenizer: Any, text: str, rules: TokenRules = DEFAULT_RULES) -> str:
    """Why the chat template `text` does not give the tokens of training in a trial; empty if it does."""
    tried = 0
    try:
        for conversation, ids in trials(template, tokenizer, rules):
            if chat_ids(tokenizer, conversation, text) != ids:
                return tr("a chat template cannot reproduce the tokens of training with this tokenizer")
            tried += 1
    except Exception as error:  # Jinja may raise anything
        return tr("it cannot be written as a chat template ({error:.200})", error=str(error).splitlines()[0])
    return "" if tried else tr("the base model's chat template refuses every trial")


def trials(
    template: Template, tokenizer: Any, rules: TokenRules = DEFAULT_RULES
) -> Iterator[tuple[Conversation, list[int]]]:
    """A few rows for other tools, and the prompt ids of training."""
    for row in _trial_rows(template):
        try:
            rendered = template.render(row, None, with_answer=False)
            ids = full_prompt_ids(rendered, row, tokenizer, rules)
        except UserError:  # a conversation that the template or the base's chat template refuses
            continue
        yield conversation_of(template, row, None, rendered, tokenizer, rules), ids


def full_prompt_ids(
    rendered: Rendered, row: Row, tokenizer: Any, rules: TokenRules = DEFAULT_RULES
) -> list[int]:
    """The ids of the row's prompt as trained, but without a length limit. Raises UserError as `encode_prompts`."""
    unlimited = replace(rules, cutoff_len=_UNLIMITED)
    return encode_prompts([rendered], [row], tokenizer, unlimited, 1)[0].tolist()


def chat_ids(tokenizer: Any, conversation: Conversation, chat_template: str | None = None) -> list[int]:
    """The prompt ids that other tools use: those by transformers' `apply_chat_template`.

    Raises OverBounds and Refused.
    """
    tools = list(conversation.tools) or None
    request = request_for(
        tokenizer.get_chat_template(chat_template, tools=tools),
        conversation.messages,
        tools=tools,
        add_generation_prompt=True,
        variables={**tokenizer.special_tokens_map, **conversation.kwargs},
    )
    return list(tokenizer(text_of(request), add_special_tokens=False)["input_ids"])


def _trial_rows(template: Template) -> Iterator[Row]:
    """Rows for every variant, with texts that test token borders, JSON and Jinja."""
    if template.takes_turns:
        for first, last in zip(_TRIAL_TEXTS, reversed(_TRIAL_TEXTS), strict=True):
            question, answer = ({"role": role, "content": first} for role in ("user", "assistant"))
            for turns in ([question], [question, answer, {"role": "user", "content": last}]):
                yield Row(1, template.row_of_turns(turns), "trial")
                with_system = [{"role": "system", "content": last}, *turns]
                yield Row(1, template.row_of_turns(with_system), "trial")
        return
    for variant in template.variants:
        for number in range(len(_TRIAL_TEXTS)):
            texts = _TRIAL_TEXTS[number:] + _TRIAL_TEXTS[:number]
            fields = enumerate(variant.prompt_fields)
            yield Row(1, {name: texts[index % len(texts)] for index, name in fields}, "trial")


def chat_template_for(template: Template, tokenizer: Any, rules: TokenRules = DEFAULT_RULES) -> str | None:
    """Jinja that renders messages as the template's prompts. `tokenizer` has the base's own chat template.

    The arguments that the base's chat template was trained with are its defaults. Returns None if turns need the base's
    chat template and there is none.
    """
    encoder = TextEncoder.of(tokenizer)
    base = base_chat_template(tokenizer)
    if template.has_turns and not base:
        return None
    base = _defaults(rules) + base
    if template.takes_turns:
        system = _system_turn(template)
        return _with_fixed_date(base, system + _lead_of_turns(tokenizer, encoder) + base)
    fields = prompt_fields(template)
    head = _read_message(fields, template)
    branches = [
        "{%- "
        + ("if " if number == 0 else "elif ")
        + " and ".join(
            f"without_blanks(fields[{_quoted(name)}] or '')" for name in variant.prompt_fields or ()
        )
        + " -%}\n"
        + (_turns(variant) if variant.answer_role else _plain(variant, tokenizer))
        for number, variant in enumerate(template.variants)
        if variant.prompt_fields
    ]
    constant = [variant for variant in template.variants if not variant.prompt_fields]
    fallback = (
        (_turns(constant[0]) if constant[0].answer_role else _plain(constant[0], tokenizer))
        if constant
        else "{{- raise_exception(" + _quoted(f"the message lacks a field: {_needs(fields)}") + ") -}}\n"
    )
    selection = "".join(branches) + "{%- else -%}\n" + fallback + "{%- endif -%}\n" if branches else fallback
    if not template.has_turns:
        return head + "{%- set own = namespace(text='', turns=none) -%}\n" + selection + _write(encoder)
    return _with_fixed_date(
        base,
        head
        + "{%- set own = namespace(text='', turns=none) -%}\n"
        + selection
        + ("{%- if own.turns is none -%}\n" + _write(encoder) + "{%- else -%}\n")
        + "{%- set messages = own.turns -%}\n"
        + _lead_of_turns(tokenizer, encoder)
        + base
        + "{%- endif -%}",
    )


def base_chat_template(tokenizer: Any) -> str:
    """The tokenizer's own chat template (of several, the default one); empty if it has none."""
    chat_template = tokenizer.chat_template
    return str((chat_template.get("default") if isinstance(chat_template, dict) else chat_template) or "")


def _defaults(rules: TokenRules) -> str:
    """Jinja that sets the arguments of training where the caller gives none."""
    return "".join(
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {_jinja(value)} -%}}{{%- endif -%}}\n"
        for name, value in (rules.chat_template_kwargs or {}).items()
    )


def _jinja(value: object) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else _quoted(value)
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )


def _system_turn(template: Template) -> str:
    """Jinja that puts the template's own system turn before the messages, or nothing."""
    first = template.variants[0].turns[:1]
    if not first or first[0].role != "system":
        return ""
    text = "".join(part.text for part in first[0].parts if not isinstance(part, Placeholder))
    if any(isinstance(part, Placeholder) for part in first[0].parts):
        return ""
    message = f"{{'role': 'system', 'content': {_quoted(text)}}}"
    return f"{{%- set messages = [{message}] + messages -%}}\n"


def conversation_of(
    template: Template,
    row: Row,
    columns: Columns,
    rendered: Rendered,
    tokenizer: Any,
    rules: TokenRules = DEFAULT_RULES,
) -> Conversation:
    """The row for other tools: its turns, without the final answer and the template's own system turn; or one user
    message. Raises UserError as `Chat.conversation`."""
    if not template.takes_turns:
        return Conversation(_user_message(template, row, columns))
    encoder = TextEncoder.of(tokenizer)
    with chat_of(encoder, rules.thinking, rules.chat_template_kwargs) as chat:
        conversation = chat.conversation(prompt_part(rendered), row.place)
    own = bool(_system_turn(template))
    return replace(conversation, messages=list(conversation.messages)[own:])


def _user_message(template: Template, row: Row, columns: Columns) -> list[ChatMessage]:
    fields = prompt_fields(template)
    texts = {name: field_text(row, column_of(name, columns, template.answer_field)) for name in fields}
    if len(fields) == 1:
        return [{"role": "user", "content": texts[fields[0]] or ""}]
    filled = {name: text for name, text in texts.items() if text is not None}
    return [{"role": "user", "content": json.dumps(filled, ensure_ascii=False)}]


def prompt_fields(template: Template) -> list[str]:
    """The fields that the user message fills, in the template's order; none for a turn list."""
    return list(dict.fromkeys(name for variant in template.variants for name in variant.prompt_fields))


def _with_fixed_date(base: str, text: str) -> str:
    """`text`, preceded by the fixed date of training if the base's chat template writes a date."""
    return FIXED_DATE + text if "strftime_now" in base else text


def _quoted(text: str) -> str:
    """A text as a literal of Jinja; llama.cpp knows none of JSON's escapes by number."""
    for character, escaped in {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}.items():
        text = text.replace(character, escaped)
    return f'"{text}"'


def _needs(fields: Sequence[str]) -> str:
    if len(fields) == 1:
        return f"one user message with the text of {fields[0]}"
    return "one user message with a JSON object of the texts " + ", ".join(fields)


def _expression(parts: Sequence[TemplatePart]) -> str:
    words = [
        f"fields[{_quoted(part.field)}]" if isinstance(part, Placeholder) else _quoted(part.text)
        for part in parts
    ]
    return " ~ ".join(words) or "''"


def _plain(variant: Variant, tokenizer: Any) -> str:
    prompt = [part for turn in variant.turns for part in turn.parts]
    answer = _answer(variant.answer)
    end = _quoted(tokenizer.eos_token or "")
    return (
        f"{{%- set own.text = {_expression(prompt)} -%}}\n"
        f"{{%- if answer is not none -%}}{{%- set own.text = own.text ~ {answer} ~ {end} -%}}{{%- endif -%}}\n"
    )


def _turns(variant: Variant) -> str:
    turns = ", ".join(
        f"{{'role': {_quoted(str(turn.role))}, 'content': {_expression(turn.parts)}}}"
        for turn in variant.turns
    )
    answer = _answer(variant.answer)
    return (
        f"{{%- set own.turns = [{turns}] -%}}\n"
        "{%- if answer is not none -%}"
        f"{{%- set own.turns = own.turns + [{{'role': 'assistant', 'content': {answer}}}] -%}}{{%- endif -%}}\n"
    )


def _answer(parts: Sequence[TemplatePart]) -> str:
    words = ["answer" if isinstance(part, Placeholder) else _quoted(part.text) for part in parts]
    return " ~ ".join(words)


def _write(encoder: TextEncoder) -> str:
    """Jinja that writes the text, after what the tokenizer itself would put before it."""
    before_space, lead = (_lead(encoder, [start + text for text in _LEAD_PROBES]) for start in (" ", ""))
    if before_space == lead:
        return "{{- " + _quoted(lead) + " ~ own.text -}}\n"
    condition = _quoted(before_space) + " if own.text.startswith(' ') else " + _quoted(lead)
    return "{{- (" + condition + ") ~ own.text -}}\n"


def _lead(encoder: TextEncoder, texts: Sequence[str]) -> str:
    """The text to put before a text so that other tools, which add no start tokens, get the same ids: the text of the
    start tokens, and perhaps a space for a dummy prefix. If neither works, the trial fails later."""
    start = "".join(encoder.special_text.get(number, "") for number in encoder.start_ids)
    for lead in (start, start + " "):
        if encoder.batch_without_start([lead + text for text in texts]) == encoder.batch(texts):
            return lead
    return start


def _lead_of_turns(tokenizer: Any, encoder: TextEncoder) -> str:
    """Jinja that writes the start tokens, if the base's chat template does not."""
    if not encoder.start_ids:
        return ""
    try:
        text = text_by_tokenizer(tokenizer, Conversation([{"role": "user", "content": "x"}]), True)
    except Exception:  # the base's template may raise anything
        return ""
    lead = "" if encoder.batch_without_start([text]) == encoder.batch([text]) else _lead(encoder, [text])
    return "{{- " + _quoted(lead) + " -}}\n" if lead else ""


def _read_message(fields: Sequence[str], template: Template) -> str:
    """Jinja that sets `fields`, the texts by name, and `answer`, the assistant's text or none."""
    needs = _quoted(f"this model takes {_needs(fields)}")
    head = _WITHOUT_BLANKS + _MESSAGE.replace("@NEEDS@", needs)
    if len(fields) == 1:
        return head + f"{{%- set fields = {{{_quoted(fields[0])}: said.content}} -%}}\n"
    single = next((v.prompt_fields[0] for v in template.variants if len(v.prompt_fields) == 1), None)
    plain = (
        f"{{%- set given.f{fields.index(single)} = said.content -%}}"
        if single
        else _AT_START
        + "".join(f"{{%- set given.f{number} = said.content -%}}" for number in range(len(fields)))
        + "{%- else -%}{{- raise_exception(@NEEDS@) -}}{%- endif -%}"
    )
    keep = "".join(
        f"{{%- {'elif' if number else 'if'} json.name == {_quoted(name)} -%}}"
        f"{{%- set given.f{number} = json.text -%}}\n"
        for number, name in enumerate(fields)
    )
    text = _CHARACTER + _JSON
    for word, jinja in {
        "@EMPTY@": ", ".join(f"f{number}=none" for number in range(len(fields))),
        "@PLAIN@": plain,
        "@KEEP@": keep + "{%- endif -%}",
        "@FIELDS@": ", ".join(f"{_quoted(name)}: given.f{number}" for number, name in enumerate(fields)),
        "@NEEDS@": needs,
    }.items():
        text = text.replace(word, jinja)
    return head + text


# What follows keeps to the Jinja that transformers and llama.cpp share, and minja, which was not run. Those two count
# a text's bytes, and have no `**`, no `%c`, no loop over a text and no text[n]; their `trim` knows ASCII alone.

BLANKS = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680"
    + "".join(map(chr, range(0x2000, 0x200B)))
    + "\u2028\u2029\u202f\u205f\u3000"
)
"""The characters that Python's str.isspace takes for blank."""

_WITHOUT_BLANKS = f"""\
{{%- macro without_blanks(text) -%}}
{{%- set left = namespace(text=text) -%}}
{{%- for blank in [{", ".join(map(_quoted, BLANKS))}] -%}}
{{%- set left.text = left.text.replace(blank, '') -%}}
{{%- endfor -%}}
{{{{- left.text -}}}}
{{%- endmacro -%}}
"""

_MESSAGE = """\
{%- set said = namespace(content='', answer=none) -%}
{%- if (messages|length != 1 and messages|length != 2) or messages[0]['role'] != 'user'
       or (messages|length == 2 and messages[1]['role'] != 'assistant') -%}
{{- raise_exception(@NEEDS@) -}}
{%- endif -%}
{%- for message in messages -%}
{%- set one = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set one.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}{%- set one.text = one.text ~ part['text'] -%}{%- endfor -%}
{%- endif -%}
{%- if loop.first -%}{%- set said.content = one.text -%}{%- else -%}{%- set said.answer = one.text -%}{%- endif -%}
{%- endfor -%}
{%- set answer = said.answer -%}
"""

# llama.cpp's server renders this one message when it starts, and stops if that fails. It alone counts bytes.
_AT_START = "{%- if said.content == 'test' and '가'|length > 1 -%}"

# A character by its number. Where a text is bytes, they are cut out of other characters: `others` has the last bytes
# 128 to 191, and first_of_N the first bytes of characters of N bytes.
_CHARACTER = f"""\
{{%- set ascii = {_quoted("?" + "".join(map(chr, range(1, 128))))} -%}}
{{%- set first_of_2 = {_quoted("".join(chr(0xBF + 0x40 * number) for number in range(30)))} -%}}
{{%- set first_of_3 = {_quoted("".join(map(chr, (0x915, *range(0x1100, 0xF101, 0x1000)))))} -%}}
{{%- set first_of_4 = {_quoted("".join(map(chr, (0x1F600, *range(0x40000, 0x110000, 0x40000)))))} -%}}
{{%- set others = {_quoted("".join(chr(0xAC00 + number) for number in range(64)))} -%}}
{{%- macro other(number) -%}}{{{{- others[3 * number + 2:3 * number + 3] -}}}}{{%- endmacro -%}}
{{%- macro character(code) -%}}
{{%- set c = (code / 64)|int -%}}
{{%- set b = (code / 4096)|int -%}}
{{%- set a = (code / 262144)|int -%}}
{{%- if code < 128 -%}}{{{{- ascii[code:code + 1] -}}}}
{{%- elif others|length == 64 -%}}{{{{- '%c'|format(code) -}}}}
{{%- elif code < 2048 -%}}{{{{- first_of_2[2 * c - 4:2 * c - 3] ~ other(code % 64) -}}}}
{{%- elif code < 65536 -%}}{{{{- first_of_3[3 * b:3 * b + 1] ~ other(c % 64) ~ other(code % 64) -}}}}
{{%- else -%}}{{{{- first_of_4[4 * a:4 * a + 1] ~ other(b % 64) ~ other(c % 64) ~ other(code % 64) -}}}}
{{%- endif -%}}
{{%- endmacro -%}}
"""

# Reads {"name": "text", ...}. With escaped backslashes and quotes out of the way, every quote is a border: what stands
# between two of them is by turns a gap and a text. `at`: what is expected next.
_JSON = """\
{%- set given = namespace(@EMPTY@) -%}
{%- set bare = without_blanks(said.content) -%}
{%- if bare and not bare.startswith('{') -%}
@PLAIN@
{%- else -%}
{%- set json = namespace(at='open', inside=false, name='', text='', high=0, ok=true) -%}
{%- set hex = '0123456789abcdefABCDEF' -%}
{%- for part in said.content.replace('\\\\\\\\', '\\\\u005c').replace('\\\\"', '\\\\u0022').split('"') -%}
{%- if json.inside -%}
{%- set json.text = '' -%}
{%- for piece in part.replace('\\\\/', '/').replace('\\\\n', '\\n').replace('\\\\t', '\\t').replace('\\\\r', '\\r')
        .replace('\\\\b', '\\b').replace('\\\\f', '\\f').split('\\\\u') -%}
{%- if '\\\\' in piece -%}{%- set json.ok = false -%}{%- endif -%}
{%- if loop.first -%}{%- set json.text = piece -%}
{%- elif piece|length > 3 and piece[0:1] in hex and piece[1:2] in hex and piece[2:3] in hex and piece[3:4] in hex -%}
{%- set code = piece[0:4]|int(0, 16) -%}
{%- set rest = piece[4:piece|length] -%}
{%- if json.high -%}
{%- if code < 56320 or code > 57343 -%}{%- set json.ok = false -%}
{%- else -%}
{%- set json.text = json.text ~ character(65536 + (json.high - 55296) * 1024 + code - 56320) ~ rest -%}
{%- endif -%}
{%- set json.high = 0 -%}
{%- elif code >= 55296 and code < 56320 -%}
{%- set json.high = code -%}
{%- if rest -%}{%- set json.ok = false -%}{%- endif -%}
{%- elif code == 0 or (code >= 56320 and code <= 57343) -%}{%- set json.ok = false -%}
{%- else -%}{%- set json.text = json.text ~ character(code) ~ rest -%}
{%- endif -%}
{%- else -%}{%- set json.ok = false -%}
{%- endif -%}
{%- endfor -%}
{%- if json.high -%}{%- set json.ok = false -%}{%- endif -%}
{%- if json.at == 'name' -%}{%- set json.name = json.text -%}{%- set json.at = 'colon' -%}
{%- elif json.at == 'text' -%}{%- set json.at = 'comma' -%}
@KEEP@
{%- else -%}{%- set json.ok = false -%}
{%- endif -%}
{%- else -%}
{%- set gap = part.replace(' ', '').replace('\\t', '').replace('\\n', '').replace('\\r', '') -%}
{%- if json.at == 'open' and gap == '{' -%}{%- set json.at = 'name' -%}
{%- elif json.at == 'open' and gap == '{}' -%}{%- set json.at = 'end' -%}
{%- elif json.at == 'colon' and gap == ':' -%}{%- set json.at = 'text' -%}
{%- elif json.at == 'colon' and (gap == ':null,' or gap == ':null}') and 'null' in part -%}
{%- set json.text = none -%}{%- set json.at = 'name' if gap == ':null,' else 'end' -%}
@KEEP@
{%- elif json.at == 'comma' and gap == ',' -%}{%- set json.at = 'name' -%}
{%- elif json.at == 'comma' and gap == '}' -%}{%- set json.at = 'end' -%}
{%- else -%}{%- set json.ok = false -%}
{%- endif -%}
{%- endif -%}
{%- set json.inside = not json.inside -%}
{%- endfor -%}
{%- if json.at != 'end' or not json.ok -%}{{- raise_exception(@NEEDS@) -}}{%- endif -%}
{%- endif -%}
{%- set fields = {@FIELDS@} -%}
"""
