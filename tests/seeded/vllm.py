"""Faults of a real vLLM: other adapters, other flags, another base. One server has all adapters of a base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.runs import command
from tests.seeded.entry import Seeded, Target
from tests.seeded.llama import EngineRuns
from tests.seeded.own import only, times
from tests.slow.vllm_server import MORE, free_port, start_words, vllm_serving


@dataclass
class VllmLab:
    runs: EngineRuns
    python: str
    """One that has vLLM."""
    stack: ExitStack
    """Of the one server that runs at a time."""
    running: list[str] = field(default_factory=list)
    """Its words and its address."""

    def adapters(self) -> dict[str, Path]:
        runs = self.runs
        return {
            "run": runs.run,
            "half": runs.copy("half", times(0.5)),
            "three-quarters": runs.copy("three-quarters", times(0.75)),
            "double": runs.copy("double", times(2.0)),
            "half-layers": runs.copy(
                "half-layers", only(lambda key: ".layers.0." in key or ".layers.1." in key)
            ),
            "qv": runs.copy("qv", only(lambda key: "q_proj" in key or "v_proj" in key)),
            "other": runs.other,
        }

    def merged(self) -> Path:
        folder = self.runs.root / "vllm-merged"
        if not folder.exists():
            done = command(folder, "merge", str(self.runs.run), "--output_dir", str(folder))
            assert done.status == 0, done.err
        return folder

    def address(self, words: Sequence[str]) -> str:
        """Of a server with these words; the one before is ended."""
        key = " ".join(words)
        if self.running[:1] != [key]:
            self.stack.close()
            self.running.clear()
            port = ["--host", "127.0.0.1", "--port", str(free_port())]
            url = self.stack.enter_context(vllm_serving([*words, *port], self.runs.root / "vllm.log"))
            self.running += [key, url]
        return self.running[1]

    def with_adapters(self, base: Path, *more: str, template: Path | None, dtype: str = "float32") -> str:
        modules = [json.dumps({"name": name, "path": str(path)}) for name, path in self.adapters().items()]
        words = [*start_words(self.python, str(base)), "--served-model-name", "base", "--dtype", dtype]
        words += ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", *modules, *MORE, *more]
        if template is not None:
            words += ["--chat-template", str(template)]
        return self.address(words)

    @property
    def template(self) -> Path:
        return self.runs.run / "chat_template.jinja"


GREEDY = ("--generation-config", "vllm")
"""Without the base's own sampling defaults."""


def served(
    name: str,
    cause: str | None,
    model: str = "run",
    *more: str,
    template: bool = True,
    dtype: str = "float32",
    base: Callable[[EngineRuns], Path] = lambda runs: runs.base,
) -> Seeded[VllmLab]:
    @contextmanager
    def at(lab: VllmLab) -> Iterator[Target]:
        file = lab.template if template else None
        url = lab.with_adapters(base(lab.runs), *GREEDY, *more, template=file, dtype=dtype)
        yield Target(lab.runs.run, url, model)

    return Seeded(name, "vLLM", cause, at)


def _limited(**limits: float) -> tuple[str, str]:
    return "--override-generation-config", json.dumps(limits)


@contextmanager
def _merged(lab: VllmLab) -> Iterator[Target]:
    words = [*start_words(lab.python, str(lab.merged())), "--served-model-name", "merged"]
    yield Target(lab.runs.run, lab.address([*words, "--dtype", "float32", *MORE]), "merged")


VLLM_FAULTS = (
    served("the base alone", "adapter_not_applied", "base"),
    served("half of the adapter's scale", "adapter_in_part", "half"),
    served("three quarters of its scale", "adapter_in_part", "three-quarters"),
    served("twice its scale", "adapter_in_part", "double"),
    served("half of the layers dropped", "adapter_in_part", "half-layers"),
    served("only q_proj and v_proj", "adapter_in_part", "qv"),
    served("another adapter", "another_adapter", "other"),
    served("another base below the adapter", "another_base", base=lambda runs: runs.other_base),
    served("the base's chat template", "base_template", template=False),
    served("answers cut at three tokens", "answer_cut", "run", *_limited(max_new_tokens=3)),
    served("a penalty on repetition", "penalty", "run", *_limited(repetition_penalty=3.0)),
)
VLLM_RIGHT = (
    served("the adapter in float32", None),
    served("the adapter in bfloat16", None, dtype="bfloat16"),
    Seeded("merged", "vLLM", None, _merged),
)
