import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemb.store.dates import is_date_sql, moment_sql, stored_moment, written_date

steadily = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

# Texts that are dates, or nearly: each part from a pool with some that do not fit.
DAYS = ["2024-02-29", "2023-02-29", "2024-12-31", "0001-01-02", "9999-12-30", "2024-1-1", "24-01-01"]
TIMES = ["", "00:00", "12:30", "23:59:59", "24:00", "24:59:00", "25:00", "12:60", "7:00", "12"]
OFFSETS = ["", "Z", "z", " Z", "+02:00", "-14:59", "+15:00", "+0200", "UTC"]
NEARLY_DATES = st.tuples(
    st.sampled_from(DAYS),
    st.sampled_from(["", "T", " ", "TT", "  ", "\n", "x", "t"]),
    st.sampled_from(TIMES),
    st.sampled_from(["", ".5", ".", ".250", ":00"]),
    st.sampled_from(OFFSETS),
    st.sampled_from(["", " ", "x"]),
).map("".join)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.fixture(scope="module")
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as opened:
        yield opened


@steadily
@given(text=NEARLY_DATES | TEXTS | st.sampled_from(["now", "2460431.5", "12:30", "0", "-4713-11-24"]))
def test_sqlite_reads_the_same_moment(connection: sqlite3.Connection, text: str) -> None:
    moment = stored_moment(text)
    query = f"SELECT {is_date_sql('?1')}, " + ", ".join(moment_sql("?1", length) for length in (10, 16, 19))
    is_date, *moments = connection.execute(query, [text]).fetchone()
    assert bool(is_date) is (moment is not None)
    assert moments == [moment and moment[:length] for length in (10, 16, 19)]


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2024-05-01", "2024-05-01T00:00:00"),
        ("2024-05-01T12:30", "2024-05-01T12:30:00"),
        ("2024-05-01 12:30:59.999", "2024-05-01T12:30:59"),
        ("2024-05-01T12:30:00Z", "2024-05-01T12:30:00"),
        ("2024-05-01T00:30:00+02:00", "2024-04-30T22:30:00"),
        ("2024-12-31T20:30-05:45", "2025-01-01T02:15:00"),
        ("2024-05-01T24:00", "2024-05-02T00:00:00"),
        ("2024-02-30", None),
        ("2024-5-1", None),
        ("2024-05", None),
        ("20240501", None),
        ("2024-05-01T12:30:00+0200", None),
        ("٢٠٢٤-٠٥-٠١", None),
        ("", None),
        ("9999-12-31T23:59-01:00", None),
    ],
)
def test_a_stored_date_is_taken_to_utc(text: str, moment: str | None) -> None:
    assert stored_moment(text) == moment


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2024-05-01", "2024-05-01"),
        ("2024-05-01T12:30", "2024-05-01T12:30"),
        ("2024-05-01 12:30:59", "2024-05-01T12:30:59"),
        ("2024-05-01T12:30Z", "2024-05-01T12:30"),
        ("2024-05-01T00:30:00+02:00", "2024-04-30T22:30:00"),
        ("0001-01-01", "0001-01-01"),
        ("0001-01-01T00:00+01:00", None),
        ("2024-02-30", None),
        ("2024-05-01T24:00", None),
        ("2024-05-01T12", None),
        ("2024-05-01T12:30:59.5", None),
        ("2024-05-01t12:30", None),
        ("2024-5-1", None),
        ("2024-05-01 ", None),
        ("٢٠٢٤-٠٥-٠١", None),
        ("", None),
    ],
)
def test_a_written_date_keeps_its_length(text: str, date: str | None) -> None:
    assert written_date(text) == date
