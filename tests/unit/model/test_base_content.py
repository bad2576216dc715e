"""The content of a base: equal wherever it lies, different for every changed byte, read once while nothing changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from filelock import FileLock
from transformers import AutoModelForCausalLM

from tests.models import tiny_model
from yeonma.model import weight_sums
from yeonma.model.base_content import (
    BaseContent,
    changes,
    config_changes,
    content_of,
    is_here,
    known_hash,
    read_content,
    reading_content,
)
from yeonma.model.source import BaseSource
from yeonma.model.weight_sums import Stopping, WeightSums

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path, original: Path, settled: None) -> Path:
    return Path(shutil.copytree(original, tmp_path / "base"))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of files are kept however young these are."""
    monkeypatch.setattr(weight_sums, "FINE_NS", -1)
    monkeypatch.setattr(weight_sums, "COARSE_NS", -1)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read for their sums."""
    names: list[str] = []
    compute = weight_sums._sums_of

    def noted(file: Any, *rest: Any) -> Any:
        names.append(Path(file.name).name)
        return compute(file, *rest)

    monkeypatch.setattr(weight_sums, "_sums_of", noted)
    return names


def content(folder: Path, cache: Path, **options: Any) -> BaseContent:
    return read_content(BaseSource(str(folder)), cache_dir=cache, **options)


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, **values: object) -> None:
    text = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**text, **values}))


def test_a_copy_a_link_and_other_shards_have_the_same_content(
    base: Path, cache: Path, tmp_path: Path
) -> None:
    first = content(base, cache)
    link = tmp_path / "link"
    link.symlink_to(base)
    copied = shutil.copytree(base, tmp_path / "copied")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for other in (link, copied, tmp_path / "shards"):
        assert changes(first, content(other, cache)) == []
    assert content_of(json.loads(json.dumps(first.record()))) == first


def test_every_byte_of_a_tensor_counts_and_metadata_does_not(base: Path, cache: Path) -> None:
    first = content(base, cache)
    path = base / WEIGHTS
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for at in (start, (start + len(data)) // 2, len(data) - 1):
        flip(path, at)
        (found,) = changes(first, content(base, cache))
        assert found.startswith(f"{WEIGHTS} had SHA-256 {first.weights[WEIGHTS][:12]}... and has ")
        flip(path, at)
    assert changes(first, content(base, cache)) == []
    header = json.loads(data[8:start])
    header["__metadata__"] = {"format": "pt", "made": "elsewhere"}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    other = content(base, cache)
    assert other.weights != first.weights and changes(first, other) == []


@pytest.mark.parametrize("swap", ["names", "shapes"])
def test_the_same_bytes_under_other_names_or_shapes_are_other_weights(
    base: Path, cache: Path, swap: str
) -> None:
    first = content(base, cache)
    path = base / WEIGHTS
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    one, other = [name for name in sorted(header) if name.endswith(("k_proj.weight", "v_proj.weight"))][:2]
    if swap == "names":
        header[one], header[other] = header[other], header[one]
    else:
        header[one]["shape"] = header[one]["shape"][::-1]
        assert header[one]["shape"][0] != header[one]["shape"][1]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    assert len(changes(first, content(base, cache))) == 1


def test_files_that_are_not_read_do_not_count(base: Path, cache: Path) -> None:
    first = content(base, cache)
    (base / "other.safetensors").write_bytes(b"x")
    (base / "pytorch_model.bin").write_bytes(b"x")
    (base / "README.md").write_text("about it")
    rewrite(base / "generation_config.json", temperature=0.3, max_length=7)
    assert changes(first, content(base, cache)) == []


def test_config_and_end_tokens_that_changed_are_named_with_both_values(base: Path, cache: Path) -> None:
    first = content(base, cache)
    before = json.loads((base / "config.json").read_text())["rms_norm_eps"]
    rewrite(base / "config.json", rms_norm_eps=0.5)
    rewrite(base / "generation_config.json", eos_token_id=[7, 2])
    assert changes(first, content(base, cache)) == [
        f"config.json: rms_norm_eps was {before} and is now 0.5",
        f"generation_config.json: eos_token_id was {first.eos_token_id[0]} and is now 2, 7",
    ]


def test_a_config_that_only_says_more_has_not_changed(base: Path, cache: Path) -> None:
    first = content(base, cache)
    rewrite(base / "config.json", transformers_version="9.9", _name_or_path="elsewhere", use_cache=False)
    assert changes(first, content(base, cache)) == []


def test_a_file_with_the_recorded_sum_is_the_same_config_in_whatever_way_it_is_read(
    base: Path, cache: Path
) -> None:
    first = content(base, cache)
    read_otherwise = {**first.config_values, "a_newer_key": 1}
    assert config_changes(first, read_otherwise, first.config) == []
    assert config_changes(first, read_otherwise) == ["config.json: a_newer_key was not set and is now 1"]


def test_python_code_that_the_config_names_belongs_to_a_model_that_may_run_it(
    base: Path, cache: Path
) -> None:
    (base / "modeling_own.py").write_text("from .parts_own import A\nclass Own: pass\n")
    (base / "parts_own.py").write_text("A = 1\n")
    rewrite(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    source = BaseSource(str(base), trust_remote_code=True)
    first = read_content(source, cache_dir=cache)
    assert sorted(first.code) == ["modeling_own.py", "parts_own.py"]
    (base / "parts_own.py").write_text("A = 2\n")
    (found,) = changes(first, read_content(source, cache_dir=cache))
    assert found.startswith("parts_own.py had SHA-256")
    assert content(base, cache).code == {}


def test_unchanged_files_are_read_once(base: Path, cache: Path, tmp_path: Path, read: list[str]) -> None:
    first = content(base, cache)
    assert read == [WEIGHTS]
    link = tmp_path / "link"
    link.symlink_to(base)
    assert content(base, cache) == content(link, cache) == first
    assert known_hash(base / WEIGHTS, cache) == first.weights[WEIGHTS]
    assert read == [WEIGHTS]
    assert content(base, cache, trust_cache=False) == first
    assert read == [WEIGHTS, WEIGHTS]


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_noticed(
    base: Path, cache: Path, tmp_path: Path, read: list[str]
) -> None:
    first, path = content(base, cache), base / WEIGHTS
    status = path.stat()
    other = Path(shutil.copy(path, tmp_path / "other"))
    flip(other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert len(changes(first, content(base, cache))) == 1 and len(read) == 2


@pytest.mark.skipif(os.name != "posix", reason="the time of a file's last change is not known")
def test_a_write_whose_time_was_set_back_is_noticed(base: Path, cache: Path, read: list[str]) -> None:
    first, path = content(base, cache), base / WEIGHTS
    status = path.stat()
    flip(path)
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # within a tick of the clock
        os.utime(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and path.stat().st_ino == status.st_ino
    assert len(changes(first, content(base, cache))) == 1 and len(read) == 2


def test_the_sum_of_a_file_that_was_written_just_now_is_not_kept(
    base: Path, cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_sums, "FINE_NS", 10**15)
    monkeypatch.setattr(weight_sums, "COARSE_NS", 10**15)
    assert content(base, cache) == content(base, cache)
    assert len(read) == 2 and not list(cache.glob("*.weights"))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": 1}', b"\xff"])
def test_a_damaged_entry_is_computed_again(base: Path, cache: Path, read: list[str], damage: bytes) -> None:
    first = content(base, cache)
    (entry,) = cache.glob("*.weights")
    entry.write_bytes(damage)
    assert content(base, cache) == content(base, cache) == first
    assert len(read) == 2


def test_reading_for_real_corrects_what_is_kept(base: Path, cache: Path, read: list[str]) -> None:
    first = content(base, cache)
    (entry,) = cache.glob("*.weights")
    rewrite(entry, sha256="0" * 64, tensors="0" * 64)  # as if bits had changed on the disk since
    assert len(changes(first, content(base, cache))) == 1
    assert content(base, cache, trust_cache=False) == first == content(base, cache)
    assert len(read) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(base: Path, tmp_path: Path, read: list[str]) -> None:
    place = tmp_path / "a file"
    place.write_text("")
    assert content(base, place / "cache") == content(base, place / "cache")
    assert len(read) == 2


def test_what_several_processes_need_is_computed_by_one(base: Path, cache: Path, read: list[str]) -> None:
    found: list[Any] = []
    threads = [
        Thread(target=lambda: found.append(WeightSums(cache, True).sums(base / WEIGHTS))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and read == [WEIGHTS]


def test_reading_goes_on_in_the_background_and_stops_with_its_block(base: Path, cache: Path) -> None:
    with reading_content(BaseSource(str(base)), cache_dir=cache) as wait:
        first = wait(lambda _: None)
    assert first == content(base, cache)
    sums = WeightSums(cache, trust_cache=False)
    sums.stopped.set()
    with pytest.raises(Stopping) as stopped:
        sums.sums(base / WEIGHTS)
    (lock,) = cache.glob("*.weights.lock")
    with FileLock(lock, timeout=0):  # free, although the exception knows the frame that took it
        assert stopped.value


def test_a_long_reading_says_so_in_one_line(base: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yeonma.model.base_content.SLOW_SECONDS", 0.01)
    lines: list[str] = []
    said, compute = Event(), weight_sums._sums_of

    def slowly(*arguments: Any) -> Any:
        assert said.wait(60)
        return compute(*arguments)

    def log(line: str) -> None:
        lines.append(line)
        said.set()

    with monkeypatch.context() as patch:
        patch.setattr(weight_sums, "_sums_of", slowly)
        content(base, cache, log=log)
    assert lines == [f"reading the weights of {base} for their SHA-256"]
    content(base, cache, log=log)
    assert len(lines) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.update(weights={}),
        lambda record: record.update(weights={"model.safetensors": "x"}),
        lambda record: record.update(eos_token_id=["2"]),
        lambda record: record.update(config=None),
        lambda record: record.update(more=1),
        lambda record: record.pop("tensors"),
    ],
)
def test_a_record_that_is_none_is_refused(
    base: Path, cache: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    record = content(base, cache).record()
    damage(record)
    with pytest.raises(ValueError, match="no content"):
        content_of(record)


def test_a_snapshot_of_the_hub_has_the_content_of_its_copy(
    base: Path, cache: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    model = hub / "models--mina--tiny"
    snapshot = model / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    for path in base.iterdir():
        shutil.copy(path, model / "blobs" / path.name)
        (snapshot / path.name).symlink_to(model / "blobs" / path.name)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub))
    source = BaseSource("mina/tiny")
    assert is_here(source) and not is_here(BaseSource("mina/other"))
    found = read_content(source, cache_dir=cache)
    assert changes(found, content(base, cache)) == []
    assert read_content(replace_revision(source, commit), cache_dir=cache) == found
    assert read == [WEIGHTS, WEIGHTS]  # the snapshot's and the copy's, each once
    flip(model / "blobs" / WEIGHTS)  # a blob keeps its name, whatever is in it
    assert len(changes(found, read_content(source, cache_dir=cache))) == 1


def replace_revision(source: BaseSource, revision: str) -> BaseSource:
    return BaseSource(source.name, revision)
