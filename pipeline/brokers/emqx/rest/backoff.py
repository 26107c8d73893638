"""When to retry an EMQX that fails, and when to log that it fails. No IO, no clock."""

from __future__ import annotations

from typing import Final

DELAY_S_MIN: Final = 0.1
DELAY_S_MAX: Final = 5.0  # a command is valid for a minute, so it gets enough attempts
LOG_INTERVAL_S: Final = 30.0  # before the same sentence is logged again


class Backoff:
    """Exponential back-off with jitter. One for each kind of request."""

    def __init__(self) -> None:
        self._failures = 0  # since the last success
        self._not_before_s = 0.0
        self._logged, self._logged_at_s = "", 0.0

    def __bool__(self) -> bool:
        """True if the last attempt failed. Then one request at a time is enough."""
        return self._failures > 0

    def failed(self, sentence: str, now_s: float, chance: float) -> bool:
        """Note a failure. True if the caller should log it. `chance` in [0, 1) spreads the next attempts."""
        delay_s = min(DELAY_S_MAX, DELAY_S_MIN * 2 ** min(self._failures, 10))
        self._not_before_s = now_s + delay_s * (0.5 + chance / 2)
        self._failures += 1
        news = sentence != self._logged or now_s >= self._logged_at_s + LOG_INTERVAL_S
        if news:
            self._logged, self._logged_at_s = sentence, now_s
        return news

    def succeeded(self) -> bool:
        """Note a success. True if the attempt before it failed, so that the caller should log the recovery."""
        news = self._failures > 0
        self._failures, self._not_before_s, self._logged = 0, 0.0, ""
        return news

    def wait_s(self, now_s: float) -> float:
        """How long to wait before the next attempt, in seconds."""
        return max(0.0, self._not_before_s - now_s)
