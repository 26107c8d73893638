"""Rule sets: which rules apply, which agent runs them, and the canonical form."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.pretty import pretty_repr

from millpond.schemas.errors import ConfigError, DecodeError
from millpond.schemas.events import AgentName
from millpond.schemas.rules import Hook, Pool, Rule, Rules, default_rules, parse_toml
from tests.support.given import a_rule, command, receipt, rules, store


def fetch(agent: str, topic: str, **settings: object) -> str:
    return a_rule(
        hook="session.subscribed", topic=topic, action=f"on_message_fetch_for_{agent}", **settings
    )


@pytest.mark.parametrize(
    ("topic", "owner"),
    [
        ("queue/a", "queue"),
        ("queue", "queue"),
        ("pubsub/a/b", "pubsub"),
        ("latest/a", "queue"),
        ("queues/a", "messages"),
        ("$SYS/queue/a", "messages"),
        ("$millpond/queue", "messages"),
        ("queue/+", "queue"),
        ("#", "messages"),
    ],
)
def test_the_delivery_rule_that_matches_decides_the_owner_of_a_topic(
    topic: str, owner: AgentName
) -> None:
    given = rules(
        fetch("queue", "queue/#"), fetch("pubsub", "pubsub/#"), fetch("keep_latest", "latest/+")
    )
    assert given.owner(topic) == owner
    assert Rules().owner(topic) == "messages"


@pytest.mark.parametrize(
    ("hook", "topic", "expected"),
    [
        ("message.publish", "a/b", ["INCR all", "INCR a"]),
        ("message.publish", "b", ["INCR all"]),
        ("message.publish", "$SYS/x", []),
        ("session.subscribed", "a/b", ["INCR sub"]),
        ("session.subscribed", "#", ["INCR sub"]),
        ("session.subscribed", "+/c", ["INCR sub"]),
        ("session.subscribed", "$share/g/a/b", ["INCR sub"]),
        ("session.subscribed", "b/#", []),
        ("client.connected", None, ["INCR on"]),
        ("client.disconnected", None, []),
        ("message.acked", "a", []),
    ],
)
def test_the_rules_that_apply_are_in_the_users_order(
    hook: Hook, topic: str | None, expected: list[str]
) -> None:
    given = rules(
        a_rule(hook="message.publish", commands=["INCR all"]),
        command("INCR sub", hook="session.subscribed", topic="a/+"),
        a_rule(hook="client.connected", commands=["INCR on"]),
        command("INCR a", topic="a/#"),
    )
    assert [rule.summary for rule in given.matching(hook, topic)] == expected


def test_a_hook_is_needed_by_its_rules_and_by_delivery_rules() -> None:
    receipts = rules(receipt("message.delivered"))
    assert receipts.wants("message.delivered")
    assert not receipts.wants("message.acked")
    queue = rules(fetch("queue", "queue/#"))
    assert queue.wants("message.acked")
    assert queue.wants("client.disconnected")
    assert not queue.wants("message.delivered")
    assert not Rules().wants("message.publish")


def test_an_agent_uses_the_pool_of_its_rules() -> None:
    given = parse_toml(
        '[pool.one]\nserver = "h:1"\n[pool.two]\nserver = "h:2"\n[pool.three]\nserver = "h:3"\n'
        + fetch("queue", "queue/#", pool="two")
        + store("queue/a", pool="two")
        + receipt("message.acked", "other/#", pool="three"),
        "f",
    )
    pools = {agent: given.pool(agent).name for agent in ("messages", "queue", "sessions", "pubsub")}
    assert pools == {"messages": "three", "queue": "two", "sessions": "one", "pubsub": "one"}
    assert len(given.of_agent("queue")) == 2
    assert len(given.of_agent("messages")) == 1


def test_an_agent_without_a_pool_is_an_error() -> None:
    with pytest.raises(ConfigError, match="agent queue has no pool"):
        Rules().pool("queue")
    with pytest.raises(ConfigError, match="agent queue has no pool"):
        Rules.from_canonical(default_rules().canonical()).pool("queue")


def test_the_default_rules_are_those_of_the_documented_file() -> None:
    given = default_rules()
    assert len(given.rules) == 12
    assert (given.owner("queue/a"), given.owner("pubsub/a")) == ("queue", "pubsub")
    assert given.pool("sessions").servers == (("127.0.0.1", 6379),)


SECRET = Pool(name="p", servers=(("h", 1),), password="hunter2", username="u")


def test_a_password_is_never_shown() -> None:
    for shown in (repr(SECRET), str(SECRET), f"{SECRET}", pretty_repr(SECRET)):
        assert "hunter2" not in shown
        assert "password='********'" in shown
    assert "password=None" in repr(Pool(name="p", servers=()))
    assert "hunter2" not in Rules(default_rules().rules, (SECRET,)).canonical()


def test_the_canonical_form_has_every_setting_and_no_place() -> None:
    (entry,) = json.loads(rules("\n\n" + store("a/#", expired_time=60)).canonical())
    assert entry == {
        "hook": "message.publish", "topic": "a/#", "action": "on_message_publish", "commands": [],
        "pool": "pool1", "expired_time": 60, "max_inflight": 32, "ack_timeout_s": 30,
        "max_deliveries": 5, "max_length": None, "overflow": "drop_oldest", "start": "earliest",
        "store_qos0": False, "offset_retention_s": 2_592_000, "wildcards": "serve",
    }  # fmt: skip


def test_the_canonical_form_depends_on_the_order_of_rules_and_not_on_their_lines() -> None:
    one, other = store("a/#"), store("b/#")
    assert rules(one, other).canonical() == rules("\n# comment\n", one, other).canonical()
    assert rules(one, other).canonical() != rules(other, one).canonical()


def test_the_canonical_form_decodes_to_the_same_rules() -> None:
    text = default_rules().canonical()
    back = Rules.from_canonical(text)
    assert back.rules == default_rules().rules
    assert back.pools == ()
    assert back.canonical() == text


GOOD = default_rules().canonical()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[{"hook":"message.publish"}]',
        GOOD[:-1],
        "[" * 100_000,
        "\ud800",
        GOOD.replace("on_client_connected", "on_client_teleported"),
        GOOD.replace("client.disconnected", "client.connected"),
        GOOD.replace("queue/#", "queue/#/x"),
        GOOD.replace('["DEL",', '["FLUSHALL",'),
        GOOD.replace('[["DEL","mqtt:acked:${clientid}:${topic}"]]', "[[]]"),
        GOOD.replace("3600", "0"),
        GOOD.replace('"max_inflight":32', '"max_inflight":65536'),
    ],
)
def test_invalid_rules_in_the_log_raise_decode_error(text: str) -> None:
    with pytest.raises(DecodeError, match="rule"):
        Rules.from_canonical(text)


@given(st.integers(0, len(GOOD)), st.integers(0, 3), st.text(max_size=3))
def test_damaged_rules_decode_or_raise_decode_error(
    place: int, length: int, replacement: str
) -> None:
    with suppress(DecodeError):
        Rules.from_canonical(GOOD[:place] + replacement + GOOD[place + length :])


def test_a_rule_as_text_names_its_action_and_filter() -> None:
    assert str(Rule(hook="message.publish", commands=(("INCR", "x"),), pool="p")) == "INCR x"
    assert str(rules(store("a/#")).rules[0]) == "on_message_publish for 'a/#'"
