"""How long to leave an EMQX alone that does not do what it is asked, and how often to say so. No IO, no clock."""

from __future__ import annotations

from typing import Final

DELAY_S_MIN: Final = 0.1
DELAY_S_MAX: Final = 5.0  # a command is valid for a minute: it is tried often enough
SAY_INTERVAL_S: Final = 30.0  # the same sentence again


class Backoff:
    """One per thing that is asked again and again."""

    def __init__(self) -> None:
        """There is none."""
        self._failures = 0
        self._not_before_s = 0.0
        self._said, self._said_at_s = "", 0.0

    def __bool__(self) -> bool:
        """Whether the last attempt failed: then one at a time is enough."""
        return self._failures > 0

    def failed(self, sentence: str, now_s: float, chance: float) -> bool:
        """An attempt failed; `chance` in [0, 1) spreads the next ones. Whether to say so."""
        delay_s = min(DELAY_S_MAX, DELAY_S_MIN * 2 ** min(self._failures, 10))
        self._not_before_s = now_s + delay_s * (0.5 + chance / 2)
        self._failures += 1
        news = sentence != self._said or now_s >= self._said_at_s + SAY_INTERVAL_S
        if news:
            self._said, self._said_at_s = sentence, now_s
        return news

    def over(self) -> bool:
        """An attempt succeeded; whether that is news."""
        news = self._failures > 0
        self._failures, self._not_before_s, self._said = 0, 0.0, ""
        return news

    def wait_s(self, now_s: float) -> float:
        """How long to wait before the next attempt."""
        return max(0.0, self._not_before_s - now_s)
