"""Checks an output folder, or an adapter copied out of it: files unchanged, and parts that belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yeonma.adapter.adapter_folder import MANIFEST, AdapterFolder, is_full, read_adapter_folder
from yeonma.adapter.samples import read_samples
from yeonma.config.settings import VerifySettings
from yeonma.data.rows import open_rows
from yeonma.errors import Log, Problem, UserError
from yeonma.files import existing_folder
from yeonma.messages import later, tr
from yeonma.model.load import load_tokenizer
from yeonma.model.source import BaseSource
from yeonma.run_folder.checkpoint import OPTIMIZER, RANDOM, STATE, checkpoints
from yeonma.run_folder.entries import RUN
from yeonma.run_folder.lock import is_locked
from yeonma.tokenization.new_tokens import add_new_tokens
from yeonma.verify.compatibility import (
    REPLACE,
    Shapes,
    check_base_config,
    check_base_content,
    check_chat_template,
    check_full_model,
    check_model,
    check_names,
    check_samples,
    check_tokenizer,
    check_weights,
    locate_base,
)
from yeonma.verify.file_checks import (
    Finding,
    check_checkpoint,
    check_files,
    check_run,
    checked,
    manifest_hashes,
    not_checked,
    read_object,
    unknown_files,
)

MAX_UNKNOWN = 5
"""Unknown files that the report names."""


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and all findings."""

    folder: str
    what: str
    findings: tuple[Finding, ...]
    trained_on: Mapping[str, Any]
    """From yeonma.json; empty if that cannot be read."""
    remark: str = ""
    causes: tuple[str, ...] = ()
    """Why a server differs, by the names in `served_verdict.Cause`."""

    @property
    def is_well(self) -> bool:
        """Whether no check found a difference."""
        return all(finding.outcome != "differs" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        content = {**asdict(self), "is_well": self.is_well}
        for finding in content["findings"]:
            for problem in finding["problems"]:
                del problem["of_row"]  # which tells our own messages apart
        return content


def verify(settings: VerifySettings, log: Log = lambda _: None) -> VerifyReport:
    """Checks a run's output folder, a checkpoint or a copied adapter folder. Changes nothing. `log` gets a line if
    reading the base takes long.

    Raises UserError if there is nothing to check, or if the settings name a base or data that does not exist.
    """
    folder = existing_folder(settings.adapter_dir, tr("give the output folder of a run"))
    if (folder / RUN).is_file() or checkpoints(folder):
        return _verify_run(folder, settings, log)
    if any((folder / name).is_file() for name in (STATE, OPTIMIZER, RANDOM)):
        findings, details = _check_adapter(folder, settings, log)
        files = check_checkpoint(folder, None, None)
        return report_on(folder, tr("a checkpoint"), [files, *findings], details)
    if not (folder / MANIFEST).is_file():
        cure = tr("give the output folder of a run, a checkpoint, or an adapter folder copied from there")
        raise UserError(tr("no Yeonma run in this folder"), place=settings.adapter_dir, cure=cure)
    is_model = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    full = is_model and is_full(read_object(folder / MANIFEST))
    if is_model and not full:
        what = tr("this is a merged model, not an adapter")
        cure = tr("give the folder of the adapter that was merged")
        raise UserError(what, place=settings.adapter_dir, cure=cure)
    findings, details = _check_adapter(folder, settings, log)
    what = tr("a model without its run") if full else tr("an adapter without its run")
    return report_on(folder, what, [check_files(folder, is_run=False), *findings], details)


def _verify_run(folder: Path, settings: VerifySettings, log: Log) -> VerifyReport:
    all_checkpoints, running = checkpoints(folder), is_locked(folder)
    try:
        run = read_object(folder / RUN)
        if not isinstance(run.get("identity"), dict) or not isinstance(run.get("finished"), bool):
            raise UserError(tr("damaged"), place=str(folder / RUN), cure=tr("restore a copy of the file"))
        identity, finished = run["identity"], run["finished"]
        run_finding = checked(later("run"), [], "")
    except UserError as error:
        run, identity, finished = {}, None, False
        run_finding = checked(later("run"), error.problems, "")
    findings = []
    if finished and not running:
        adapter, what = folder, tr("a finished run")
        findings.append(check_files(folder, is_run=True))
    else:
        adapter = all_checkpoints[-1] if all_checkpoints else folder
        what = tr("a run that is under way") if running else tr("a run that is not finished")
        findings.append(not_checked(later("files"), tr("the run has not written its adapter yet")))
    adapter_findings: list[Finding] = []
    details, config = None, None
    if adapter is not folder or finished:
        adapter_findings, details = _check_adapter(adapter, settings, log)
        config = _adapter_config(adapter)[0]
    if run_finding.outcome == "well":
        run_finding = check_run(folder, run, details, config)
    findings += [check_checkpoint(checkpoint, identity, details) for checkpoint in all_checkpoints]
    unknown = unknown_files(folder, manifest_hashes(folder) if finished else None)
    return report_on(folder, what, [*findings, run_finding, *adapter_findings], details, _remark(unknown))


def _remark(unknown: list[str]) -> str:
    if not unknown:
        return ""
    names = ", ".join(unknown[:MAX_UNKNOWN])
    if len(unknown) > MAX_UNKNOWN:
        names = tr("{name} and {count} more", name=names, count=len(unknown) - MAX_UNKNOWN)
    return tr("not from the run: {names}", names=names)


def report_on(
    folder: Path,
    what: str,
    findings: Sequence[Finding],
    details: Mapping[str, Any] | None,
    remark: str = "",
    causes: tuple[str, ...] = (),
) -> VerifyReport:
    """`details`: yeonma.json, if it can be read."""
    trained_on = (details or {}).get("trained_on")
    trained_on = trained_on if isinstance(trained_on, dict) else {}
    return VerifyReport(str(folder), what, tuple(findings), trained_on, remark, causes)


def _check_adapter(
    folder: Path, settings: VerifySettings, log: Log
) -> tuple[list[Finding], dict[str, Any] | None]:
    """Checks that the parts of an adapter folder belong together. Also returns yeonma.json, if it can be read."""
    try:
        adapter = read_adapter_folder(folder)
    except UserError as error:
        rest = [
            not_checked(name, tr("the adapter folder cannot be read"))
            for name in ("adapter", "base", "base's content", "tokenizer", "sample rows")
        ]
        return [checked(later("template and rules"), _with_cures(error), ""), *rest], None
    config, problems = _adapter_config(folder)
    shapes: Shapes = {}
    if adapter.is_full:
        findings = [check_full_model(adapter)]
    elif config is None:
        findings = [checked(later("adapter"), problems, "")]
    else:
        weights, shapes = check_weights(folder, config)
        findings = [check_names(adapter, config), weights]
    source = locate_base(adapter, settings.base_model, settings.trust_remote_code)
    if isinstance(source, Finding):
        findings.append(source)
    elif adapter.is_full:
        findings.append(check_base_config(adapter, source))
    elif config is None or not shapes:
        findings.append(not_checked(later("base"), tr("the adapter cannot be read")))
    else:
        findings.append(check_model(adapter, source, shapes))
    findings.append(check_base_content(adapter, source, log))
    findings += _check_tokenizers(adapter, source, settings)
    if settings.data_path is not None:
        findings.append(_check_data(adapter, settings.data_path, settings))
    return findings, adapter.details


def _with_cures(error: UserError) -> list[Problem]:
    return [Problem(problem.what, problem.place, problem.cure or REPLACE) for problem in error.problems]


def _check_tokenizers(
    adapter: AdapterFolder, source: BaseSource | Finding, settings: VerifySettings
) -> list[Finding]:
    """Checks the folder's tokenizer and the base's: both must give the token ids of training."""
    findings = []
    samples, damaged = None, None
    try:
        samples = read_samples(adapter.path)
    except UserError as error:
        damaged = checked(later("sample rows"), _with_cures(error), "")
    own = BaseSource(str(adapter.path), None, settings.trust_remote_code)
    tokenizers = [(later("tokenizer"), later("sample rows"), own)]
    if not isinstance(source, Finding):
        tokenizers.append((later("base's tokenizer"), later("sample rows, as the base"), source))
    for check, rows, place in tokenizers:
        try:
            tokenizer = load_tokenizer(place)
            if place is not own:
                add_new_tokens(tokenizer, adapter.new_tokens)
        except UserError as error:
            findings.append(checked(check, error.problems, ""))
            findings.append(not_checked(rows, tr("the tokenizer cannot be loaded")))
            continue
        findings.append(check_tokenizer(adapter, tokenizer, check, place.name))
        findings.append(damaged or check_samples(adapter, samples, tokenizer, rows, place.name))
        if place is own:
            exported = load_tokenizer(own, keep_exported=True)
            findings.append(check_chat_template(adapter, samples, exported, tokenizer))
    return findings


def _adapter_config(folder: Path) -> tuple[dict[str, Any] | None, tuple[Problem, ...]]:
    try:
        return read_object(folder / "adapter_config.json"), ()
    except UserError as error:
        return None, error.problems


def _check_data(adapter: AdapterFolder, data_path: str, settings: VerifySettings) -> Finding:
    """Checks that the adapter was trained on this data. Raises UserError as `open_rows`."""
    trained_on = adapter.details.get("trained_on", {})
    records = trained_on.get("data_sets") or [trained_on]
    if any(not isinstance(record.get("data_sha256"), str) for record in records):
        return not_checked(
            "data", tr("{manifest} does not say what the adapter was trained on", manifest=MANIFEST)
        )
    identities = []
    for record in records:
        max_rows, delimiter = record.get("max_rows"), record.get("delimiter")
        rows = open_rows(
            data_path,
            split=settings.data_split,
            revision=settings.data_revision,
            encoding=settings.encoding,
            delimiter=delimiter if isinstance(delimiter, str) else None,
            max_rows=max_rows if type(max_rows) is int and max_rows > 0 else None,
        )
        if rows.identity == record["data_sha256"]:
            return checked(
                later("data"), [], tr("the adapter was trained on {data_path}", data_path=data_path)
            )
        identities.append(rows.identity)
    recorded = tr(" or ").join(record["data_sha256"] for record in records)
    hashes = tr(
        "its SHA-256 is {identities}, that of the run's data {recorded}",
        identities=identities[0],
        recorded=recorded,
    )
    what = tr("the adapter was not trained on this data: {hashes}", hashes=hashes)
    return checked(later("data"), [Problem(what, data_path, tr("give the data file of the run"))], "")
