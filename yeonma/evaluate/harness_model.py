"""A policy as a model of lm-evaluation-harness (`lm_eval`): what its class for transformers does, over forests.

Tokens are those of the harness's own class (`HFLM`): blanks at the end of a context belong to the continuation, both
are encoded together and split at the length of the context, an empty context is the begin-of-sequence token, what is
too long loses its beginning, and a text for perplexity is cut into windows without overlap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from yeonma.bounded.child import OverBounds, Refused
from yeonma.errors import UserError
from yeonma.evaluate.harness_requests import Continuation, OpenQuestion, RequestRunner, seeded
from yeonma.generation.sampling import LogitChanges, SamplingParams
from yeonma.messages import tr
from yeonma.tokenization.conversation import Conversation, text_by_tokenizer

MAX_GEN_TOKS = 256
"""Tokens of an answer where a task names no limit, as in the harness."""
GENERATION_KEYS = (
    *("until", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
)
"""The `generation_kwargs` of tasks that are followed."""
WITHOUT_EFFECT: Mapping[str, object] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""Others, with the value that changes nothing."""
DEFAULT_TOP_K = 50
"""Of transformers, where sampling names none."""
MARK = "YEONMA_CONTINUES_HERE "
"""Stands where a message ends that the model is to continue: what a chat template writes after it is left out."""


@dataclass(frozen=True)
class GenerationDefaults:
    """What of a model's generation_config.json holds where a task says nothing."""

    stop_ids: tuple[int, ...]
    repetition_penalty: float
    top_p: float
    top_k: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> GenerationDefaults:
        config = model.generation_config
        end = config.eos_token_id
        ends = [] if end is None else [end] if isinstance(end, int) else [int(number) for number in end]
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

        def value(name: str, default: float) -> float:
            given = getattr(config, name, None)
            return default if given is None else float(given)

        return cls(
            tuple(sorted({*ends, *own})),
            value("repetition_penalty", 1.0),
            value("top_p", 1.0),
            int(value("top_k", DEFAULT_TOP_K)),
        )


def unknown_generation_keys(kwargs: Mapping[str, object]) -> list[str]:
    """The `generation_kwargs` that would change an answer here and are not followed."""
    return sorted(
        key
        for key, value in kwargs.items()
        if key not in GENERATION_KEYS and not (key in WITHOUT_EFFECT and value == WITHOUT_EFFECT[key])
    )


def harness_model(runner: RequestRunner, shortened: Counter[str]) -> Any:
    """The runner's model as an `lm_eval.api.model.LM`. `shortened` counts the requests of a task that lost their
    beginning."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        resolve_max_length,
    )

    model, tokenizer = runner.policy.transformers_model, runner.tokenizer
    defaults = GenerationDefaults.of(model, tokenizer)

    class ForestLM(TemplateLM):
        """Encodes the harness's requests and gives them to the runner."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self._last_context: tuple[str, list[int]] = ("", [])
            self._tasks: list[str] = []
            """Of the requests whose tokens are scored."""

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            begin = tokenizer.bos_token_id
            return self.eot_token_id if begin is None else int(begin)

        @property
        def max_length(self) -> int:
            return int(resolve_max_length(model.config, tokenizer))

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
            if add_special_tokens is None and has_bos_prefix(string, tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
            special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return [int(number) for number in tokenizer.encode(string, **special)]

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """The harness's own, with the ids of a context kept for the options that follow."""
            blanks = len(context) - len(context.rstrip())
            if blanks:
                context, continuation = context[:-blanks], context[-blanks:] + continuation
            if self._last_context[0] != context:
                self._last_context = context, self.tok_encode(context)
            ids = self._last_context[1]
            return ids, self.tok_encode(context + continuation)[len(ids) :]

        def loglikelihood(
            self, requests: Sequence[Any], disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            self._tasks = [request.task_name for request in requests]
            return list(super().loglikelihood(requests, disable_tqdm=True))

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: object) -> list[tuple[float, bool]]:
            return runner.loglikelihoods(
                [
                    self._continuation(task, context, continuation)
                    for task, (_, context, continuation) in zip(self._tasks, requests, strict=True)
                ]
            )

        def _continuation(self, task: str, context: list[int], continuation: list[int]) -> Continuation:
            """The last `max_length` tokens and the one that they predict."""
            if not context or not continuation or len(continuation) > self.max_length:
                what = tr(
                    "a request has a context of {context} and a continuation of {continuation} tokens, "
                    "and the model takes 1 to {limit}",
                    context=len(context),
                    continuation=len(continuation),
                    limit=self.max_length,
                )
                raise UserError(what, place=task, cure=tr("leave this task out"))
            ids = (*context, *continuation)
            if len(ids) > self.max_length + 1:
                shortened[task] += 1
            return Continuation(ids[-(self.max_length + 1) :], len(continuation))

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
            windows: list[Continuation] = []
            owners: list[int] = []
            for number, request in enumerate(requests):
                rolling = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                for context, continuation in map(utils.make_disjoint_window, rolling):
                    windows.append(self._continuation(request.task_name, context, continuation))
                    owners.append(number)
            sums = [0.0] * len(requests)
            for number, (logprob, _) in zip(owners, runner.loglikelihoods(windows), strict=True):
                sums[number] += logprob
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
            asked: Counter[tuple[str, str]] = Counter()
            questions = []
            for request in requests:
                context, kwargs = request.args
                repeat = asked[context, repr(kwargs)]
                asked[context, repr(kwargs)] += 1
                questions.append(seeded(self._question(request.task_name, context, kwargs), repeat))
            return runner.generations(questions)

        def _question(self, task: str, context: str, kwargs: Mapping[str, Any]) -> OpenQuestion:
            normal = normalize_gen_kwargs(dict(kwargs), MAX_GEN_TOKS)
            until = handle_stop_sequences(normal.get("until"), eos=tokenizer.decode(self.eot_token_id))
            limit = int(normal["max_gen_toks"])
            room = self.max_length - limit
            if room <= 0:
                what = tr(
                    "its answers may have {limit} tokens, and the model takes {positions} in all",
                    limit=limit,
                    positions=self.max_length,
                )
                cure = tr("give --gen_kwargs '{{max_gen_toks: {half}}}'", half=self.max_length // 2)
                raise UserError(what, place=task, cure=cure)
            begin = getattr(tokenizer, "bos_token", None)
            ids = self.tok_encode(
                context, add_special_tokens=False if has_bos_prefix(context, begin) else None
            )
            shortened[task] += len(ids) > room
            temperature = float(normal.get("temperature") or 0.0) if normal["do_sample"] else 0.0
            if normal["do_sample"] and not temperature:
                temperature = 1.0
            sampling = SamplingParams(
                stop_ids=defaults.stop_ids,
                max_new_tokens=limit,
                temperature=temperature,
                top_p=float(normal.get("top_p", defaults.top_p)),
                top_k=int(normal.get("top_k", defaults.top_k)),
                repetition_penalty=float(normal.get("repetition_penalty", defaults.repetition_penalty)),
                changes=LogitChanges(min_p=float(normal.get("min_p") or 0.0)),
            )
            texts = tuple(text for text in until if text)
            return OpenQuestion(tuple(ids[-room:]), sampling, texts, task)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """As the tokenizer's chat template writes it. A template that refuses system messages gets none, as in the
            harness."""
            without_system = [message for message in chat_history if message["role"] != "system"]
            for messages in (chat_history, without_system):
                with suppress(OverBounds, Refused, ValueError):
                    if add_generation_prompt:
                        return text_by_tokenizer(tokenizer, Conversation(messages), True)
                    *before, last = messages
                    marked = {**last, "content": last["content"] + MARK}
                    text = text_by_tokenizer(tokenizer, Conversation([*before, marked]), False)
                    begin, mark, _ = text.rpartition(MARK)
                    return begin if mark else text[: text.rindex(MARK.strip())].rstrip()
            what = tr("the model's chat template does not take the messages of this task")
            raise UserError(what, place="--apply_chat_template", cure=tr("leave it out"))

    return ForestLM()
