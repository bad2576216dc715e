"""A real vLLM, right and wrong: `yeonma verify --served` names every fault and no right server.

`make vllm` installs it and runs this; or $YEONMA_VLLM_PYTHON names a Python that has vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.seeded.entry import MOST_SECONDS, Seeded, outcome_of
from tests.seeded.llama import EngineRuns
from tests.seeded.vllm import VLLM_FAULTS, VLLM_RIGHT, VllmLab
from tests.slow.engines import engine_python
from yeonma.errors import UserError
from yeonma.model.smollm2 import fetch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmLab]:
    python = engine_python("YEONMA_VLLM_PYTHON", ".venv-vllm", "no vLLM: `make vllm`")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.delenv("YEONMA_CACHE")  # the default cache may hold the model
        try:
            fetch(print)
        except UserError as error:
            pytest.skip(f"not to be had here: {error}")
        yield VllmLab(EngineRuns(tmp_path_factory.mktemp("seeded")), python, stack)


@pytest.mark.parametrize("seeded", [*VLLM_RIGHT, *VLLM_FAULTS], ids=lambda seeded: seeded.name)
def test_fault_is_named_and_no_right_server(lab: VllmLab, seeded: Seeded[VllmLab]) -> None:
    outcome = outcome_of(seeded, lab)
    assert outcome.is_right(seeded), outcome
    assert outcome.seconds < MOST_SECONDS
