"""Servers that differ from training, each in its own way: `yeonma verify --served` names the cause of every one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.served_faults import Tells, WrongServer, wrong_server
from tests.served_runs import BOS, CHAT_TEMPLATE, EOS, other_run, served_run, verify, with_weights
from tests.servers import Server, serving

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Folders:
    run: Path
    edited: dict[str, Path]
    """Adapters that are served in its place."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("served")
    run = served_run(root)
    edited = {"other": other_run(root)}
    for name, factor in (("none", 0.0), ("half", 0.5), ("double", 2.0)):
        edited[name] = with_weights(
            run, root / name, lambda key, tensor, f=factor: tensor * f if "lora_B" in key else tensor
        )
    edited["dropped"] = with_weights(
        run, root / "dropped", lambda key, tensor: tensor * 0 if "mlp" in key and "lora_B" in key else tensor
    )
    return Folders(run, edited)


@pytest.fixture(scope="module")
def server(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    errors = tmp_path_factory.mktemp("server") / "errors"
    with serving(errors, folders.run, *folders.edited.values()) as started:
        yield started


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        ("base", "adapter_not_applied"),
        ("none", "adapter_not_applied"),
        ("half", "adapter_in_part"),
        ("double", "adapter_in_part"),
        ("other", "another_adapter"),
    ],
)
def test_other_weights_are_named(folders: Folders, server: Server, model: str, cause: str) -> None:
    status, causes, found = verify(folders.run, server.url, "--model", model)
    assert (status, causes) == (1, [cause])
    assert found["served prompts"] == "well"


def test_adapter_without_some_of_its_layers_is_no_right_one(folders: Folders, server: Server) -> None:
    status, causes, _ = verify(folders.run, server.url, "--model", "dropped")
    assert status == 1
    assert causes == ["adapter_in_part"]


WRONG = {
    "double_bos": WrongServer(lambda ids: [BOS, *ids]),
    "no_bos": WrongServer(lambda ids: ids[1:]),
    "added_eos": WrongServer(lambda ids: [*ids, EOS]),
    "base_template": WrongServer(template=CHAT_TEMPLATE),
    "another_template": WrongServer(template="{{ bos_token }}# {{ messages[-1]['content'] }} #"),
    "context_cut": WrongServer(lambda ids: ids[-20:]),
    "no_end": WrongServer(more={"logit_bias": {str(EOS): -100}}),
    "early_end": WrongServer(more={"stop": ["r", "a", "o"]}),
    "penalty": WrongServer(more={"repetition_penalty": 3.0}),
}


@pytest.mark.parametrize("cause", sorted(WRONG))
@pytest.mark.parametrize("tells", ["ids", "counts"])
def test_wrong_requests_behind_an_api_are_named(
    folders: Folders, server: Server, cause: str, tells: Tells
) -> None:
    wrong = replace(WRONG[cause], tells=tells)
    with wrong_server(server.url, "run", folders.run, wrong) as url:
        status, causes, _ = verify(folders.run, url)
    assert status == 1
    assert causes[0] == ("double_bos" if (cause, tells) == ("added_eos", "counts") else cause)


@pytest.mark.parametrize("tells", ["ids", "counts", "text"])
def test_right_server_raises_no_alarm_however_little_it_tells(
    folders: Folders, server: Server, tells: Tells
) -> None:
    with wrong_server(server.url, "run", folders.run, WrongServer(tells=tells)) as url:
        status, causes, found = verify(folders.run, url)
    assert (status, causes) == (0, [])
    assert found["served answers"] == "well"


def test_base_that_tells_only_texts_is_named_by_them(folders: Folders, server: Server) -> None:
    with wrong_server(server.url, "base", folders.run, WrongServer(tells="text")) as url:
        status, causes, _ = verify(folders.run, url)
    assert (status, causes) == (1, ["adapter_not_applied"])
