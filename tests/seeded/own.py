"""Faults of `yeonma serve` with other files, and of a proxy that asks it wrongly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tests.models import tiny_model
from tests.runs import articles, command, trained, write_jsonl
from tests.seeded.entry import Seeded, Target
from tests.served_faults import WrongServer, wrong_server
from tests.served_runs import BOS, CHAT_TEMPLATE, EOS, SETTINGS, with_bos, with_weights
from tests.servers import serving

REASONING = "{% if enable_thinking is defined and enable_thinking %}(reason) {% endif %}"
SYSTEM = "[system]\nbe brief, and be kind.\n[user]\n{document}\n[assistant]\n{title}\n"
TWO_FIELDS = "below is an article.\n\n{document}\n\nits number: {number}\n\ntitle: {title}"
LAYERS = 4


@dataclass
class OwnLab:
    """Runs of tiny models, edited copies of them, and servers that have them all."""

    root: Path
    stack: ExitStack
    servers: dict[str, str] = field(default_factory=dict)

    @cached_property
    def base(self) -> Path:
        folder = self.root / "base"
        model = tiny_model("llama")
        config = type(model.config).from_dict({**model.config.to_dict(), "num_hidden_layers": LAYERS})
        config.max_position_embeddings, config.initializer_range = 512, 0.25
        torch.manual_seed(0)
        type(model)(config).save_pretrained(folder)
        tokenizer = with_bos()
        tokenizer.chat_template = CHAT_TEMPLATE + "{% if add_generation_prompt %}" + REASONING + "{% endif %}"
        tokenizer.save_pretrained(folder)
        return folder

    def _run(self, name: str, rows: list[dict[str, str]], **settings: object) -> Path:
        data = write_jsonl(self.root / f"{name}.jsonl", rows)
        base = settings.pop("base_model", None) or self.base
        return trained(self.root / name, Path(str(base)), data, **{**SETTINGS, **settings}).folder

    @cached_property
    def run(self) -> Path:
        return self._run("run", articles(24), save_steps=12, save_total_limit=10)

    @cached_property
    def other(self) -> Path:
        rows = [{**row, "title": row["title"][::-1] + "!"} for row in articles(24)]
        return self._run("other", rows)

    @cached_property
    def rslora(self) -> Path:
        """rsLoRA, also of the head."""
        modules = ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"]
        return self._run("rslora", articles(24), use_rslora=True, lora_alpha=4, lora_target_modules=modules)

    @cached_property
    def tokens(self) -> Path:
        """Answers that begin with a token which training added."""
        rows = [{**row, "title": "(news)" + row["title"]} for row in articles(24)]
        return self._run("tokens", rows, new_tokens=["(news)"])

    @cached_property
    def experts(self) -> Path:
        folder = self.root / "moe"
        model = tiny_model("qwen3_moe")
        model.config.max_position_embeddings = 512
        model.save_pretrained(folder)
        with_bos().save_pretrained(folder)
        return self._run("experts", articles(24), base_model=folder)

    @cached_property
    def system(self) -> Path:
        path = self.root / "system.txt"
        path.write_text(SYSTEM)
        return self._run("system", articles(24), template=str(path))

    @cached_property
    def two_fields(self) -> Path:
        rows = [{**row, "number": str(number)} for number, row in enumerate(articles(24))]
        return self._run("two_fields", rows, template=TWO_FIELDS)

    @cached_property
    def labels(self) -> Path:
        rows = [{**row, "title": "storm" if "storm" in row["document"] else "other"} for row in articles(40)]
        return self._run("labels", rows)

    @cached_property
    def merged(self) -> Path:
        done = command(self.root, "merge", str(self.run), "--output_dir", str(self.root / "merged"))
        assert done.status == 0, done.err
        return self.root / "merged"

    def edited(self, run: Path, change: Callable[[str, torch.Tensor], torch.Tensor], name: str) -> Path:
        folder = self.root / name
        return folder if folder.exists() else with_weights(run, folder, change)

    @cached_property
    def copies(self) -> list[Path]:
        """What stands in the place of `run` on its server."""
        made = [
            self.edited(self.run, times(factor), f"times-{factor}") for factor in (0.0, 0.5, 0.75, 1.5, 2.0)
        ]
        kept = {
            "first-half": lambda key: ".layers.0." in key or ".layers.1." in key,
            "qv": lambda key: "q_proj" in key or "v_proj" in key,
            "without-down": lambda key: "down_proj" not in key,
            "without-attention": lambda key: "self_attn" not in key,
        }
        made += [self.edited(self.run, only(keeps), name) for name, keeps in kept.items()]
        earlier = self.root / "earlier"
        if not earlier.exists():
            shutil.copytree(self.run / "checkpoint-24", earlier)
        return [*made, self.other, earlier]

    def server(self, run: Path, *others: Path) -> str:
        """The address of one that has this run and the others."""
        key = "+".join(path.name for path in (run, *others))
        if key not in self.servers:
            errors = self.root / f"{len(self.servers)}.errors"
            started = self.stack.enter_context(serving(errors, run, *others))
            self.servers[key] = started.url
        return self.servers[key]

    @property
    def main(self) -> str:
        return self.server(self.run, *self.copies)


def times(factor: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda key, tensor: tensor * factor if "lora_B" in key else tensor


def only(keeps: Callable[[str], bool]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda key, tensor: tensor * 0 if "lora_B" in key and not keeps(key) else tensor


def own(name: str, model: str, cause: str | None) -> Seeded[OwnLab]:
    """A model of the main server."""

    @contextmanager
    def at(lab: OwnLab) -> Iterator[Target]:
        yield Target(lab.run, lab.main, model)

    return Seeded(name, "yeonma serve", cause, at)


def beside(
    name: str, run: str, cause: str | None, edit: Callable[[OwnLab, Path], Path] | None = None
) -> Seeded[OwnLab]:
    """An edited copy of another run, on a server with this run; the run itself without an edit."""

    @contextmanager
    def at(lab: OwnLab) -> Iterator[Target]:
        folder: Path = getattr(lab, run)
        served = edit(lab, folder) if edit else folder
        url = lab.server(folder, served) if edit else lab.server(folder)
        yield Target(folder, url, served.name)

    return Seeded(name, "yeonma serve", cause, at)


def proxy(name: str, cause: str | None, wrong: WrongServer, run: str = "run") -> Seeded[OwnLab]:
    @contextmanager
    def at(lab: OwnLab) -> Iterator[Target]:
        folder: Path = getattr(lab, run)
        url = lab.main if run == "run" else lab.server(folder)
        with wrong_server(url, folder.name, folder, wrong) as address:
            yield Target(folder, address)

    return Seeded(name, "proxy", cause, at)


def by_text(edit: Callable[[str], str]) -> Callable[[list[int]], list[int]]:
    """A change of the ids of a prompt by its text."""
    tokenizer: PreTrainedTokenizerFast = with_bos()

    def change(ids: list[int]) -> list[int]:
        text = edit("".join(tokenizer.convert_ids_to_tokens(ids)))
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return change


def replaced(old: str, new: str) -> WrongServer:
    return WrongServer(by_text(lambda text: text.replace(old, new)))


def swapped(text: str) -> str:
    """The two fields in each other's place."""
    head, rest = text.split("article.\n\n", 1)
    first, rest = rest.split("\n\nits number: ", 1)
    second, rest = rest.split("\n\ntitle: ", 1)
    return f"{head}article.\n\n{second}\n\nits number: {first}\n\ntitle: {rest}"


def _with_config(lab: OwnLab, run: Path, name: str, changes: Mapping[str, Any]) -> Path:
    folder = lab.root / name
    shutil.copytree(run, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


OWN_FAULTS = (
    own("the base alone", "base", "adapter_not_applied"),
    own("an adapter of zeros", "times-0.0", "adapter_not_applied"),
    own("half of the adapter's scale", "times-0.5", "adapter_in_part"),
    own("three quarters of its scale", "times-0.75", "adapter_in_part"),
    own("one and a half times its scale", "times-1.5", "adapter_in_part"),
    own("merged twice", "times-2.0", "adapter_in_part"),
    own("half of the layers dropped", "first-half", "adapter_in_part"),
    own("only q_proj and v_proj", "qv", "adapter_in_part"),
    own("down_proj left out", "without-down", "adapter_in_part"),
    own("attention left out", "without-attention", "adapter_in_part"),
    own("an earlier checkpoint", "earlier", "adapter_in_part"),
    own("another adapter", "other", "another_adapter"),
    beside(
        "rsLoRA read as LoRA",
        "rslora",
        "adapter_in_part",
        lambda lab, run: _with_config(lab, run, "as-lora", {"use_rslora": False}),
    ),
    beside(
        "the head's adapter left out",
        "rslora",
        "adapter_in_part",
        lambda lab, run: lab.edited(run, only(lambda key: "lm_head" not in key), "headless"),
    ),
    beside(
        "the experts' adapters left out",
        "experts",
        "adapter_in_part",
        lambda lab, run: lab.edited(run, only(lambda key: "experts" not in key), "without-experts"),
    ),
    beside(
        "rows of added tokens left out",
        "tokens",
        "new_tokens",
        lambda lab, run: lab.edited(
            run, lambda key, tensor: tensor if "lora" in key else tensor * 0, "without-rows"
        ),
    ),
    proxy("BOS doubled", "double_bos", WrongServer(lambda ids: [BOS, *ids])),
    proxy("BOS missing", "no_bos", WrongServer(lambda ids: ids[1:])),
    proxy("EOS behind the prompt", "added_eos", WrongServer(lambda ids: [*ids, EOS])),
    proxy("the base's chat template", "base_template", WrongServer(template=CHAT_TEMPLATE)),
    proxy("no chat template", "another_template", WrongServer(template="{{ messages[-1]['content'] }}")),
    proxy("a word of the template changed", "another_template", replaced("an article", "some article")),
    proxy("a line break of the template missing", "another_template", replaced("\n\ntitle", "\ntitle")),
    proxy(
        "the system prompt dropped",
        "base_template",  # whose prompt is the very same
        replaced("system: be brief, and be kind.\n", ""),
        "system",
    ),
    proxy(
        "a system prompt of the server",
        "another_template",
        WrongServer(by_text(lambda text: text.replace("<s>", "<s>system: you are helpful.\n"))),
    ),
    proxy("fields swapped", "another_template", WrongServer(by_text(swapped)), "two_fields"),
    proxy("reasoning switched on", "reasoning_mode", WrongServer(kwargs={"enable_thinking": True}), "system"),
    proxy("prompts cut on the left", "context_cut", WrongServer(lambda ids: ids[-50:])),
    proxy("prompts cut on the right", "context_cut", WrongServer(lambda ids: ids[:50])),
    proxy(
        "prompts cut in the middle",
        "context_cut",
        WrongServer(lambda ids: [*ids[:30], *ids[-20:]] if len(ids) > 50 else ids),
    ),
    proxy("EOS never", "no_end", WrongServer(more={"logit_bias": {str(EOS): -100}})),
    proxy("ends at a stop text", "early_end", WrongServer(more={"stop": ["r", "a", "o"]})),
    proxy(
        "ends at another token", "no_end", WrongServer(more={"logit_bias": {str(EOS): -100}, "stop": ["zz"]})
    ),
    proxy("answers cut at three tokens", "answer_cut", WrongServer(more={"max_tokens": 3})),
    proxy("a penalty on repetition", "penalty", WrongServer(more={"repetition_penalty": 3.0})),
    proxy("temperature 0 not passed on", "sampled", WrongServer(more={"temperature": 3.0, "seed": 1})),
)
OWN_RIGHT = (
    own("the adapter in float32", "run", None),
    beside("labels", "labels", None),
    beside("a system prompt in the base's chat template", "system", None),
    beside("rsLoRA, and an adapter of the head", "rslora", None),
    beside("tokens that training added", "tokens", None),
    beside("a mixture of experts", "experts", None),
    proxy("prompts by their number", None, WrongServer(tells="counts")),
    proxy("texts alone", None, WrongServer(tells="text")),
)
