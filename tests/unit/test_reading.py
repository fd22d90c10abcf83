"""Times and ages, as people write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from iot_pipeline.errors import UsageError
from iot_pipeline.reading import parse_moment

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    "text,expected",
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("7d", NOW - timedelta(days=7)),
        ("2026-01-31T12:00:00Z", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("", None),
    ],
)
def test_a_moment_is_an_age_or_a_time(text: str, expected: datetime | None) -> None:
    assert parse_moment("since", text, NOW) == expected


@pytest.mark.parametrize("text", ["yesterday", "2 h", "2026-01-31", "99999999999d"])
def test_a_moment_that_is_none_says_what_is_one(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--until must be .*90s, 15m, 2h or 7d"):
        parse_moment("until", text, NOW)
