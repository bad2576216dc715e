"""llama.cpp's own server, right and wrong: `yeonma verify --served` names every fault and no right server.

`make llama` installs it; or $YEONMA_LLAMA_PYTHON names a Python that has xllamacpp.
"""

from __future__ import annotations

import pytest

from tests.seeded.entry import MOST_SECONDS, Seeded, outcome_of
from tests.seeded.llama import LLAMA_FAULTS, LLAMA_RIGHT, EngineRuns, LlamaLab
from tests.slow.engines import engine_python
from yeonma.errors import UserError
from yeonma.export.gguf_converter import CONVERTER
from yeonma.export.gguf_quantiser import QUANTISER
from yeonma.export.tool_folder import install_tool
from yeonma.model.smollm2 import fetch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> LlamaLab:
    python = engine_python("YEONMA_LLAMA_PYTHON", ".venv-llama", "no llama.cpp: `make llama`")
    runs = EngineRuns(tmp_path_factory.mktemp("seeded"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("YEONMA_CACHE")  # the default cache may hold the model and the tools
        try:
            fetch(print)
            install_tool(CONVERTER)
            install_tool(QUANTISER)
        except UserError as error:
            pytest.skip(f"not to be had here: {error}")
    return LlamaLab(runs, python)


@pytest.fixture(autouse=True)
def _default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YEONMA_CACHE", raising=False)


@pytest.mark.parametrize("seeded", [*LLAMA_FAULTS, *LLAMA_RIGHT], ids=lambda seeded: seeded.name)
def test_fault_is_named_and_no_right_server(lab: LlamaLab, seeded: Seeded[LlamaLab]) -> None:
    outcome = outcome_of(seeded, lab)
    assert outcome.is_right(seeded), outcome
    assert outcome.seconds < MOST_SECONDS
