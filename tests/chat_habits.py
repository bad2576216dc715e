"""Small chat templates with the habits of published ones, written for these tests, and what each makes a model write.

`Habit.written` is worked out by hand: the text that a model generates after the generation prompt, end token included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.tokenizers import byte_level

_CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}"

_TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{%- endif %}"
    "{{ '# Tools\n' }}{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{%- endfor %}{{ '<|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- endif %}"
)
_CALLS = (
    "{%- for call in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{%- endfor %}"
)
_SPLIT = (
    "{%- set content = m.content or '' %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
)


def _thinking(opening: str) -> str:
    """Drops earlier reasoning, writes a block in the last turn; `opening` is what the generation prompt adds."""
    return (
        _TOOLS + "{%- set ns = namespace(last=-1) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}"
        "{%- if m.role == 'user' %}" + _CHATML_TURN + "{%- elif m.role == 'tool' %}"
        "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{%- elif m.role == 'assistant' %}" + _SPLIT + "{{ '<|im_start|>assistant\n' }}"
        "{%- if loop.index0 > ns.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
        "{{ content.lstrip('\n') }}" + _CALLS + "{{ '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n" + opening + "' }}"
        "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    )


def _stripping(opening: str, closed: str) -> str:
    """Drops the reasoning of every turn. `opening` ends the generation prompt; `closed` stands before contents."""
    return (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<|Assistant|>"
        + closed
        + "' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|>" + opening + "' }}{% endif %}"
    )


@dataclass(frozen=True)
class Habit:
    """A chat template and what it makes a model write."""

    name: str
    template: str
    written: Callable[[str | None, str], str]
    """(reasoning or None, content) -> the text after the generation prompt."""
    reasoning: bool = True
    """Whether reasoning can be trained with it."""
    system: bool = True
    tools: bool = False
    specials: tuple[str, ...] = ()
    """Texts that are special tokens of its tokenizer besides those of ChatML."""
    added: tuple[str, ...] = ()
    """Texts that are tokens, but not special ones."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = byte_level(self.template)
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in self.added])
        tokenizer.add_tokens(
            [AddedToken(text, special=True, normalized=False) for text in self.specials], special_tokens=True
        )
        return tokenizer


def _plain(end: str = "<|im_end|>") -> Callable[[str | None, str], str]:
    return lambda _, content: content + end


def _block(reasoning: str | None, content: str) -> str:
    return f"<think>\n{reasoning or ''}\n</think>\n\n{content}<|im_end|>"


def _opened(reasoning: str | None, content: str) -> str:
    return f"{reasoning or ''}\n</think>\n\n{content}<|im_end|>"


def _harmony(reasoning: str | None, content: str) -> str:
    thought = f"<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant" if reasoning else ""
    return f"{thought}<|channel|>final<|message|>{content}<|return|>"


HABITS = (
    Habit(
        "chatml",
        "{% for m in messages %}"
        + _CHATML_TURN
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _plain(),
        reasoning=False,
    ),
    Habit(
        "system of its own",
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}"
        + _CHATML_TURN
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _plain(),
        reasoning=False,
    ),
    Habit(
        "brackets",
        "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'system' %}{{ '<<SYS>>' + m.content + '<</SYS>>' }}"
        "{% else %}{{ ' ' + m.content.strip() + '</s>' }}{% endif %}{% endfor %}",
        lambda _, content: " " + content + "</s>",
        reasoning=False,
        specials=("<s>", "</s>"),
    ),
    Habit(
        "headers and trimmed contents",
        "{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}",
        _plain("<|eot|>"),
        reasoning=False,
        specials=("<|header|>", "<|/header|>", "<|eot|>"),
    ),
    Habit(
        "no system, strict turns",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}",
        _plain(),
        reasoning=False,
        system=False,
    ),
    Habit(
        "block in the last turn",
        _thinking(""),
        _block,
        tools=True,
        added=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    Habit(
        "block of special tokens",
        _thinking(""),
        _block,
        tools=True,
        specials=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    Habit(
        "prompt opens the block, last turn keeps it",
        _thinking("<think>\n"),
        _opened,
        tools=True,
        added=("<think>", "</think>"),
    ),
    Habit(
        "prompt opens the block, every turn loses it",
        _stripping(opening="<think>\n", closed=""),
        _opened,
        specials=("<|User|>", "<|Assistant|>"),
        added=("<think>", "</think>"),
    ),
    Habit(
        "prompt opens the block without a line break, every turn closes it",
        _stripping(opening="<think>", closed="</think>"),
        lambda reasoning, content: f"{reasoning or ''}</think>{content}<|im_end|>",
        specials=("<|User|>", "<|Assistant|>"),
        added=("<think>", "</think>"),
    ),
    Habit(
        "block without line breaks in every turn",
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n<think>' + (m.reasoning_content or '') + '</think>' + m.content + '<|im_end|>\n' }}"
        "{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        lambda reasoning, content: f"<think>{reasoning or ''}</think>{content}<|im_end|>",
        added=("<think>", "</think>"),
    ),
    Habit(
        "block in every turn, reasoning only before calls",
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n<think>' }}"
        "{% if m.tool_calls %}{{ m.reasoning_content or '' }}{% endif %}"
        "{{ '</think>' + m.content + '<|im_end|>\n' }}"
        "{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        lambda reasoning, content: f"<think>{reasoning or ''}</think>{content}<|im_end|>",
        added=("<think>", "</think>"),
    ),
    Habit(
        "prompt opens the block, last turn opens it and never closes it",
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
        "{{ '<|im_start|>assistant\n<think>\n' + m.content + '<|im_end|>\n' }}"
        "{% elif m.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1].strip() + '<|im_end|>\n' }}"
        "{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        _opened,
        added=("<think>", "</think>"),
    ),
    Habit(
        "prompt closes the block, no turn has one",
        _TOOLS
        + "{%- for m in messages %}{%- if m.role == 'user' %}"
        + _CHATML_TURN
        + "{%- elif m.role == 'tool' %}"
        "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + (m.content or '') }}"
        + _CALLS
        + "{{ '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{%- if not enable_thinking %}{{ '<think>\n</think>\n' }}{%- endif %}{%- endif %}",
        _plain(),
        reasoning=False,
        tools=True,
        added=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    Habit(
        "prompt closes a channel of thought, no turn has one",
        "{%- for m in messages %}{{ '<|turn>' + m.role + '\n' + m.content + '<turn|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|turn>assistant\n' }}"
        "{%- if not thinking %}{{ '<|channel>thought\n<channel|>' }}{%- endif %}{%- endif %}",
        _plain("<turn|>"),
        reasoning=False,
        specials=("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    ),
    Habit(
        "channels",
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.thinking and loop.last %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        _harmony,
        specials=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    ),
    Habit(
        "brackets around reasoning, contents verbatim",
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% elif m.role == 'system' %}{{ '[SYS]' + m.content + '[/SYS]' }}"
        "{% else %}{% if m.reasoning_content %}{{ '[THINK]' + m.reasoning_content + '[/THINK]' }}{% endif %}"
        "{{ m.content + '</s>' }}{% endif %}{% endfor %}",
        lambda reasoning, content: (f"[THINK]{reasoning}[/THINK]" if reasoning else "") + content + "</s>",
        specials=("[INST]", "[/INST]", "[SYS]", "[/SYS]", "[THINK]", "[/THINK]", "</s>"),
    ),
    Habit(
        "tools before the last question, calls in a list",
        "{%- set ns = namespace(last=-1) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}"
        "{%- if m.role == 'user' %}{%- if tools and loop.index0 == ns.last %}"
        "{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
        "{{ '[INST] ' + m.content + '[/INST]' }}"
        "{%- elif m.role == 'system' %}{{ '[SYS]' + m.content + '[/SYS]' }}"
        "{%- elif m.role == 'tool' %}"
        "{{ '[TOOL_RESULTS] {\"content\": ' + m.content }}"
        "{{ ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
        "{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
        "{%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{%- endif %}"
        '{{ \'{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) }}'
        "{{ ', \"id\": \"' + call.id + '\"}' + (']' if loop.last else ', ') }}{%- endfor %}{{ '</s>' }}"
        "{%- else %}{{ ' ' + m.content + '</s>' }}{%- endif %}{%- endfor %}",
        lambda _, content: " " + content + "</s>",
        reasoning=False,
        tools=True,
        specials=(
            *("[INST]", "[/INST]", "[SYS]", "[/SYS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"),
        ),
    ),
    Habit(
        "tools in the first question, calls as bare JSON",
        "{%- set ns = namespace(shown=false) %}{%- for m in messages %}"
        "{{ '<|header|>' + ('ipython' if m.role == 'tool' else m.role) + '<|/header|>\n\n' }}"
        "{%- if m.role == 'user' and tools and not ns.shown %}{%- set ns.shown = true %}"
        '{{ \'Answer with {"name": function, "parameters": {}} or in words.\n\' }}'
        "{%- for tool in tools %}{{ (tool | tojson) + '\n' }}{%- endfor %}{%- endif %}"
        "{%- if m.tool_calls %}{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}"
        "{%- endif %}{%- set call = m.tool_calls[0].function %}"
        "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}' }}"
        "{%- else %}{{ m.content | trim }}{%- endif %}{{ '<|eot|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{%- endif %}",
        _plain("<|eot|>"),
        reasoning=False,
        tools=True,
        specials=("<|header|>", "<|/header|>", "<|eot|>"),
    ),
    # Habits of Korean families: EXAONE 3.5, EXAONE 4, HyperCLOVA X SEED Think; and reasoning that ends as an answer.
    Habit(
        "marks in square brackets, a system prompt of its own",
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ '[|system|]You are kind.[|endofturn|]\n' }}{% endif %}"
        "{{ '[|' + m.role + '|]' + m.content }}{{ '\n' if m.role == 'user' else '[|endofturn|]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}",
        _plain("[|endofturn|]"),
        reasoning=False,
        specials=("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    ),
    Habit(
        "marks in square brackets, prompt closes the block unless it is to think",
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{ '[|assistant|]\n' }}"
        "{%- if loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') + '[|endofturn|]\n' }}"
        "{%- else %}{{ '[|' + m.role + '|]\n' + m.content + '[|endofturn|]\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '[|assistant|]\n<think>\n' }}"
        "{%- if not enable_thinking %}{{ '\n</think>\n\n' }}{%- endif %}{%- endif %}",
        _plain("[|endofturn|]"),
        reasoning=False,
        specials=("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
        added=("<think>", "</think>"),
    ),
    Habit(
        "reasoning as a turn of its own, two tokens at the end",
        "{{ '<|im_start|>tool_list\n<|im_end|>\n' }}{% for m in messages %}"
        "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}"
        "{{ '<|im_start|>assistant/think\n' + m.reasoning_content + '<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
        "{{ '<|endofturn|>' if m.role == 'assistant' else '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}"
        "{{ '/think\n' if force_reasoning else '\n' if skip_reasoning else '' }}{% endif %}",
        lambda reasoning, content: (
            (f"/think\n{reasoning}<|im_end|>\n<|im_start|>assistant\n" if reasoning else "\n")
            + f"{content}<|im_end|><|endofturn|>"
        ),
        specials=("<|endofturn|>",),
    ),
    Habit(
        "reasoning between marks, ended as an answer is",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.reasoning and loop.last %}"
        "{{ '<|begin|>assistant<|think|>' + m.reasoning + '<|end|>' }}{% endif %}"
        "{{ '<|begin|>assistant<|content|>' + m.content + '<|end|>' }}"
        "{% else %}{{ '<|begin|>' + m.role + '<|content|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|begin|>assistant' }}{% endif %}",
        lambda _, content: f"<|content|>{content}<|end|>",
        reasoning=False,
        specials=("<|begin|>", "<|think|>", "<|content|>", "<|end|>"),
    ),
)

NAMES = [habit.name for habit in HABITS]


def rendered(habit: Habit, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """The text by transformers alone."""
    return str(habit.tokenizer().apply_chat_template(messages, tokenize=False, **kwargs))
