"""The training template as an Ollama Modelfile: a TEMPLATE in Go's template language, stop texts and parameters.

Reference: https://docs.ollama.com/modelfile and https://docs.ollama.com/template. Ollama fills `.System` and
`.Prompt`, and no other fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from yeonma.data.template import Template
from yeonma.data.template_syntax import Placeholder, TemplatePart, Variant
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.shown import one_line
from yeonma.tokenization.chat_template import Chat, chat_of
from yeonma.tokenization.conversation import Conversation
from yeonma.tokenization.text_encoder import TextEncoder

PROMPT, SYSTEM = ".Prompt", ".System"
_PROBE = "Zq{number}qZ"


@dataclass(frozen=True)
class Modelfile:
    text: str
    remarks: tuple[str, ...] = ()
    """Limitations that the user should know."""


def modelfile(
    template: Template, encoder: TextEncoder, gguf: str, stops: Sequence[int], context_tokens: int
) -> Modelfile:
    """The input of `ollama create NAME -f Modelfile`. `gguf`: the file beside it; `stops`: ids that end an answer."""
    go, remarks = _go_template(template, encoder)
    lines = [f"FROM ./{gguf}"]
    if go is not None:
        lines.append(f'TEMPLATE """{go}{{{{ .Response }}}}"""')
    ends = [encoder.special_text[number] for number in stops if number in encoder.special_text]
    lines += [f'PARAMETER stop "{_escaped(end)}"' for end in ends]
    # by default Ollama samples and penalises repetition, which changes the trained answers
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {context_tokens}"]
    return Modelfile(
        "\n".join([*(f"# {one_line(remark)}" for remark in remarks), *lines, ""]), tuple(remarks)
    )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _go_template(template: Template, encoder: TextEncoder) -> tuple[str | None, list[str]]:
    if template.takes_turns:
        return None, [tr("no TEMPLATE: Ollama uses the chat template in the GGUF file, if it recognises it")]
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
        return "{{ .Prompt }}", [remark]
    remarks = []
    if len(usable) < len(filled):
        fields = ", ".join(usable[0][0].prompt_fields)
        remarks.append(tr("Ollama can use only the template's variants with {fields}", fields=fields))
    plain = next((entry for entry in usable if SYSTEM not in entry[1].values()), None)
    system = next((entry for entry in usable if SYSTEM in entry[1].values()), None)
    try:
        texts = [None if entry is None else _variant(*entry, encoder) for entry in (system, plain)]
    except UserError as error:
        return None, [tr("no TEMPLATE: {what}", what=error.problems[0].what)]
    if texts[0] is None or texts[1] is None:
        return texts[0] or texts[1], remarks
    return f"{{{{ if .System }}}}{texts[0]}{{{{ else }}}}{texts[1]}{{{{ end }}}}", remarks


def _names(fields: Sequence[str]) -> dict[str, str] | None:
    """Ollama's names for the fields: `system` or `system_prompt` is the system message, one other field the prompt.
    None if there are more fields."""
    others = [field for field in fields if field.lower() not in ("system", "system_prompt")]
    if len(others) != 1 or len(fields) > 2:
        return None
    return {field: PROMPT if field in others else SYSTEM for field in fields}


def _variant(variant: Variant, names: Mapping[str, str], encoder: TextEncoder) -> str:
    if variant.answer_role is None:
        return "".join(_go(part, names) for turn in variant.turns for part in turn.parts)
    with chat_of(encoder) as chat:
        return _turns(variant, names, encoder, chat)


def _turns(variant: Variant, names: Mapping[str, str], encoder: TextEncoder, chat: Chat) -> str:
    """The turns as rendered by the model's chat template, with a probe text for each field that is then replaced."""
    probes = {field: _PROBE.format(number=number) for number, field in enumerate(names)}
    messages = [
        {
            "role": str(turn.role),
            "content": "".join(
                probes[part.field] if isinstance(part, Placeholder) else part.text for part in turn.parts
            ),
        }
        for turn in variant.turns
    ]
    text = chat.prompt(Conversation(messages), "TEMPLATE")
    start = "".join(encoder.special_text.get(number, "") for number in encoder.start_ids)
    text = _literal(text.removeprefix(start))  # Ollama adds it
    for field, probe in probes.items():
        text = text.replace(probe, f"{{{{ {names[field]} }}}}")
    return text


def _go(part: TemplatePart, names: Mapping[str, str]) -> str:
    return f"{{{{ {names[part.field]} }}}}" if isinstance(part, Placeholder) else _literal(part.text)


def _literal(text: str) -> str:
    """Escapes text for Go templates and Modelfiles: braces would start an action, three quotes would end the text."""
    text = text.replace("{", "{{ `{` }}")
    return text.replace('"', '{{ `"` }}') if '""' in text or text[:1] == '"' else text
