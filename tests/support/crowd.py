"""Many consumers that come and go, many publishers, faults in between, and what has to be true of it all in the end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from random import Random

from tests.support.world import Consumer, Got, Publisher, World

CROWD_WAIT_S = 240.0
Fault = Callable[[], Coroutine[object, object, object]]


class Load:
    """Messages on several topics, each of one publisher's: message `n` of the topic `t` has the payload `t:n`."""

    def __init__(
        self, world: World, topics: Sequence[str], number: int, *, publishers: int, rate_max: float = 1e6,
    ) -> None:  # fmt: skip
        """`number` messages in all, at most so many a second."""
        self.topics, self.number = topics, number
        self.publishers = [
            Publisher(world, f"{topics[0]}-{at}", rate_max=rate_max / publishers)
            for at in range(publishers)
        ]

    async def publish(self) -> None:
        """All of it, the topics in turn."""
        await asyncio.gather(
            *(publisher.publish(self._share(at)) for at, publisher in enumerate(self.publishers))
        )

    def _share(self, at: int) -> list[tuple[str, str]]:
        topics = self.topics[at :: len(self.publishers)]
        rounds = range(self.number // len(self.topics))
        return [(topic, f"{topic}:{number}") for number in rounds for topic in topics]

    def acknowledged(self) -> set[str]:
        """What the publishers may rely on."""
        return {payload for each in self.publishers for payload in each.acknowledged}

    def sent_again(self) -> int:
        """How many publishes were repeats of an earlier one that may have arrived."""
        return sum(sum(each.sent.values()) - len(each.sent) for each in self.publishers)


class Crowd:
    """Consumers that leave after some messages, politely or not, and come back."""

    def __init__(
        self, consumers: Sequence[Consumer], random: Random, absences: Sequence[int] = ()
    ) -> None:
        """Who leaves comes back when the others have got as many copies as its absence says."""
        self.consumers, self._random = consumers, random
        self._absences = absences or [0] * len(consumers)
        self.left = self.vanished = self.lost = 0

    def each(self) -> list[Crowd]:
        """Every consumer for itself."""
        return [Crowd([consumer], self._random) for consumer in self.consumers]

    def got(self) -> int:
        return sum(len(each.got) for each in self.consumers)

    async def until_got(self, number: int) -> None:
        deadline = time.monotonic() + CROWD_WAIT_S
        while self.got() < number:
            assert time.monotonic() < deadline, f"{self.got()} copies of {number}"
            await asyncio.sleep(0.02)

    async def come_and_go(self, consumer: Consumer, visit: int, absence: int) -> None:
        """Until it is cancelled. A visit ends after so many copies, or some more."""
        while True:
            if not consumer.online:
                await consumer.come()
            enough = len(consumer.got) + visit + self._random.randrange(visit)
            while consumer.online and len(consumer.got) < enough:
                await asyncio.sleep(0.02)
            if not consumer.online:
                self.lost += 1
                continue
            if self._random.random() < 0.5:
                self.vanished += 1
                await consumer.vanish()
            else:
                self.left += 1
                await consumer.leave()
            back = self.got() + absence
            while self.got() < back and any(each.online for each in self.consumers):
                await asyncio.sleep(0.02)

    async def live(self, visit: int, work: Awaitable[object]) -> None:
        """Come and go until the work is done; then all stay."""
        visits = [
            asyncio.create_task(self.come_and_go(consumer, visit, absence))
            for consumer, absence in zip(self.consumers, self._absences, strict=True)
        ]
        try:
            await work
        finally:
            for task in visits:
                task.cancel()
            ended = await asyncio.gather(*visits, return_exceptions=True)
        for end in ended:
            if isinstance(end, Exception):
                raise end
        for consumer in self.consumers:
            if not consumer.online:
                await consumer.come()

    async def hurt(self, *faults: tuple[int, Fault]) -> None:
        """Each fault when so many copies have come."""
        for number, fault in faults:
            await self.until_got(number)
            at, started = self.got(), time.monotonic()
            await fault()
            print(f"after {at} copies: {fault.__name__}; {time.monotonic() - started:.1f} s later")

    # -- what came of it

    def copies(self) -> list[Got]:
        """All, in the order they came."""
        return sorted(got for each in self.consumers for got in each.got)

    def acked(self) -> set[str]:
        return {payload for each in self.consumers for payload in each.acked}

    def duplicates(self) -> int:
        """Copies of what had come before, to anybody."""
        return sum(times - 1 for times in Counter(got.payload for got in self.copies()).values())

    def explained(self, window: int) -> int:
        """How many duplicates there may be of what consumers had in hand when they went."""
        return window * (self.left + self.vanished + self.lost)

    def backwards(self) -> list[tuple[str, Got]]:
        """First deliveries that came behind a later message of their topic: neither marked as repeated nor seen before."""
        owner = {got.at: each.client_id for each in self.consumers for got in each.got}
        newest: dict[tuple[str, str], int] = defaultdict(lambda: -1)
        seen: set[str] = set()
        found = []
        for got in self.copies():
            if not got.repeated and got.payload not in seen:
                client_id, number = owner[got.at], int(got.payload.rpartition(":")[2])
                if number < newest[client_id, got.topic]:
                    found.append((client_id, got))
                newest[client_id, got.topic] = max(number, newest[client_id, got.topic])
            seen.add(got.payload)
        return found
