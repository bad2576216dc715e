"""Rows, audit and forecast on a terminal: in colour, or with marks if it has no colours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import dropwhile

from rich.console import Console
from rich.table import Table
from rich.text import Text

from yeonma.inspect.audit import Audit, AuditedSource, Bias, Lengths, PartAudit
from yeonma.inspect.fit_verdict import VERDICT
from yeonma.inspect.label_counts import label_lines
from yeonma.messages import counted, later, tr, translated
from yeonma.shown import MOST_OF_A_LINE, one_line
from yeonma.tokenization.dataset import format_rows
from yeonma.tokenization.explain import SpanKind, TextSpan, View

STYLES: dict[SpanKind, str] = {
    "start": "magenta",
    "frame": "bright_black",
    "field": "cyan",
    "prompt": "cyan",
    "answer": "bold green",
    "end": "black on green",
    "cut": "red strike",
    "tools": "yellow",
    "reasoning": "blue",
    "call": "yellow",
    "untrained": "green",
}
WORDS: dict[SpanKind, str] = {
    "start": tr("start token"),
    "frame": tr("frame"),
    "field": tr("field"),
    "prompt": tr("prompt"),
    "answer": tr("trained answer"),
    "end": tr("trained end token"),
    "cut": tr("cut"),
    "tools": tr("tools"),
    "reasoning": tr("reasoning"),
    "call": tr("tool call"),
    "untrained": tr("untrained answer"),
}
ROLES = (later("chosen"), later("rejected"), later("desirable"), later("undesirable"))
"""The roles of answers that a view may name."""
SHOWN_IN_LEGEND: tuple[SpanKind, ...] = (
    *("frame", "field", "answer", "end", "cut"),
    *("tools", "reasoning", "call", "untrained"),
)
WITHIN_ANSWERS: tuple[SpanKind, ...] = ("answer", "end", "reasoning", "call")
"""The kinds that are trained in an ordinary answer."""
NAMED_BY_MARKS: tuple[SpanKind, ...] = ("tools", "reasoning", "call", "untrained")
WEIGHT_STYLE = "reverse"
VERDICT_STYLES = {
    "fits": "bold green",
    "may not fit": "bold yellow",
    "does not fit": "bold red",
    "unknown": "",
}
BAR = 16
CUT_SHOWN = 120
ROWS_LEFT_OUT_SHOWN = 3


def print_views(console: Console, views: Iterable[View], *, tokens: bool) -> None:
    """Print rows with coloured parts or, with `tokens`, token by token."""
    has_legend = False
    for view in views:
        if not has_legend:
            console.print(_legend(console), end="\n\n")
            has_legend = True
        style = "bold red" if view.left_out is not None else "bold"
        _print(console, (f"── {heading_of(view)} ──", style))
        if tokens and view.tokens:
            console.print(_token_table(view))
        else:
            spans = view.text_spans
            if view.role == "rejected":  # the prompt is shown with the chosen answer
                spans = tuple(dropwhile(lambda part: not part.trained and part.kind != "answer", spans))
            console.print(_coloured(spans, marks=console.color_system is None))
        console.print()


def print_audit(console: Console, audit: Audit, *, bars: bool = True) -> None:
    """Print the audit. With `bars`, it has a heading and histograms of lengths."""
    if bars:
        _print(console, (tr("── the data set ──"), "bold"))
    for source in audit.sources:
        for line in _source_lines(source):
            _print(console, line)
    for one in audit.sets:
        _print(console, (f"{one.name}", "bold"), f": {one.part}")
        for part in (one.train, one.validation):
            if part is not None:
                _print_part(console, part, tr("trained") if part is one.train else tr("validation"))
        for warning in one.overlaps:
            _print(console, (f"  ! {warning}", "yellow"))
    if audit.sets:
        _print_mixture(console, audit)
    else:
        for part in (audit.train, audit.validation):
            if part is not None:
                _print_part(console, part, tr("trained") if part is audit.train else tr("validation"))
    if bars:
        console.print(_histograms(audit.train))
    if audit.overlap is not None:
        _print(console, (f"! {audit.overlap}", "yellow"))
    for remark in audit.warnings:
        _print(console, (f"! {remark}", "yellow"))
    _print(console, (tr("per epoch: "), "bold"), _epoch(audit))
    _print(console, (tr("computation: "), "bold"), _saving(audit))


def print_forecast(console: Console, lines: Sequence[tuple[str, str]], verdict_style: str = "") -> None:
    """Print (name, text) lines. A name that starts with spaces is a part of the line before. `verdict_style`: of the
    line `verdict`."""
    if lines:
        _print(console, (tr("── forecast ──"), "bold"))
    for (key, text), (name, _) in zip(lines, shown_names(lines), strict=True):
        part = name.startswith(" ")
        _print(
            console, (f"{name}: ", "" if part else "bold"), (text, verdict_style if key == VERDICT else "")
        )


def shown_names(lines: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(name, text) lines of a forecast, with the name of the verdict in the language of help."""
    return [(tr(VERDICT) if name == VERDICT else name, text) for name, text in lines]


def print_remark(console: Console, label: str, text: str) -> None:
    """Print a line that begins with `label`."""
    _print(console, (f"{label}: ", "bold"), text)


def _print(console: Console, *parts: str | tuple[str, str]) -> None:
    """Prints one line, escaped, of texts and of texts with their style. A terminal that is too narrow for it gets
    several lines, broken between words and indented; a file or a pipe always gets one."""
    shown = [(part, "") if isinstance(part, str) else part for part in parts]
    line = Text.assemble(*((one_line(text, MOST_OF_A_LINE), style) for text, style in shown))
    if not console.is_terminal or line.cell_len <= console.width:
        console.print(line)
        return
    indent = len(line.plain) - len(line.plain.lstrip()) + 2
    first, *rest = line.wrap(console, console.width)
    console.print(first)
    for part in Text(" ").join(rest).wrap(console, max(20, console.width - indent)):
        console.print(Text(" " * indent) + part)


def _legend(console: Console) -> Text:
    if console.color_system is None:
        named = ", ".join(WORDS[kind] for kind in NAMED_BY_MARKS)
        return Text(
            tr(
                "«trained answer and end token»  ⟨cut text⟩  ⟦name: {named}⟧  ×0.5 weight in the loss",
                named=named,
            )
        )
    kinds = [Text(WORDS[kind], STYLES[kind]) for kind in SHOWN_IN_LEGEND]
    return Text("  ").join([*kinds, Text.assemble(("×0.5", WEIGHT_STYLE), tr(" weight in the loss"))])


def heading_of(view: View) -> str:
    """A line about a view."""
    trained = sum(view.trained)
    row = tr("row {row}", row=view.row)
    if view.data_set:
        row = tr("{data_set} row {row}", data_set=view.data_set, row=view.row)
    parts = [row, view.place, *([tr(view.role)] if view.role is not None else [])]
    if view.left_out is not None:
        parts.append(tr("left out: {left_out}", left_out=translated(view.left_out)))
    else:
        tokens = counted(len(view.token_ids), "token")
        parts.append(tr("{tokens}, {trained:,} trained", tokens=tokens, trained=trained))
    if view.cut_characters:
        fields = sorted({part.field or "" for part in view.text_spans if part.kind == "cut"})
        characters = counted(view.cut_characters, "character")
        parts.append(tr("{characters} cut from {fields}", characters=characters, fields=", ".join(fields)))
    if view.dropped_turns:
        parts.append(tr("{turns} dropped", turns=counted(view.dropped_turns, "old turn")))
    if view.straddles:
        parts.append(tr("answer tokenised separately: its first token would merge with the prompt"))
    if view.special_text:
        texts = counted(view.special_text, "special-token text")
        parts.append(tr("{texts} encoded as ordinary text", texts=texts))
    if view.is_held_out:
        parts.append(tr("validation"))
    return " · ".join(parts)


def _coloured(spans: Sequence[TextSpan], *, marks: bool) -> Text:
    text = Text()
    trained, weight = False, 1.0
    for span in spans:
        if marks and span.trained != trained:
            text.append("«" if span.trained else "»")
            trained = span.trained
        if span.weight not in (weight, 1):
            text.append(weight_text(span.weight), WEIGHT_STYLE if not marks else "")
        weight = span.weight
        content = printable(span.text)
        if span.kind == "cut":
            if len(content) > CUT_SHOWN:
                content = f"{content[: CUT_SHOWN // 2]} … {content[-CUT_SHOWN // 2 :]}"
            cut = tr("⟨{characters} cut: ", characters=counted(len(span.text), "character"))
            text.append(cut, "red" if not marks else "")
            text.append(content, STYLES["cut"])
            text.append("⟩", "red")
        else:
            named = marks and span.kind in NAMED_BY_MARKS
            style = style_of(span.kind, trained=span.trained)
            text.append(f"⟦{WORDS[span.kind]}: {content}⟧" if named else content, style)
    if trained:
        text.append("»")
    return text


def style_of(kind: SpanKind, *, trained: bool) -> str:
    """The style of a span. What is trained is bold in an answer, and underlined elsewhere."""
    extra = " bold" if kind in WITHIN_ANSWERS else " underline"
    return STYLES[kind] + (extra if trained and kind not in ("answer", "end") else "")


def weight_text(weight: float) -> str:
    """A weight as shown before the text that has it: `×0.5`."""
    return f"×{weight:.3g} "


def printable(text: str) -> str:
    """`text` made safe for a terminal: invisible characters other than line ends and tabs become ⟨U+200B⟩."""
    if text.isprintable():
        return text
    return "".join(
        [char if char.isprintable() or char in "\n\t" else f"⟨U+{ord(char):04X}⟩" for char in text]
    )


def _token_table(view: View) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    names = (tr("at"), "id", tr("text"), "", "")
    for name, justify in zip(names, ("right", "right", "left", "left", "left"), strict=True):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for position, token in enumerate(view.tokens):
        text = _one_line(token.text) if token.text else f"({token.name})"
        style = style_of(token.kind, trained=token.trained)
        words = tr("trained") if token.trained else ""
        words += f" {weight_text(token.weight).strip()}" if token.weight != 1 else ""
        table.add_row(str(position), str(token.id), Text(text, style), Text(WORDS[token.kind], "dim"), words)
    return table


def _one_line(text: str) -> str:
    return printable(text).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def _source_lines(source: AuditedSource) -> Iterator[str | tuple[str, str]]:
    about = {"name": source.name, "rows": counted(source.rows, "row"), "template": source.template}
    if source.identical:
        yield tr(
            "{name}: {rows} read, {left_out:,} left out ({identical:,} with two equal answers); template {template}",
            **about,
            left_out=source.left_out,
            identical=source.identical,
        )
    elif source.left_out:
        yield tr(
            "{name}: {rows} read, {left_out:,} left out; template {template}",
            **about,
            left_out=source.left_out,
        )
    else:
        yield tr("{name}: {rows} read, none left out; template {template}", **about)
    for fault in source.bad_rows:
        yield tr("  bad rows, {fault}", fault=fault), "red"
    for row in source.left_out_rows[:ROWS_LEFT_OUT_SHOWN]:
        yield f"  {row.place}: {translated(row.reason)}", "red"
    more = source.left_out - min(source.left_out, ROWS_LEFT_OUT_SHOWN)
    if more:
        rows = [row.row for row in source.left_out_rows[ROWS_LEFT_OUT_SHOWN:]]
        yield tr("  and {more:,} more: {rows}", more=more, rows=format_rows(rows, more)), "red"


def _print_mixture(console: Console, audit: Audit) -> None:
    part = audit.train
    line = tr(
        "{rows}, {tokens:,} tokens, {trained_tokens:,} of them trained",
        rows=counted(part.rows, "row"),
        tokens=part.tokens,
        trained_tokens=part.trained_tokens,
    )
    _print(console, (tr("all data sets: "), "bold"), line)
    _print_lengths(console, part)


def _print_lengths(console: Console, part: PartAudit) -> None:
    for name, lengths in ((tr("prompts"), part.prompt_tokens), (tr("answers"), part.answer_tokens)):
        spread = tr(
            "  {name}: {least:,} to {most:,} tokens, median {median:,}, 95% have at most {p95:,}",
            name=name,
            least=lengths.least,
            most=lengths.most,
            median=lengths.median,
            p95=lengths.p95,
        )
        _print(console, spread)


def _print_part(console: Console, part: PartAudit, label: str) -> None:
    rows = counted(part.rows, "row")
    if part.examples != part.rows:
        rows += f", {counted(part.examples, 'answer')}"
    line = tr(
        "{rows}, {tokens:,} tokens, {trained_tokens:,} of them trained",
        rows=rows,
        tokens=part.tokens,
        trained_tokens=part.trained_tokens,
    )
    _print(console, (f"{label}: ", "bold"), line)
    if part.shortened:
        _print(console, (_shortened(part), "red"))
    else:
        _print(console, tr("  none shortened"))
    if len(part.variants) > 1:
        variants = ", ".join(
            tr("variant {number}: {count:,}", number=number, count=count)
            for number, count in enumerate(part.variants, 1)
            if count
        )
        _print(console, tr("  template {variants}", variants=variants))
    _print(console, tr("  answers in {part}", part=_scripts(part)))
    for entry in label_lines(part.answer_labels) if part.answer_labels is not None else ():
        text, style = (entry, "") if isinstance(entry, str) else entry
        _print(console, (f"  {text}", style))
    if part.bias is not None:
        leans = _leans(part.bias, part.units)
        _print(console, (f"  {_bias(part.bias, part.units)}", "yellow" if leans else ""))
    if part.labels is not None:
        _print(console, (f"  {part.labels}", "yellow" if part.labels.warning else ""))
    for warning in part.remarks:
        _print(console, (f"  ! {warning}", "yellow"))
    _print_lengths(console, part)


def _shortened(part: PartAudit) -> str:
    characters = counted(part.cut_characters, "character")
    turns = counted(part.dropped_turns, "old turn")
    about = {"count": part.shortened, "rows": format_rows(part.shortened_rows, part.shortened)}
    if not part.dropped_turns:
        return tr("  {count:,} shortened, by {characters} in total ({rows})", **about, characters=characters)
    if not part.cut_characters:
        return tr("  {count:,} shortened, by {turns} of conversations ({rows})", **about, turns=turns)
    return tr(
        "  {count:,} shortened, by {characters} in total and by {turns} of conversations ({rows})",
        **about,
        characters=characters,
        turns=turns,
    )


def _bias(bias: Bias, pairs: int) -> str:
    text = tr(
        "length: the chosen answer is longer in {chosen_longer:.0%} of pairs, the rejected one in "
        "{rejected_longer:.0%}; {chosen_mean:.0f} tokens on average against {rejected_mean:.0f}",
        chosen_longer=bias.chosen_longer / pairs,
        rejected_longer=bias.rejected_longer / pairs,
        chosen_mean=bias.chosen_mean,
        rejected_mean=bias.rejected_mean,
    )
    if not _leans(bias, pairs):
        return text
    return tr("{lengths}: a model can learn length alone from this", lengths=text)


def _leans(bias: Bias, pairs: int) -> bool:
    """Whether length alone predicts the chosen answer in at least three of four pairs."""
    return pairs >= 8 and max(bias.chosen_longer, bias.rejected_longer) >= 0.75 * pairs


def _scripts(part: PartAudit) -> str:
    entries = []
    for scripts in part.scripts[:4]:
        names = " + ".join(map(tr, scripts.names)) or tr("no letters")
        rows = (
            f" ({format_rows(scripts.rows, scripts.count, most=3)})"
            if scripts.count * 20 <= part.rows
            else ""
        )
        entries.append(f"{names}: {scripts.count:,}{rows}")
    more = len(part.scripts) - len(entries)
    listed = ", ".join(entries)
    return tr("{listed} and {more} more mixtures", listed=listed, more=more) if more else listed


def _histograms(part: PartAudit) -> Table:
    table = Table(box=None, padding=(0, 4, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(tr("  prompt tokens: rows"))
    table.add_column(tr("  answer tokens: rows"))
    table.add_row(_histogram(part.prompt_tokens), _histogram(part.answer_tokens))
    return table


def _histogram(lengths: Lengths) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    largest = max(bin_.count for bin_ in lengths.bins)
    for bin_ in lengths.bins:
        length = bin_.count / largest * BAR
        bar = "█" * int(length) + ("▌" if length % 1 >= 0.5 or (bin_.count and length < 0.5) else "")
        span = f"{bin_.least:,}" if bin_.least == bin_.most else f"{bin_.least:,}-{bin_.most:,}"
        table.add_row(f"  {span}", Text(bar.ljust(BAR), "cyan"), f"{bin_.count:,}")
    return table


def _epoch(audit: Audit) -> str:
    return tr(
        "{steps_per_epoch}, {tokens:,} tokens, {trained_tokens:,} of them trained; whole run: {steps}",
        steps_per_epoch=counted(audit.steps_per_epoch, "step"),
        tokens=audit.tokens_per_epoch,
        trained_tokens=audit.trained_tokens_per_epoch,
        steps=counted(audit.steps, "step"),
    )


def _saving(audit: Audit) -> str:
    work = audit.work
    padding, shared = 1 - work.unpadded / work.padded, (work.unpadded - work.forest) / work.padded
    return tr(
        "{saved:.0%} less than with padding: {padding:.0%} from no padding, {shared:.0%} from shared prefixes "
        "(first {steps})",
        saved=work.saved,
        padding=padding,
        shared=shared,
        steps=counted(work.steps, "step"),
    )
