import itertools
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
# Texts that are dates, or nearly: every choice of parts, some of which do not fit.
DAYS = ["2024-02-29", "2023-02-29", "2024-12-31", "9999-12-30", "2024-1-1"]
GAPS = ["", "T", " ", "TT", "\n", "t"]
TIMES = ["", "00:00", "23:59:59", "24:00", "24:59:00", "25:00", "12:60", "7:00", "12"]
FRACTIONS = ["", ".5", ".", ":00"]
OFFSETS = ["", "Z", "z", " Z", "+02:00", "-14:59", "+15:00", "+0200"]
TAILS = ["", " ", "x"]
NEARLY_DATES = ["".join(parts) for parts in itertools.product(DAYS, GAPS, TIMES, FRACTIONS, OFFSETS, TAILS)]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.fixture(scope="module")
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as opened:
        yield opened


def moments_by_sqlite(connection: sqlite3.Connection, text: str) -> tuple[bool, list[str | None]]:
    query = f"SELECT {is_date_sql('?1')}, " + ", ".join(moment_sql("?1", length) for length in (10, 16, 19))
    is_date, *moments = connection.execute(query, [text]).fetchone()
    return bool(is_date), moments


def moments_plainly(text: str) -> tuple[bool, list[str | None]]:
    moment = stored_moment(text)
    return moment is not None, [moment and moment[:length] for length in (10, 16, 19)]


def test_sqlite_reads_the_same_moment_in_all_that_is_nearly_a_date(connection: sqlite3.Connection) -> None:
    found = [moments_plainly(text) for text in NEARLY_DATES]
    wrong = [
        text
        for text, moments in zip(NEARLY_DATES, found, strict=True)
        if moments_by_sqlite(connection, text) != moments
    ]
    assert wrong == []
    assert 1000 < sum(is_date for is_date, _ in found) < len(NEARLY_DATES) // 2


@steadily
@given(text=TEXTS | st.sampled_from(["now", "2460431.5", "12:30", "0", "-4713-11-24", "0001-01-02"]))
def test_sqlite_reads_the_same_moment_in_any_text(connection: sqlite3.Connection, text: str) -> None:
    assert moments_by_sqlite(connection, text) == moments_plainly(text)


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
