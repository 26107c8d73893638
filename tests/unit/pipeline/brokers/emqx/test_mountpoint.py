"""Mountpoints: added and removed, for topics and filters; and the client ids that they cannot serve."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.pipeline.brokers.emqx.mountpoint import Mountpoint, reported_filter

MOUNTPOINT = Mountpoint("mp/${clientid}/")

MOUNTED = [
    ("c2", "queue/t", "mp/c2/queue/t"),
    ("c2", "/t", "mp/c2//t"),
    ("c2", "t/", "mp/c2/t/"),
    ("c2", "mp/c2/t", "mp/c2/mp/c2/t"),
    ("c2", "$SYS/x", "mp/c2/$SYS/x"),
    ("ä b", "t", "mp/ä b/t"),
    ("a/b", "t", "mp/a/b/t"),
    ("a", "b/t", "mp/a/b/t"),
    ("${clientid}", "t", "mp/${clientid}/t"),
]
FILTERS = [
    ("c2", "queue/#", "mp/c2/queue/#"),
    ("c2", "#", "mp/c2/#"),
    ("c2", "+/t", "mp/c2/+/t"),
    ("c2", "$share/g/queue/+", "$share/g/mp/c2/queue/+"),
    ("c2", "$share/mp/c2/t", "$share/mp/mp/c2/c2/t"),
    ("c2", "$share/$queue/t", "$share/$queue/mp/c2/t"),
]


@pytest.mark.parametrize(("client_id", "topic", "mounted"), MOUNTED)
def test_a_topic_is_mounted_and_unmounted(client_id: str, topic: str, mounted: str) -> None:
    assert MOUNTPOINT.mount(client_id, topic) == mounted
    assert MOUNTPOINT.unmount(client_id, mounted) == topic
    assert MOUNTPOINT.holds(mounted)


@pytest.mark.parametrize(("client_id", "topic_filter", "mounted"), FILTERS)
def test_a_filter_keeps_its_group_in_front(client_id: str, topic_filter: str, mounted: str) -> None:
    assert MOUNTPOINT.unmount_filter(client_id, mounted) == topic_filter


@pytest.mark.parametrize(
    "topic", ["queue/t", "mp/c3/t", "mp/c22/t", "mp/c2", "mp/c2/", "mp", "xmp/c2/t", "MP/c2/t", ""]
)
def test_topics_of_other_clients_are_not_unmounted(topic: str) -> None:
    assert MOUNTPOINT.unmount("c2", topic) is None
    assert MOUNTPOINT.unmount_filter("c2", topic) is None
    assert MOUNTPOINT.unmount_filter("c2", f"$share/g/{topic}") is None


@pytest.mark.parametrize(
    ("topic", "held"), [("mp/c/t", True), ("mp/", True), ("mp", False), ("queue/mp/t", False)]
)
def test_a_mountpoint_holds_all_topics_below_it(topic: str, held: bool) -> None:
    assert MOUNTPOINT.holds(topic) is held


@pytest.mark.parametrize("client_id", ["a/b", "a+", "#", "+", "/", ""])
def test_a_client_with_an_ambiguous_id_is_not_served(client_id: str) -> None:
    assert not MOUNTPOINT.can_serve(client_id)


@pytest.mark.parametrize("client_id", ["c2", "ä", "a b", "${clientid}", "mp", "$share", "%2F"])
def test_all_other_clients_are_served(client_id: str) -> None:
    assert MOUNTPOINT.can_serve(client_id)


def test_a_prefix_may_have_many_levels() -> None:
    deep = Mountpoint("a/b/${clientid}/")
    assert deep.mount("c", "t") == "a/b/c/t"
    assert deep.of_any("queue/#") == "a/b/+/queue/#"


@given(client_id=st.text(min_size=1), topic=st.text(min_size=1))
def test_unmounting_undoes_mounting(client_id: str, topic: str) -> None:
    assert MOUNTPOINT.unmount(client_id, MOUNTPOINT.mount(client_id, topic)) == topic


@given(one=st.text(min_size=1), other=st.text(min_size=1), topic=st.text(min_size=1))
def test_the_topics_of_two_served_clients_never_meet(one: str, other: str, topic: str) -> None:
    if one != other and MOUNTPOINT.can_serve(one) and MOUNTPOINT.can_serve(other):
        assert MOUNTPOINT.unmount(other, MOUNTPOINT.mount(one, topic)) is None


@pytest.mark.parametrize(
    ("written", "share", "standard"),
    [
        ("queue/#", "", "queue/#"),
        ("$share/g/queue/#", "", "$share/g/queue/#"),
        ("$queue/t", "", "$share/$queue/t"),
        ("queue/#", "g", "$share/g/queue/#"),
        ("$share/g/queue/#", "g", "$share/g/queue/#"),
        ("$queue/t", "$queue", "$share/$queue/t"),
        ("t", "$queue", "$share/$queue/t"),
    ],
)
def test_shared_subscriptions_get_the_standard_spelling(
    written: str, share: str, standard: str
) -> None:
    assert reported_filter(written, share) == standard
