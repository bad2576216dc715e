"""`yeonma verify OUT --served URL`: asks a server the sample rows, and says what differs from training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yeonma.adapter.adapter_folder import AdapterFolder, read_adapter_folder
from yeonma.adapter.sample_answers import SAMPLE_ANSWERS, SampleAnswer, read_sample_answers
from yeonma.adapter.samples import Samples, read_samples
from yeonma.config.settings import VerifySettings
from yeonma.errors import Log, UserError
from yeonma.files import existing_folder
from yeonma.messages import counted, later, tr
from yeonma.model.load import load_tokenizer
from yeonma.model.source import BaseSource
from yeonma.verify.compatibility import lost
from yeonma.verify.file_checks import Finding, checked, not_checked
from yeonma.verify.served_rows import ServedRow, answers_by_itself, ask, rows_to_ask
from yeonma.verify.served_verdict import judge
from yeonma.verify.server_client import Server, server_of
from yeonma.verify.verify_folder import VerifyReport, report_on

CONTEXT, DEFAULTS = later("served context"), later("served defaults")


def verify_served(settings: VerifySettings, log: Log = lambda _: None) -> VerifyReport:
    """Reads the folder's own files and asks the server; weights are not read.

    Raises UserError if the folder has no answers to compare with, and if no server answers.
    """
    folder = existing_folder(settings.adapter_dir, tr("give the output folder of a run"))
    adapter = read_adapter_folder(folder)
    samples, answers = _stored(folder)
    server = server_of(settings)
    own = load_tokenizer(BaseSource(str(folder), None, settings.trust_remote_code))
    exported = load_tokenizer(BaseSource(str(folder), None, settings.trust_remote_code), keep_exported=True)
    rows = rows_to_ask(adapter, samples, answers, own, exported)
    name = tr("{model} at {address}", model=server.model, address=server.root)
    log(tr("asking {server}: {rows}", server=name, rows=counted(len(rows), "row")))
    answered = ask(server, rows)
    verdict = judge(answered, name)
    what = tr("compared with {model} of {server}", model=server.model, server=server.name)
    findings = [*verdict.findings, _defaults(server, answered), _context(server, adapter)]
    return report_on(folder, what, findings, adapter.details, causes=verdict.causes)


def _stored(folder: Path) -> tuple[Samples, Sequence[SampleAnswer]]:
    samples, answers = read_samples(folder), read_sample_answers(folder)
    if samples is not None and not samples.rows:
        answers = []  # a run without a model card writes no file of answers
    if samples is None or answers is None:
        cure = tr("train again with this version; `yeonma verify` without --served checks the folder alone")
        raise UserError(lost(SAMPLE_ANSWERS), place=str(folder), cure=cure)
    if not answers:
        what = tr("the run saved no answers to compare with (card_rows 0, or texts without prompts)")
        raise UserError(what, place=str(folder), cure=tr("train with --card_rows 5"))
    return samples, answers


def _defaults(server: Server, rows: Sequence[ServedRow]) -> Finding:
    """Whether clients that name no temperature get the greedy answers, too. Either is as its owner wants it."""
    is_greedy = answers_by_itself(server, rows)
    if is_greedy is None:
        return not_checked(DEFAULTS, tr("no row was answered by messages"))
    if is_greedy:
        return checked(DEFAULTS, [], tr("a request that names no temperature gets the greedy answer, too"))
    about = tr("a request that names no temperature gets another answer: clients should send temperature 0")
    return Finding(DEFAULTS, "well", about)


def _context(server: Server, adapter: AdapterFolder) -> Finding:
    """The server's context beside the lengths of training. The sample rows may be short."""
    most = server.context()
    if most is None:
        return not_checked(CONTEXT, tr("the server does not tell its length"))
    cutoff_len = adapter.rules.cutoff_len
    if most >= cutoff_len:
        return checked(
            CONTEXT,
            [],
            tr("{tokens}, training had up to {most}", tokens=counted(most, "token"), most=cutoff_len),
        )
    about = tr(
        "{tokens}, less than the {most} that training allowed: longer prompts will be refused or cut there",
        tokens=counted(most, "token"),
        most=cutoff_len,
    )
    return Finding(CONTEXT, "well", about)
