"""Fault 86: a base whose content has changed is refused by every verb that reads it, with what has changed; an equal
one in another place is accepted."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import adapter_on, tiny_adapter
from tests.comparing import ROWS, TEMPLATE, compare
from tests.runs import Done, command, sft, write_jsonl
from tests.tokenizers import byte_level
from yeonma.config.settings import ServeSettings
from yeonma.errors import UserError
from yeonma.serve.server import open_adapters

ROW = json.dumps({"document": "The ferry will run every half hour from June."})


@dataclass(frozen=True)
class Place:
    """An adapter, its base, and where verbs may write."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def adapter(self) -> Path:
        return self.root / "OUT"

    @property
    def data(self) -> Path:
        return self.root / "rows.jsonl"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    tiny_adapter(root, byte_level(), template=TEMPLATE)
    write_jsonl(root / "rows.jsonl", ROWS)
    return root


@pytest.fixture
def place(made: Path) -> Place:
    """The same folder for each test, because the adapter knows where its base was; put right afterwards."""
    kept = made.parent / f"{made.name}-kept"
    if not kept.exists():
        shutil.copytree(made, kept)
    shutil.rmtree(made)
    shutil.copytree(kept, made)
    return Place(made)


def generate(place: Place, *more: str) -> Done:
    return command(place.root, "generate", str(place.adapter), "--row", ROW, "--max_new_tokens", "2", *more)


def chat(place: Place, *more: str) -> Done:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("A storm.\n\n"))
        return command(place.root, "chat", str(place.adapter), "--max_new_tokens", "2", *more)


def compared(place: Place, *more: str) -> Done:
    words = ["--models", str(place.adapter), "--data_path", str(place.data), "--output_dir"]
    options = ["--rows", "2", "--max_new_tokens", "2", *more]
    return command(place.root, "compare", *words, str(place.root / "report"), *options)


def merge(place: Place, *more: str) -> Done:
    return command(place.root, "merge", str(place.adapter), "--output_dir", str(place.root / "merged"), *more)


def serve(place: Place, *more: str) -> Done:
    """Up to the model's loading."""
    settings = ServeSettings(adapter_dirs=[str(place.adapter)], base_model=more[1] if more else None)
    try:
        open_adapters(settings)
    except UserError as error:
        return Done(2, place.root, "", f"{error}\n")
    return Done(0, place.root, "", "")


def go_on(place: Place, *more: str) -> Done:
    base = Path(more[1]) if more else place.base
    settings = {"template": None, "max_steps": 1, "card_rows": 0, "adapter": place.adapter}
    settings |= dict.fromkeys(("lora_r", "lora_alpha", "lora_target_modules"))
    return sft(place.root / "more", base, place.data, **settings)


VERBS: dict[str, Callable[..., Done]] = {
    "generate": generate,
    "chat": chat,
    "compare": compared,
    "merge": merge,
    "serve": serve,
    "continue": go_on,
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_fault_86_one_bit_of_the_weights_is_refused_by_every_verb(place: Place, verb: str) -> None:
    flip(place.base / "model.safetensors")
    done = VERBS[verb](place)
    assert done.status == 2
    (line,) = done.err.splitlines()
    told = f"{place.adapter}: its base model {place.base} is no longer what it was trained on: "
    assert f"{told}model.safetensors had SHA-256 " in line
    assert line.endswith("; restore its files, or give the model that it was trained on with --base_model")


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_fault_86_an_equal_base_in_another_place_is_accepted_by_every_verb(place: Place, verb: str) -> None:
    place.base.rename(place.root / "moved")
    assert VERBS[verb](place, "--base_model", str(place.root / "moved")).status == 0


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_fault_86_another_base_of_the_same_config_is_refused_by_every_verb(place: Place, verb: str) -> None:
    other = Path(shutil.copytree(place.base, place.root / "other"))
    flip(other / "model.safetensors")
    done = VERBS[verb](place, "--base_model", str(other))
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert f"it was trained on {place.base}, which is not {other}: model.safetensors had" in line
    cure = f"use --base_model {place.base}" if verb == "continue" else "leave --base_model out"
    assert line.endswith(f"; {cure}")


@pytest.mark.parametrize("verb", ["continue", "generate", "merge"])
def test_fault_86_a_changed_config_and_changed_end_tokens_are_told_with_both_values(
    place: Place, verb: str
) -> None:
    rewrite(place.base / "config.json", rms_norm_eps=0.25)
    done = VERBS[verb](place)
    assert done.status == 2
    assert ("config.json: rms_norm_eps was 1e-06 and is now 0.25" in done.err) or verb == "merge"
    shutil.rmtree(place.base)
    shutil.copytree(place.root.parent / f"{place.root.name}-kept" / "base", place.base)
    rewrite(place.base / "generation_config.json", eos_token_id=[5, 9])
    done = VERBS[verb](place)
    assert done.status == 2
    assert "generation_config.json: eos_token_id was " in done.err and " and is now 5, 9" in done.err


@pytest.mark.parametrize("verb", ["continue", "generate", "serve"])
def test_a_folder_that_does_not_know_the_content_of_its_base_is_used_as_before(
    place: Place, verb: str
) -> None:
    details = json.loads((place.adapter / "yeonma.json").read_text())
    del details["base_content"]
    (place.adapter / "yeonma.json").write_text(json.dumps(details))
    flip(place.base / "model.safetensors")
    done = VERBS[verb](place)
    assert done.status == 0 and "content" not in done.out + done.err


def test_a_damaged_record_is_damage(place: Place) -> None:
    details = json.loads((place.adapter / "yeonma.json").read_text())
    details["base_content"]["weights"] = {"model.safetensors": "0"}
    (place.adapter / "yeonma.json").write_text(json.dumps(details))
    done = generate(place)
    assert done.status == 2 and "yeonma.json: damaged (no content of a base model)" in done.err


def test_adapters_on_equal_bases_in_two_places_are_served_together(place: Place) -> None:
    copied = Path(shutil.copytree(place.base, place.root / "copied"))
    second = adapter_on(copied, place.root / "SECOND", TEMPLATE, seed=1)
    both = open_adapters(ServeSettings(adapter_dirs=[str(place.adapter), str(second)]))
    assert sorted(both.names) == ["OUT", "SECOND", "base"]
    flip(copied / "model.safetensors")
    with pytest.raises(UserError, match="no longer what it was trained on"):
        open_adapters(ServeSettings(adapter_dirs=[str(place.adapter), str(second)]))


def test_a_merged_model_is_not_measured_by_its_base(place: Place) -> None:
    assert merge(place).status == 0
    merged = place.root / "merged"
    record = json.loads((merged / "yeonma.json").read_text())
    assert record["base_content"] == json.loads((place.adapter / "yeonma.json").read_text())["base_content"]
    shutil.rmtree(place.base)
    words = ["generate", str(merged), "--row", ROW, "--max_new_tokens", "2"]
    assert command(place.root, *words).status == 0
    assert compare(place.root / "report", merged, data_path=place.data, rows=2).status == 0


def verified(place: Place, *more: str) -> tuple[int, dict[str, Any]]:
    done = command(place.root, "verify", str(place.adapter), "--json", "true", *more)
    (finding,) = [one for one in json.loads(done.out)["findings"] if one["check"] == "base's content"]
    return done.status, finding


def test_fault_86_verify_reads_the_base_again(place: Place) -> None:
    _, finding = verified(place)
    assert finding["outcome"] == "well"
    assert finding["about"] == "1 weight file, config and end tokens are those of training, read again"
    flip(place.base / "model.safetensors")
    status, finding = verified(place)
    assert (status, finding["outcome"]) == (1, "differs")
    (problem,) = finding["problems"]
    assert problem["what"].startswith("model.safetensors had SHA-256") and problem["place"] == str(place.base)
    flip(place.base / "model.safetensors")
    place.base.rename(place.root / "moved")
    _, finding = verified(place)
    assert (finding["outcome"], finding["about"]) == ("not checked", "the base is not here")
    assert verified(place, "--base_model", str(place.root / "moved"))[1]["outcome"] == "well"
