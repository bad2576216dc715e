"""The part of a report's page in which people vote on the answers without seeing whose they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from yeonma.messages import tr
from yeonma.shown import html


def vote_part(names: Sequence[str]) -> Iterator[str]:
    """The section; nothing for one model alone. `page_parts/votes.js` fills it."""
    if len(names) < 2:
        return
    about = tr(
        "Two answers to each row, in random order and without names: say which is better. You may stop at any time. "
        "The votes stay in this browser; at the end they can be saved as preference data for yeonma dpo."
    )
    yield f'<section id="votes" aria-labelledby="votes-heading"><h2 id="votes-heading">{html(tr("Vote blind"))}</h2>'
    yield f'<p id="vote-about" class="dim">{html(about)}</p>'
    yield f"<noscript><p>{html(tr('Voting needs JavaScript.'))}</p></noscript>"
    if len(names) > 2:
        yield '<div id="vote-pair" class="choices">'
        for name, label, chosen in (
            ("vote-first", tr("one model"), 0),
            ("vote-second", tr("other model"), 1),
        ):
            options = "".join(
                f'<option value="{model}"{" selected" if model == chosen else ""}>{html(text)}</option>'
                for model, text in enumerate(names)
            )
            yield f'<label>{html(label)} <select id="{name}">{options}</select></label>'
        yield "</div>"
    yield f'<button id="vote-start" type="button">{html(tr("Start voting"))}</button>'
    yield '<p id="vote-state" class="dim" role="status"></p>'
    yield '<div id="ballot" hidden><h3 id="ballot-heading" tabindex="-1"></h3>'
    yield f'<h4 id="ballot-prompt-heading">{html(tr("prompt"))}</h4>'
    yield '<pre id="ballot-prompt" dir="auto" tabindex="0" role="region" aria-labelledby="ballot-prompt-heading"></pre>'
    yield '<div id="ballot-reference"></div><div class="sides">'
    for side in (1, 2):
        heading = html(tr("Answer {number}", number=side))
        yield f'<div role="group" aria-labelledby="side-{side}"><h4 id="side-{side}">{heading}</h4>'
        yield f'<p id="ballot-{side}" dir="auto"></p></div>'
    yield "</div>"
    yield f'<div class="choices" role="group" aria-label="{html(tr("your vote"))}">'
    for choice, text in (
        ("1", tr("Answer 1 is better (key 1)")),
        ("0", tr("tie (key 0)")),
        ("2", tr("Answer 2 is better (key 2)")),
    ):
        yield f'<button id="vote-{choice}" type="button" aria-keyshortcuts="{choice}">{html(text)}</button>'
    yield '</div><div class="choices">'
    yield f'<button id="vote-back" type="button">{html(tr("Back (Backspace)"))}</button>'
    yield f'<button id="vote-end" type="button">{html(tr("Stop and see the result (Esc)"))}</button></div></div>'
    yield f'<div id="tally" hidden><h3 id="tally-heading" tabindex="-1">{html(tr("Your votes"))}</h3>'
    yield '<ul id="tally-lines"></ul><div class="choices">'
    yield f'<button id="vote-save" type="button">{html(tr("Save pairs.jsonl"))}</button>'
    yield f'<button id="vote-forget" type="button">{html(tr("Delete the votes"))}</button></div></div></section>'


def vote_words() -> dict[str, str]:
    """What the script says itself. It puts values at `%1` to `%4`."""
    return {
        "vote_start": tr("Start voting"),
        "vote_on": tr("Go on voting ({done} of {all} rows done)", done="%1", all="%2"),
        "vote_row": tr("Row {row}: {number} of {all}", row="%1", number="%2", all="%3"),
        "vote_equal": tr("The models give the same answer to every row."),
        "vote_wins": tr("{model}: {count} wins", model="%1", count="%2"),
        "vote_ties": tr("ties: {count}", count="%1"),
        "vote_rate": tr(
            "win rate of {model}: {rate}%, 95% interval {low} to {high}; a tie counts one half",
            model="%1",
            rate="%2",
            low="%3",
            high="%4",
        ),
        "vote_judge": tr("you and the judge agree on {same} of {all} rows", same="%1", all="%2"),
        "vote_open": tr("rows without a vote: {count}", count="%1"),
        "vote_same": tr("rows with equal answers, which are not asked: {count}", count="%1"),
        "vote_pairs": tr("pairs to save: {count}", count="%1"),
        "vote_left": tr(
            "votes that make no pair, because an answer is empty or the row has tools: {count}", count="%1"
        ),
        "vote_forget": tr("Delete all votes on these two models?"),
    }
