"""The table of the pubsub machine: one row for each rule. Driver, store and log are real, in memory."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from millpond.agents.delivery import membership
from millpond.schemas import keys
from millpond.schemas.events import OperatorRewind
from tests.support import given
from tests.support.delivery import AT, Delivering

ACK_TIMEOUT_MS = 30_000
TOPIC = "pubsub/a"
Reason: TypeAlias = Literal["unsubscribed", "session_ended", "disconnected"]


class Pubsub(Delivering):
    """A world whose `pubsub/#` is pubsub."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("pubsub", given.pubsub(**settings))

    def publish(self, *names: str, topic: str = TOPIC, **fields: Any) -> None:
        super().publish(*names, topic=topic, **fields)

    def join(self, client: str, topic_filter: str = TOPIC, **fields: Any) -> None:
        super().join(client, topic_filter, **fields)

    def leave(
        self,
        client: str,
        topic_filter: str = TOPIC,
        reason: Reason = "session_ended",
        **fields: Any,
    ) -> None:
        super().leave(client, topic_filter, reason, **fields)

    def ack(self, client: str, *names: str, topic: str = TOPIC, **marks: bool) -> None:
        super().ack(client, *names, topic=topic, **marks)

    def shown(self, client: str, topic: str = TOPIC) -> str | None:
        """The read offset, as any Redis client sees it."""
        return self.text(keys.read_offset(client, topic))

    def rewind(self, client: str, after: int, topic: str = TOPIC) -> None:
        self.tell(OperatorRewind(**AT, topic=topic, subscriber=client, after=after))


def test_every_subscriber_gets_every_message_in_order_and_it_is_stored_once() -> None:
    world = Pubsub()
    world.publish("m1", "m2")
    world.join("a")
    world.join("b")
    world.publish("m3")
    assert world.hand_over() == [
        *(("a", "m1"), ("a", "m2"), ("b", "m1"), ("b", "m2"), ("a", "m3"), ("b", "m3"))
    ]
    assert world.stored(TOPIC) == ["m1", "m2", "m3"]


def test_the_offset_moves_over_the_unbroken_run_of_acks() -> None:
    world = Pubsub()
    world.publish("m1", "m2", "m3")
    world.join("a")
    world.hand_over()
    assert world.shown("a") is None
    world.ack("a", "m2")
    assert world.shown("a") is None
    world.ack("a", "m1")
    assert world.shown("a") == "m2"
    world.ack("a", "m3")
    assert world.shown("a") == "m3"
    assert world.stored(TOPIC) == ["m1", "m2", "m3"]


def test_who_was_away_reads_on_behind_its_offset() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    world.leave("a", TOPIC)
    world.publish("m2", "m3")
    world.restart()
    world.join("a", session=2)
    assert world.hand_over() == [("a", "m2"), ("a", "m3")]


def test_unsubscribing_forgets_the_offset() -> None:
    world = Pubsub()
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    assert world.shown("a") == "m1"
    world.leave("a", TOPIC, "unsubscribed")
    assert world.shown("a") is None
    world.join("a")
    assert world.hand_over() == [("a", "m1")]


def test_a_new_subscriber_starts_where_the_rule_says() -> None:
    world = Pubsub(start="latest")
    world.publish("m1")
    world.now_ms += 10
    world.publish("m2")
    world.join("a", subscribed_at=world.now_ms)
    assert world.hand_over() == [("a", "m2")]
    world.publish("m3")
    assert world.hand_over() == [("a", "m3")]


def test_a_wildcard_subscriber_reads_every_topic_also_those_born_later() -> None:
    world = Pubsub(max_inflight=2)
    for number in range(5):
        world.publish(f"m{number}", topic=f"pubsub/{number}")
    world.join("w", "pubsub/+")
    got = []
    while new := world.hand_over():
        got += [name for _, name in new]
        for _, name in new:
            world.ack("w", name, topic=f"pubsub/{name[1:]}")
    assert sorted(got) == [f"m{number}" for number in range(5)]
    world.publish("n1", topic="pubsub/new")
    assert world.hand_over() == [("w", "n1")]


def test_a_group_is_one_subscriber_whose_members_compete() -> None:
    world = Pubsub()
    for client in "ab":
        world.join(client, f"$share/g/{TOPIC}")
    world.publish("m1", "m2", "m3")
    assert world.hand_over() == [("a", "m1"), ("b", "m2"), ("a", "m3")]
    world.ack("a", "m1")
    world.ack("b", "m2")
    assert world.shown(f"$share/g/{TOPIC}") == "m2"


def test_a_member_of_a_group_whose_session_ends_while_it_is_away_is_no_subscriber_of_its_own() -> (
    None
):
    world = Pubsub()
    world.join("a", f"$share/g/{TOPIC}")
    world.publish("m1")
    assert world.hand_over() == [("a", "m1")]
    for reason in ("disconnected", "session_ended"):
        world.leave("a", f"$share/g/{TOPIC}", reason=reason)
    world.join("b", f"$share/g/{TOPIC}")
    assert world.hand_over() == [("b", "m1")]


def test_deliveries_come_again_to_a_new_session_and_are_dead_for_that_subscriber_in_the_end() -> (
    None
):
    world = Pubsub(max_deliveries=2)
    world.join("a")
    world.join("b")
    world.publish("m1", "m2")
    world.hand_over()
    world.ack("b", "m1", "m2")
    world.ack("a", "m2")
    world.at(world.now_ms + ACK_TIMEOUT_MS)
    assert world.take() == []
    world.join("a", session=2)
    assert world.hand_over() == [("a", "m1")]
    world.join("a", session=3)
    assert world.take() == []
    assert world.shown("a") == "m2"
    assert list(world.table("dead")) == ["m1"]
    world.requeue("m1", topic=TOPIC)
    assert world.hand_over() == [("a", "m1")]


def test_what_is_too_old_or_too_much_is_trimmed_and_the_loss_counted() -> None:
    world = Pubsub(max_length=2)
    world.join("a")
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    world.leave("a", TOPIC)
    world.publish("m2", "m3", "m4", "m5")
    assert world.stored(TOPIC) == ["m4", "m5"]
    world.join("a", session=2)
    assert world.hand_over() == [("a", "m4"), ("a", "m5")]


def test_rewinding_one_subscriber_touches_nobody_else() -> None:
    world = Pubsub()
    world.join("a")
    world.join("b")
    world.publish("m1", "m2")
    world.hand_over()
    for client in "ab":
        world.ack(client, "m1", "m2")
    world.rewind("a", 0)
    assert world.hand_over() == [("a", "m1"), ("a", "m2")]
    assert world.shown("a") is None
    assert world.shown("b") == "m2"


def test_a_gone_subscribers_offset_is_dropped_after_its_retention() -> None:
    world = Pubsub(offset_retention_s=3_600)
    world.join("a", "pubsub/+")
    world.publish("m1")
    world.hand_over()
    world.ack("a", "m1")
    world.leave("a", "pubsub/+")
    world.at(world.now_ms + 3_600_000)
    world.at(world.now_ms + membership.FORGET_MS)
    assert world.shown("a") is None
    assert world.table("windows") == world.table("subscribers") == world.table("members") == {}
