"""Asks all servers of the tables and prints what `yeonma verify --served` says of each, as Markdown.

`python -m tests.seeded`, or with names of engines alone: `python -m tests.seeded own llama vllm`. $YEONMA_LLAMA_PYTHON
and $YEONMA_VLLM_PYTHON name Pythons that have xllamacpp and vLLM, as in the tests. Exit status 1 if one is named
wrongly.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.runs import SAMPLE_TOKENS
from tests.seeded.entry import Outcome, Seeded, outcome_of
from tests.seeded.llama import LLAMA_FAULTS, LLAMA_RIGHT, EngineRuns, LlamaLab
from tests.seeded.own import OWN_FAULTS, OWN_RIGHT, OwnLab
from tests.seeded.vllm import VLLM_FAULTS, VLLM_RIGHT, VllmLab
from tests.slow.engines import engine_python
from yeonma.train import model_card

ENGINES = ("own", "llama", "vllm")


def labs(root: Path, stack: ExitStack, engines: Sequence[str]) -> Iterator[tuple[Any, Sequence[Seeded[Any]]]]:
    """Each lab with its table."""
    runs = EngineRuns(root / "engines")
    if "own" in engines:
        (root / "own").mkdir()
        yield OwnLab(root / "own", stack), (*OWN_FAULTS, *OWN_RIGHT)
    runs.root.mkdir()
    if "llama" in engines:
        python = engine_python("YEONMA_LLAMA_PYTHON", ".venv-llama", "no llama.cpp: `make llama`")
        yield LlamaLab(runs, python), (*LLAMA_FAULTS, *LLAMA_RIGHT)
    if "vllm" in engines:
        python = engine_python("YEONMA_VLLM_PYTHON", ".venv-vllm", "no vLLM: `make vllm`")
        yield VllmLab(runs, python, stack.enter_context(ExitStack())), (*VLLM_RIGHT, *VLLM_FAULTS)


def main(engines: Sequence[str]) -> int:
    asked: list[tuple[Seeded[Any], Outcome]] = []
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(model_card, "MAX_NEW_TOKENS", SAMPLE_TOKENS)  # as in the tests
        for lab, entries in labs(Path(root), stack, engines):
            for seeded in entries:
                outcome = outcome_of(seeded, lab)
                mark = "ok" if outcome.is_right(seeded) else "WRONG"
                print(mark, seeded.server, seeded.name, *outcome.causes, file=sys.stderr, flush=True)
                asked.append((seeded, outcome))
    print("\n".join(table(asked)))
    return int(not all(outcome.is_right(seeded) for seeded, outcome in asked))


def table(asked: Sequence[tuple[Seeded[Any], Outcome]]) -> Iterator[str]:
    """A line for each fault, with the seconds of each server that was made to commit it."""
    yield "| what is served | named | seconds |"
    yield "| --- | --- | --- |"
    for name, cause in dict.fromkeys((seeded.name, seeded.cause) for seeded, _ in asked):
        same = [(one, outcome) for one, outcome in asked if (one.name, one.cause) == (name, cause)]
        named = dict.fromkeys(", ".join(f"`{one}`" for one in outcome.causes) or "-" for _, outcome in same)
        seconds = ", ".join(f"{one.server} {outcome.seconds:.1f}" for one, outcome in same)
        yield f"| {name} | {'; '.join(named)} | {seconds} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ENGINES))
