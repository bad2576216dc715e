"""What every test runs under: one thread a process, no network, no clock, a token cache of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Before torch and huggingface_hub are imported: they read these once. The workers of xdist share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["YEONMA_LANG"] = "en"
# The runs of one test process have many small shapes in common, and compiling a routine for one takes longer than its
# products do. A run by itself keeps fewer (`yeonma.model.kernels.linear`), which changes no result.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
os.environ.setdefault("LRU_CACHE_CAPACITY", "1024")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# A command that a shell starts in the background ignores Ctrl-C, and so would all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.faults.zygote import Zygote

settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _own_token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YEONMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _in_proportion() -> Iterator[None]:
    """What does not depend on a model's size takes longer than all else in a tiny one's run: sample answers of 128
    tokens on a card, and products that measure the machine's rate. Here both are short."""
    from tests.runs import SAMPLE_TOKENS
    from yeonma.inspect import probe
    from yeonma.train import model_card

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_card, "MAX_NEW_TOKENS", SAMPLE_TOKENS)
        patch.setattr(probe, "SIZE", dict.fromkeys(probe.SIZE, 256))
        patch.setattr(probe, "RATE_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session")
def zygotes() -> Iterator[Zygote]:
    """Runs in processes of their own, one or several together, that have imported the libraries before."""
    from tests.faults.zygote import zygote

    with zygote() as one:
        yield one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
