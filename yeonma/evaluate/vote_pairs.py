"""The prompt of a row as columns, so that people's votes become preference data that `yeonma dpo` reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from yeonma.adapter.found_adapter import rendered_prompts
from yeonma.config.settings import CompareSettings
from yeonma.data.columns import field_text
from yeonma.data.rows import Row
from yeonma.evaluate.candidates import Candidate, columns_for
from yeonma.tokenization.conversation import as_messages

PairColumns = dict[str, Any]


def pair_columns(
    candidate: Candidate, rows: Sequence[Row], settings: CompareSettings
) -> list[PairColumns | None]:
    """For each row, the columns of its prompt, named like the fields of the model's template: texts, or turns as
    messages. None for a row with tools, which preference data cannot have."""
    builder, columns = candidate.prompt_builder, columns_for(candidate, settings.columns)
    template = builder.adapter.template
    found: list[PairColumns | None] = []
    for row, rendered in zip(rows, rendered_prompts(builder.adapter, rows, columns), strict=True):
        if rendered.tools:
            found.append(None)
        elif template.is_chat:
            found.append({"messages": as_messages(rendered.turns)})
        else:
            names = candidate.columns(row, columns)
            fields = sorted((template.fields | {*template.side_columns}) - {template.answer_field})
            values = {field: _value(row, names.get(field, field)) for field in fields}
            found.append({field: value for field, value in values.items() if value is not None})
    return found


def _value(row: Row, column: str) -> Any:
    value = row.values.get(column)
    return value if isinstance(value, (list, dict, bool)) else field_text(row, column)
