"""The training template as an Ollama Modelfile: a TEMPLATE in Go's template language, stop texts and parameters.

Reference: https://docs.ollama.com/modelfile and https://docs.ollama.com/template. Ollama fills `.System` and `.Prompt`,
or the conversation as `.Messages`, and no other fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from yeonma.data.rows import Row
from yeonma.data.template import Template
from yeonma.data.template_syntax import Placeholder, TemplatePart, Variant
from yeonma.errors import UserError
from yeonma.export.go_template import execute, literal
from yeonma.export.role_frames import (
    CONTENTS,
    WITH_BLANKS,
    MessagesTemplate,
    TrialPrompt,
    ids_in_ollama,
    messages_template,
    without_added,
)
from yeonma.messages import tr
from yeonma.shown import one_line
from yeonma.tokenization.chat_template import PROBE, chat_of
from yeonma.tokenization.chat_template_export import full_prompt_ids
from yeonma.tokenization.conversation import Conversation
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.text_encoder import TextEncoder

PROMPT, SYSTEM = ".Prompt", ".System"


@dataclass(frozen=True)
class Modelfile:
    text: str
    remarks: tuple[str, ...] = ()
    """Limitations that the user should know."""
    trials: Sequence[TrialPrompt] = ()
    """Prompts of TEMPLATE that were compared with training."""


@dataclass(frozen=True)
class _Written:
    """A TEMPLATE in Go, or None."""

    go: str | None
    remarks: Sequence[str] = ()
    trials: Sequence[TrialPrompt] = ()


def modelfile(
    template: Template,
    encoder: TextEncoder,
    gguf: str,
    stops: Sequence[int],
    rules: TokenRules,
    adds_start: bool | None = None,
) -> Modelfile:
    """The input of `ollama create NAME -f Modelfile`.

    `gguf`: the file beside it; `stops`: ids that end an answer; `adds_start`: whether llama.cpp puts the start token
    before every prompt of the file, None if it does as the tokenizer.
    """
    written = _written(template, encoder, rules, _added(encoder, adds_start))
    lines = [f"FROM ./{gguf}"]
    if written.go is not None:
        lines.append(f'TEMPLATE """{written.go}"""')
    ends = [encoder.special_text[number] for number in stops if number in encoder.special_text]
    lines += [f"PARAMETER stop {_quoted(end)}" for end in ends]
    # by default Ollama samples and penalises repetition, which changes the trained answers
    lines += [
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {rules.cutoff_len}",
    ]
    remarks = [f"# {one_line(remark)}" for remark in written.remarks]
    return Modelfile("\n".join([*remarks, *lines, ""]), tuple(written.remarks), written.trials)


def _added(encoder: TextEncoder, adds_start: bool | None) -> str:
    """What llama.cpp itself puts before every prompt."""
    if adds_start is None:
        return "".join(encoder.special_text.get(number, "") for number in encoder.start_ids)
    bos = encoder.bos_id
    return encoder.special_text.get(bos, "") if adds_start and bos is not None else ""


def _quoted(text: str) -> str:
    """Ollama takes the quotes off and reads no escapes, and a quote before a blank would end the text."""
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def _written(template: Template, encoder: TextEncoder, rules: TokenRules, added: str) -> _Written:
    if template.takes_turns:
        return _conversations(messages_template(template, encoder, rules, added))
    filled = [(variant, _names(variant.prompt_fields)) for variant in template.variants]
    usable = [(variant, names) for variant, names in filled if names is not None]
    if not usable:
        fields = ", ".join(
            dict.fromkeys(name for variant in template.variants for name in variant.prompt_fields)
        )
        remark = tr(
            "Ollama cannot fill the template's several fields ({fields}): send the whole prompt as text",
            fields=fields,
        )
        return _Written("{{ .Prompt }}{{ .Response }}", [remark])
    remarks = []
    if len(usable) < len(filled):
        fields = ", ".join(usable[0][0].prompt_fields)
        remarks.append(tr("Ollama can use only the template's variants with {fields}", fields=fields))
    plain = next((entry for entry in usable if SYSTEM not in entry[1].values()), None)
    system = next((entry for entry in usable if SYSTEM in entry[1].values()), None)
    try:
        with_system, alone = (
            None if entry is None else _variant(*entry, encoder, rules, added) for entry in (system, plain)
        )
        go = (with_system or alone or "") + "{{ .Response }}"
        if with_system is not None and alone is not None:
            go = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{alone}{{{{ end }}}}{{{{ .Response }}}}"
        trials = [
            trial
            for entry in (system, plain)
            if entry is not None
            for trial in _trials(go, template, *entry, encoder, rules, added)
        ]
    except UserError as error:
        return _Written(None, [_without(error.problems[0].what)])
    return _Written(go, remarks, trials)


def _without(why: str) -> str:
    return tr("no TEMPLATE: {why}; Ollama uses the chat template in the GGUF file", why=why)


def _conversations(messages: MessagesTemplate) -> _Written:
    if messages.text is None:
        return _Written(None, [_without(messages.why)])
    remarks = []
    if not messages.takes_system:
        remarks.append(
            tr(
                "TEMPLATE refuses system messages: the model's chat template has none, or not before the other turns"
            )
        )
    if messages.keeps_reasoning:
        remarks.append(
            tr(
                "training leaves the reasoning of earlier answers out, and TEMPLATE writes what it is sent: send "
                "earlier answers without it"
            )
        )
    return _Written(messages.text, remarks, messages.trials)


def _names(fields: Sequence[str]) -> dict[str, str] | None:
    """Ollama's names for the fields: `system` or `system_prompt` is the system message, one other field the prompt.
    None if there are more fields."""
    others = [field for field in fields if field.lower() not in ("system", "system_prompt")]
    if len(others) != 1 or len(fields) > 2:
        return None
    return {field: PROMPT if field in others else SYSTEM for field in fields}


def _trials(
    go: str,
    template: Template,
    variant: Variant,
    names: Mapping[str, str],
    encoder: TextEncoder,
    rules: TokenRules,
    added: str,
) -> Iterator[TrialPrompt]:
    """Prompts of TEMPLATE with the ids of training. Raises UserError if it gives others."""
    texts = (*CONTENTS, *WITH_BLANKS)
    for first in range(len(texts)):
        fields = {
            name: texts[(first + number) % len(texts)] for number, name in enumerate(variant.prompt_fields)
        }
        row = Row(1, fields, "TEMPLATE")
        try:
            ids = full_prompt_ids(
                template.render(row, None, with_answer=False), row, encoder.tokenizer, rules
            )
        except UserError:  # a text that training refuses, too
            continue
        prompt = execute(go, {names[name][1:]: text for name, text in fields.items()})
        if ids_in_ollama(prompt, encoder, added) != ids:
            raise UserError(tr("it would give other token ids than training"))
        yield prompt, ids


def _variant(
    variant: Variant, names: Mapping[str, str], encoder: TextEncoder, rules: TokenRules, added: str
) -> str:
    if variant.answer_role is None:
        start = literal(without_added("", encoder, added))
        return start + "".join(_go(part, names) for turn in variant.turns for part in turn.parts)
    return _turns(variant, names, encoder, rules, added)


def _turns(
    variant: Variant, names: Mapping[str, str], encoder: TextEncoder, rules: TokenRules, added: str
) -> str:
    """The turns as rendered by the model's chat template, with a probe text for each field that is then replaced."""
    probes = {field: PROBE.format(number=number) for number, field in enumerate(names)}
    messages = [
        {
            "role": str(turn.role),
            "content": "".join(
                probes[part.field] if isinstance(part, Placeholder) else part.text for part in turn.parts
            ),
        }
        for turn in variant.turns
    ]
    with chat_of(encoder, rules.thinking, rules.chat_template_kwargs) as chat:
        text = chat.prompt(Conversation(messages, (), chat.kwargs), "TEMPLATE")
    text = literal(without_added(text, encoder, added))
    for field, probe in probes.items():
        text = text.replace(probe, f"{{{{ {names[field]} }}}}")
    return text


def _go(part: TemplatePart, names: Mapping[str, str]) -> str:
    return f"{{{{ {names[part.field]} }}}}" if isinstance(part, Placeholder) else literal(part.text)
