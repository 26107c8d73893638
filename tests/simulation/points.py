"""The points at which a simulated worker can be interrupted: each await of the store or Kafka ends a step."""

from __future__ import annotations

from collections.abc import Awaitable, Generator


class Pause(Awaitable[None]):
    """Ends the worker's step."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class Reply(Awaitable[object]):
    """A reply that a worker awaits until the world has decided it."""

    def __init__(self) -> None:
        self.decided = False
        self._result: object = None
        self._error: Exception | None = None

    def answer(self, result: object) -> None:
        self.decided, self._result = True, result

    def fail(self, error: Exception) -> None:
        self.decided, self._error = True, error

    def __await__(self) -> Generator[None, None, object]:
        yield
        while not self.decided:
            yield
        if self._error is not None:
            raise self._error
        return self._result
