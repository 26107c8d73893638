"""The hooks to register: those that the rules need, under the names that the version of EMQX knows."""

from __future__ import annotations

import pytest

from millpond.pipeline.brokers.emqx.exhook.hooks import Version, needed_hooks
from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint
from millpond.schemas.rules import Rules, default_rules
from tests.support import given

MOUNTPOINT = Mountpoint("mp/${clientid}/")
OF_CLIENTS = {
    "client.connected", "client.disconnected", "session.created", "session.subscribed",
    "session.unsubscribed", "session.resumed", "session.discarded", "session.terminated",
}  # fmt: skip
LOOKUP = given.a_rule(hook="session.subscribed", topic="ret/#", action="on_retain_lookup")

# Rules; then, without a mountpoint and with one, the filters of message.publish, .delivered and .acked.
ROWS: list[tuple[str, list[str], tuple[str, str, str], tuple[str, str, str]]] = [
    ("none", [], ("$millpond/#", "", ""), ("mp/# $millpond/#", "", "")),
    (
        "store",
        [given.store("a/#"), given.retain("a/b"), given.store("c/+")],
        ("a/# c/+ $millpond/#", "", ""),
        ("a/# c/+ mp/# $millpond/#", "", ""),
    ),
    ("all", [given.store()], ("# $millpond/#", "", ""), ("# $millpond/#", "", "")),
    (
        "delivery",
        [given.queue("queue/#"), given.pubsub("pubsub/+")],
        ("queue/# pubsub/+ $millpond/#", "", "queue/# pubsub/+"),
        (
            "queue/# pubsub/+ mp/# $millpond/#",
            "",
            "queue/# pubsub/+ mp/+/queue/# mp/+/pubsub/+",
        ),
    ),
    (
        "receipts",
        [given.receipt("message.delivered", "r/#"), given.receipt("message.acked", "r/1")],
        ("$millpond/#", "r/#", "r/1"),
        ("mp/# $millpond/#", "r/# mp/+/r/#", "r/1 mp/+/r/1"),
    ),
    (
        "commands",
        [given.command("SET a:${clientid} b", "message.acked", "#")],
        ("$millpond/#", "", "#"),
        ("mp/# $millpond/#", "", "#"),
    ),
    # EMQX sends its retained messages. With a mountpoint Millpond does, and counts the unacknowledged copies.
    ("lookup", [LOOKUP], ("$millpond/#", "", ""), ("mp/# $millpond/#", "", "mp/+/ret/#")),
    (
        "no topic",
        [given.a_rule(hook="client.connected", action="on_client_connected")],
        ("$millpond/#", "", ""),
        ("mp/# $millpond/#", "", ""),
    ),
]


def filters(
    tables: list[str], mountpoint: Mountpoint | None, version: Version = "v3"
) -> tuple[str, str, str]:
    rules = given.rules(*tables) if tables else Rules()
    hooks = dict(needed_hooks(rules, mountpoint, version))
    for name in OF_CLIENTS | {"session.takenover"}:
        assert hooks.pop(name) == ()
    names = ("message.publish", "message.delivered", "message.acked")
    found = [" ".join(hooks.pop(name, ())) for name in names]
    assert hooks == {}
    return found[0], found[1], found[2]


@pytest.mark.parametrize(("tables", "plain"), [(row[1], row[2]) for row in ROWS], ids=[r[0] for r in ROWS])  # fmt: skip
def test_without_a_mountpoint(tables: list[str], plain: tuple[str, str, str]) -> None:
    assert filters(tables, None) == plain


@pytest.mark.parametrize(("tables", "mounted"), [(row[1], row[3]) for row in ROWS], ids=[r[0] for r in ROWS])  # fmt: skip
def test_with_a_mountpoint(tables: list[str], mounted: tuple[str, str, str]) -> None:
    assert filters(tables, MOUNTPOINT) == mounted


def test_message_hooks_always_have_filters() -> None:
    """Without filters EMQX calls a hook for every topic."""
    for mountpoint in (None, MOUNTPOINT):
        for rules in (Rules(), default_rules()):
            for hook in needed_hooks(rules, mountpoint, "v3"):
                assert bool(hook.topics) == hook.name.startswith("message.")


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_hook_names_are_those_of_the_version(version: Version) -> None:
    """EMQX 4 spells one name differently. It loads no hooks at all if it does not know one."""
    names = {hook.name for hook in needed_hooks(default_rules(), None, version)}
    taken_over = "session.takeovered" if version == "v1" else "session.takenover"
    assert names == {*OF_CLIENTS, taken_over, "message.publish", "message.acked"}
