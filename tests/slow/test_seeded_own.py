"""`yeonma serve` with other files, and asked wrongly: `yeonma verify --served` names faults and no right server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.seeded.entry import MOST_SECONDS, Seeded, outcome_of
from tests.seeded.own import OWN_FAULTS, OWN_RIGHT, OwnLab

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnLab]:
    with ExitStack() as stack:
        yield OwnLab(tmp_path_factory.mktemp("seeded"), stack)


@pytest.mark.parametrize("seeded", [*OWN_FAULTS, *OWN_RIGHT], ids=lambda seeded: seeded.name)
def test_fault_is_named_and_no_right_server(lab: OwnLab, seeded: Seeded[OwnLab]) -> None:
    outcome = outcome_of(seeded, lab)
    assert outcome.is_right(seeded), outcome
    assert outcome.seconds < MOST_SECONDS
