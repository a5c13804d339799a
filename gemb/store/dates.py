"""Dates in metadata: texts of ISO 8601, and the dates that a user writes to compare them with.

Both become a text in UTC, such as 2024-05-01T12:30:59, of which the first 10 characters are the day,
16 go to the minute and 19 to the second; so dates are compared as texts. Years are 1 to 9999.
"""

import re
from datetime import UTC, datetime, timedelta

_WRITTEN = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[T ][0-9]{2}:[0-9]{2}(:[0-9]{2})?(?:Z|[+-][0-9]{2}:[0-9]{2})?)?"
)

# What SQLite reads of the texts that begin with year, month and day (`parseYyyyMmDd` in its date.c).
_STORED = re.compile(
    r"(?P<year>[0-9]{4})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})[ \t-\rT]*"
    r"(?:(?P<hours>[01][0-9]|2[0-4]):(?P<minutes>[0-5][0-9])(?::(?P<seconds>[0-5][0-9])(?:\.[0-9]+)?)?"
    r"[ \t-\r]*(?:[Zz]|(?P<sign>[+-])(?P<zone_hours>0[0-9]|1[0-4]):(?P<zone_minutes>[0-5][0-9]))?[ \t-\r]*)?"
)

# By length. A modifier, even one of nothing, makes SQLite turn 2024-02-31 and 24:00 into what they mean.
_FORMATS = {
    10: "strftime('%Y-%m-%d', {0}, '+0 days')",
    16: "strftime('%Y-%m-%dT%H:%M', {0}, '+0 days')",
    19: "strftime('%Y-%m-%dT%H:%M:%S', {0}, '+0 days')",
}
# SQLite reads `now`, 12:30 and 2460431.5 as dates; those do not begin with their day.
_BEGINS_WITH_DAY = "date(substr({0}, 1, 10), '+0 days') = substr({0}, 1, 10)"


def written_date(text: str) -> str | None:
    """The date that a user wrote, in UTC and as long as it was written; None if it is none.

    A day, or a day with a time to the minute or the second, with Z, +02:00 or no offset.
    """
    match = _WRITTEN.fullmatch(text)
    if not match:
        return None
    length = 10 if len(text) == 10 else 19 if match[1] else 16
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.astimezone(UTC) if moment.tzinfo else moment
    except (ValueError, OverflowError):
        return None
    return moment.isoformat()[:length]


def stored_moment(text: str) -> str | None:
    """A stored text in UTC, to the second; None if it is no date. A day begins at midnight."""
    match = _STORED.fullmatch(text)
    if not match:
        return None
    part = {name: int(digits or 0) for name, digits in match.groupdict().items() if name != "sign"}
    offset = timedelta(hours=part["zone_hours"], minutes=part["zone_minutes"])
    try:
        day = datetime(part["year"], part["month"], part["day"])
        local = day + timedelta(hours=part["hours"], minutes=part["minutes"], seconds=part["seconds"])
        return (local + offset if match["sign"] == "-" else local - offset).isoformat()
    except (ValueError, OverflowError):
        return None


def moment_sql(text: str, length: int) -> str:
    """SQL for the first 10, 16 or 19 characters of `stored_moment` of an SQL expression, or NULL."""
    is_date, moment = _BEGINS_WITH_DAY.format("stored"), _FORMATS[length].format("stored")
    return f"(SELECT CASE WHEN {is_date} THEN {moment} END FROM (SELECT {text} AS stored))"


def is_date_sql(text: str) -> str:
    """SQL that is true where `stored_moment` of an SQL expression that holds text is not None."""
    return f"({_BEGINS_WITH_DAY.format(text)} AND {_FORMATS[10].format(text)} IS NOT NULL)"
