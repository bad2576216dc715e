"""The strict JSON parser reads what json.dumps writes, and reports incomplete objects as cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from yeonma.data.strict_json import Fault, parse


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.booleans(),
)
def test_json_objects_round_trip_and_their_prefixes_count_as_cut(inner: object, ascii_only: bool) -> None:
    row = {"key": inner}
    text = json.dumps(row, ensure_ascii=ascii_only)
    assume("\\u0000" not in text and "\0" not in text)
    assert parse(text, 0) == (row, len(text))
    for end in range(1, len(text)):
        with pytest.raises(Fault) as caught:
            parse(text[:end], 0)
        assert caught.value.cut, text[:end]
