"""Whether an output folder, or an adapter copied out of it, is what the run left, and whether its parts belong
together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yeonma.adapter.adapter_folder import MANIFEST, AdapterFolder, read_adapter_folder
from yeonma.adapter.samples import read_samples
from yeonma.config.settings import VerifySettings
from yeonma.data.rows import open_rows
from yeonma.errors import Problem, UserError
from yeonma.files import user_path
from yeonma.model.load import load_tokenizer
from yeonma.model.source import BaseSource
from yeonma.run_folder.checkpoint import OPTIMIZER, RANDOM, STATE, checkpoints
from yeonma.run_folder.lock import is_locked
from yeonma.run_folder.output_folder import RUN
from yeonma.verify import compatibility as belong
from yeonma.verify.file_checks import (
    check_checkpoint,
    check_files,
    check_run,
    read_object,
    strangers,
    sums_of,
    unknown_names,
)
from yeonma.verify.finding import Finding, found, not_checked


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and all that was found."""

    folder: str
    what: str
    findings: tuple[Finding, ...]
    trained_on: Mapping[str, Any]
    """Of yeonma.json; empty where it cannot be read."""
    remark: str = ""

    @property
    def is_well(self) -> bool:
        """Nothing that was checked differs."""
        return all(finding.outcome != "differs" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "is_well": self.is_well}


def verify(asked: VerifySettings) -> VerifyReport:
    """Look at a run's output folder, a checkpoint or a copied adapter folder. Changes nothing, reads no base's weights.

    Raises UserError where there is nothing to look at, and for a base or data that the settings name and that is not
    there.
    """
    folder = user_path(asked.adapter_dir)
    if not folder.is_dir():
        raise UserError("no such folder", place=asked.adapter_dir, cure="give the output folder of a run")
    if (folder / RUN).is_file() or checkpoints(folder):
        return _of_run(folder, asked)
    if any((folder / name).is_file() for name in (STATE, OPTIMIZER, RANDOM)):
        findings, details = _of_adapter(folder, asked)
        whole = check_checkpoint(folder, None, None)
        return _report(folder, "a checkpoint", [whole, *findings], details)
    if not (folder / MANIFEST).is_file():
        cure = "give the output folder of a run, a checkpoint, or an adapter folder copied from there"
        raise UserError("it holds no run of Yeonma's", place=asked.adapter_dir, cure=cure)
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        what, cure = "it is a merged model, not an adapter", "give the folder of the adapter that was merged"
        raise UserError(what, place=asked.adapter_dir, cure=cure)
    findings, details = _of_adapter(folder, asked)
    what = "an adapter without its run"
    return _report(folder, what, [check_files(folder, whole=False), *findings], details)


def _of_run(folder: Path, asked: VerifySettings) -> VerifyReport:
    kept, running = checkpoints(folder), is_locked(folder)
    try:
        run = read_object(folder / RUN)
        if not isinstance(run.get("identity"), dict) or not isinstance(run.get("finished"), bool):
            raise UserError("damaged", place=str(folder / RUN), cure="put a copy of the file back")
        identity, finished = run["identity"], run["finished"]
        about = found("run", [], "")
    except UserError as error:
        run, identity, finished = {}, None, False
        about = found("run", error.problems, "")
    findings = []
    if finished and not running:
        adapter, what = folder, "a finished run"
        findings.append(check_files(folder, whole=True))
    else:
        adapter, what = (kept[-1] if kept else folder), "a run that is not finished"
        if running:
            what = "a run that is under way"
        findings.append(not_checked("files", "the run has not left its adapter yet"))
    own: list[Finding] = []
    details, config = None, None
    if adapter is not folder or finished:
        own, details = _of_adapter(adapter, asked)
        config = _config_of(adapter)[0]
    if about.outcome == "well":
        about = check_run(folder, run, details, config)
    findings += [check_checkpoint(each, identity, details) for each in kept]
    unknown = strangers(folder, sums_of(folder) if finished else None)
    remark = f"not from the run: {unknown_names(unknown)}" if unknown else ""
    return _report(folder, what, [*findings, about, *own], details, remark)


def _report(
    folder: Path, what: str, findings: list[Finding], details: Mapping[str, Any] | None, remark: str = ""
) -> VerifyReport:
    trained_on = (details or {}).get("trained_on")
    trained_on = trained_on if isinstance(trained_on, dict) else {}
    return VerifyReport(str(folder), what, tuple(findings), trained_on, remark)


def _of_adapter(folder: Path, asked: VerifySettings) -> tuple[list[Finding], dict[str, Any] | None]:
    """Whether the parts of an adapter folder belong together; and yeonma.json, where it can be read."""
    try:
        adapter = read_adapter_folder(folder)
    except UserError as error:
        problems = [Problem(each.what, each.place, each.cure or belong.ANEW) for each in error.problems]
        rest = [
            not_checked(name, "the adapter folder cannot be read")
            for name in ("adapter", "base", "tokenizer", "sample rows")
        ]
        return [found("template and rules", problems, ""), *rest], None
    config, wrong = _config_of(folder)
    shapes: belong.Shapes = {}
    if config is None:
        findings = [found("adapter", wrong, "")]
    else:
        weights, shapes = belong.check_weights(folder, config)
        findings = [belong.check_names(adapter, config), weights]
    source = belong.where_is_base(adapter, asked.base_model, asked.trust_remote_code)
    if isinstance(source, Finding):
        findings.append(source)
    elif config is None or not shapes:
        findings.append(not_checked("base", "the adapter cannot be read"))
    else:
        findings.append(belong.check_model(adapter, source, shapes))
    findings += _of_tokenizers(adapter, source, asked)
    if asked.data_path is not None:
        findings.append(_of_data(adapter, asked))
    return findings, adapter.details


def _of_tokenizers(
    adapter: AdapterFolder, source: BaseSource | Finding, asked: VerifySettings
) -> list[Finding]:
    findings = []
    samples, damaged = None, None
    try:
        samples = read_samples(adapter.path)
    except UserError as error:
        problems = [Problem(each.what, each.place, each.cure or belong.ANEW) for each in error.problems]
        damaged = found("sample rows", problems, "")
    own = BaseSource(str(adapter.path), None, asked.trust_remote_code)
    looked_at = [("tokenizer", "sample rows", own)]
    if not isinstance(source, Finding):
        looked_at.append(("base's tokenizer", "sample rows, as the base", source))
    for check, rows, place in looked_at:
        try:
            tokenizer = load_tokenizer(place)
        except UserError as error:
            findings += [
                found(check, error.problems, ""),
                not_checked(rows, "the tokenizer cannot be loaded"),
            ]
            continue
        findings.append(belong.check_tokenizer(adapter, tokenizer, check, place.name))
        findings.append(damaged or belong.check_samples(adapter, samples, tokenizer, rows, place.name))
        if place is own:
            carrying = load_tokenizer(own, carried=True)
            findings.append(belong.check_chat_template(adapter, samples, carrying, tokenizer))
    return findings


def _config_of(folder: Path) -> tuple[dict[str, Any] | None, tuple[Problem, ...]]:
    try:
        return read_object(folder / "adapter_config.json"), ()
    except UserError as error:
        return None, error.problems


def _of_data(adapter: AdapterFolder, asked: VerifySettings) -> Finding:
    """Whether the data that the settings name is what the adapter was trained on. Raises UserError as `open_rows`."""
    recorded = adapter.details.get("trained_on", {}).get("data_sha256")
    if recorded is None:
        return not_checked("data", f"{MANIFEST} does not say what it was trained on")
    assert asked.data_path is not None
    rows = open_rows(
        asked.data_path, split=asked.data_split, revision=asked.data_revision, encoding=asked.encoding
    )
    if rows.identity == recorded:
        return found("data", [], f"the adapter was trained on {asked.data_path}")
    what = f"the adapter was not trained on it: its SHA-256 is {rows.identity}, that of the run's data {recorded}"
    return found("data", [Problem(what, asked.data_path, "give the file that the run was given")], "")
