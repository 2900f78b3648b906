"""First occurrences over pieces equal those of a plain set, however the strings are split."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.curation.pool import distinct
from mc2_hpc.curation.pool.distinct import Distinct


def strings(values: list[str]) -> pa.Array:
    return pa.array(values, pa.large_string())


pieces = st.lists(st.lists(st.text(alphabet="ab\0é", max_size=3), max_size=12), max_size=8)


@settings(deadline=None)
@given(pieces, st.integers(1, 20))
def test_equals_a_plain_set(cut, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distinct, "_MAX_RUN", longest)
        counter, marker, plain = Distinct(), Distinct(), set()
        for piece in cut:
            expected = []
            for value in piece:
                expected.append(value not in plain)
                plain.add(value)
            assert marker.is_new(strings(piece)).tolist() == expected
            counter.add(strings(piece))
            assert len(counter) == len(marker) == len(plain)


def test_many_pieces_make_few_runs():
    seen = Distinct()
    for piece in range(100):
        seen.add(strings([f"{piece}-{n}" for n in range(50)]))
    assert len(seen) == 5000 and len(seen._runs) < 10
