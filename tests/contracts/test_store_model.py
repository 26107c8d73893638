"""Random batches give the same content and refusals in every store. The memory store is the model."""

from __future__ import annotations

from random import Random

import pytest

from millpond.agents.effects import (
    ClearBodyExpiry,
    ClearRetained,
    DeadLetter,
    DeleteBody,
    Effect,
    ForgetPresence,
    KeepReceipt,
    Retain,
    RunCommand,
    SetDue,
    SetIndex,
    SetPresence,
    SetRules,
    SetState,
    Unindex,
    WriteSeen,
)
from millpond.schemas import keys
from tests.contracts.store_worlds import FAR_MS, MemoryWorld, World, commit, kept, transaction

IDS = ("m0", "m1", "m 2", "mé3")
TOPICS = ("t0", "t/1", "m0")  # "m0" is also a message id: its index and its body have one key
NODES = (None, "n1", "n2")
FOREIGN = (
    *(keys.message_body("m1"), keys.retained("t0"), keys.receipt("m0"), "counter:1"),
    *(keys.presence("m0"), keys.node("n1")),
)


def some_effect(random: Random, offset: int) -> Effect:
    """Return a random effect. There are few ids and topics, so that effects meet."""
    message_id, topic = random.choice(IDS), random.choice(TOPICS)
    # Not "m0": a removal from its index could hit its body.
    other_topic = random.choice(TOPICS[:2])
    expires_at = random.choice((None, FAR_MS + offset))
    state = random.choice((None, b"state %d" % offset))
    return random.choice(
        (
            kept(offset, message_id, topic, expires_at=expires_at, retain=random.random() < 0.5),
            Retain(offset, topic, message_id, offset),
            KeepReceipt(offset, message_id, "acked", random.choice(IDS), offset, FAR_MS + offset),
            SetState(topic, state),
            SetIndex(
                random.choice(("seen:n 1", "announced")), topic, random.choice((None, offset))
            ),
            SetPresence(
                offset,
                message_id,
                random.random() < 0.5,
                offset,
                random.choice((None, 7_000)),
                random.choice(NODES),
                random.choice(NODES),
            ),
            ForgetPresence(offset, message_id),
            SetRules(f"rules {offset}"),
            WriteSeen(offset, random.random() < 0.3, (message_id, topic)),
            SetDue(topic, random.choice((None, 10 + offset % 7))),
            Unindex(offset, other_topic, (message_id, random.choice(IDS))),
            ClearRetained(offset, other_topic),
            DeleteBody(random.choice(IDS[1:])),
            ClearBodyExpiry(message_id),
            RunCommand(offset, (b"INCR", b"counter:%d" % random.randrange(2))),
            RunCommand(offset, (b"HSET", b"hash", topic.encode(), b"%d" % offset)),
        )
    )


@pytest.mark.parametrize("seed", range(12))
async def test_every_store_has_the_content_of_the_model(world: World, seed: int) -> None:
    random, model = Random(seed), MemoryWorld()
    for key in random.sample(FOREIGN, random.randrange(len(FOREIGN))):
        for each in (model, world):
            each.put(key, b"foreign")
    stores = [each.store() for each in (model, world)]
    for store in stores:
        await store.load()
    for sequence in range(1, 9):
        offset = sequence * 100
        effects = [some_effect(random, offset + number) for number in range(random.randrange(25))]
        outputs = [DeadLetter(offset, "reason")] if random.random() < 0.5 else []
        batch = transaction(sequence, *effects, outputs=outputs, produced=[sequence - 3])
        expected, refused = [await commit(store, batch) for store in stores]
        assert [(each.offset, each.part) for each in refused] == [
            (each.offset, each.part) for each in expected
        ]
        assert world.dump() == model.dump()
    expected_state, state = [await store.load() for store in stores]
    assert state == expected_state
    for store in stores:
        await store.close()
