"""Rules from an `emqx_backend_redis.conf`: the documented file, variants of it, and invalid lines."""

from __future__ import annotations

import json

import pytest

from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import Pool, Rules, default_rules, parse_conf

# The documented file, verbatim.
DOCUMENTED = """\
backend.redis.pool1.type = single            # single | sentinel | cluster
backend.redis.pool1.server = 127.0.0.1:6379  # sentinel: 127.0.0.1:26379
## backend.redis.pool1.sentinel = mymaster
backend.redis.pool1.pool_size = 8
backend.redis.pool1.database = 0
## backend.redis.pool1.password =
backend.redis.pool1.channel = mqtt_channel
## backend.redis.msg.expired_after = 3600    # older, global form of expired_time
backend.redis.hook.client.connected.1    = {"action": {"function": "on_client_connected"}, "pool": "pool1"}
backend.redis.hook.client.connected.2    = {"action": {"function": "on_subscribe_lookup"}, "pool": "pool1"}      # newer: session.created.1
backend.redis.hook.client.disconnected.1 = {"action": {"function": "on_client_disconnected"}, "pool": "pool1"}
backend.redis.hook.session.subscribed.1  = {"topic": "queue/#", "action": {"function": "on_message_fetch_for_queue"}, "pool": "pool1"}
backend.redis.hook.session.subscribed.2  = {"topic": "pubsub/#", "action": {"function": "on_message_fetch_for_pubsub"}, "pool": "pool1"}
backend.redis.hook.session.subscribed.3  = {"action": {"function": "on_retain_lookup"}, "pool": "pool1"}
backend.redis.hook.session.unsubscribed.1= {"topic": "#", "action": {"commands": ["DEL mqtt:acked:${clientid}:${topic}"]}, "pool": "pool1"}
backend.redis.hook.message.publish.1     = {"topic": "#", "action": {"function": "on_message_publish"}, "expired_time" : 3600, "pool": "pool1"}
backend.redis.hook.message.publish.2     = {"topic": "#", "action": {"function": "on_message_retain"}, "expired_time" : 3600, "pool": "pool1"}
backend.redis.hook.message.publish.3     = {"topic": "#", "action": {"function": "on_retain_delete"}, "pool": "pool1"}
backend.redis.hook.message.acked.1       = {"topic": "queue/#", "action": {"function": "on_message_acked_for_queue"}, "pool": "pool1"}
backend.redis.hook.message.acked.2       = {"topic": "pubsub/#", "action": {"function": "on_message_acked_for_pubsub"}, "pool": "pool1"}
## also: on_message_fetch_for_keep_latest (session.subscribed), on_message_store_keep_latest (message.publish), on_message_acked_for_keep_latest (message.acked)
"""

KEEP_LATEST = """\
backend.redis.hook.session.subscribed.1 = {"topic": "#", "action": {"function": "on_message_fetch_for_keep_latest"}, "pool": "pool1"}
backend.redis.hook.message.publish.1 = {"topic": "#", "action": {"function": "on_message_store_keep_latest"}, "expired_time" : 3600, "pool": "pool1"}
backend.redis.hook.message.acked.1 = {"topic": "#", "action": {"function": "on_message_acked_for_keep_latest"}, "pool": "pool1"}
"""

POOL = "backend.redis.pool1.server = 127.0.0.1:6379\n"
PUBLISH = (
    'backend.redis.hook.message.publish.1 = {"topic": "#", '
    '"action": {"function": "on_message_publish"}, "pool": "pool1"}\n'
)


def parse(text: str) -> Rules:
    return parse_conf(text, "emqx_backend_redis.conf")


def fails(text: str, line: int, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    error = caught.value
    assert (error.file, error.line) == ("emqx_backend_redis.conf", line), error
    for word in words:
        assert word in error.reason, error


def test_presence_may_have_a_lifetime_in_an_old_file() -> None:
    rule = (
        'backend.redis.hook.client.disconnected.1 = {"expired_time": 60, '
        '"action": {"function": "on_client_disconnected"}, "pool": "pool1"}\n'
    )
    assert [each.expired_time for each in parse(POOL + rule).rules] == [60]
    for word in ("0", "null", '"never"'):
        (given,) = parse(POOL + rule.replace("60", word)).rules
        assert given.expired_time is None


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_documented_file_means_the_default_rules(newline: str) -> None:
    given = parse(DOCUMENTED.replace("\n", newline))
    # The old backend fetched nothing for a wildcard.
    assert [rule.wildcards for rule in given.delivery_rules()] == ["ignore", "ignore"]
    expected = json.loads(default_rules().canonical())
    for rule in expected:
        rule["wildcards"] = "ignore" if "_fetch_" in str(rule["action"]) else "serve"
        # It kept the presence of every client.
        if rule["action"] == "on_client_disconnected":
            rule["expired_time"] = None
    assert json.loads(given.canonical()) == expected
    assert given.pools == default_rules().pools
    assert [rule.line for rule in given.rules] == list(range(9, 21))
    assert {rule.file for rule in given.rules} == {"emqx_backend_redis.conf"}


def test_the_documented_keep_latest_rules_make_a_queue() -> None:
    given = parse(POOL + KEEP_LATEST)
    assert [(rule.hook, rule.action, rule.expired_time) for rule in given.rules] == [
        ("session.subscribed", "on_message_fetch_for_keep_latest", None),
        ("message.publish", "on_message_store_keep_latest", 3600),
        ("message.acked", "on_message_acked_for_keep_latest", None),
    ]
    assert given.owner("any/topic") == "queue"


def test_rules_are_in_the_order_of_hook_and_number() -> None:
    given = parse(
        POOL
        + "".join(
            f'backend.redis.hook.{hook} = {{"action": {{"commands": ["INCR {hook}"]}}}}\n'
            for hook in ("message.publish.10", "message.publish.9", "client.connected.2")
        )
    )
    assert [rule.commands[0][1] for rule in given.rules] == [
        *("client.connected.2", "message.publish.9", "message.publish.10"),
    ]


def test_commands_are_split_at_single_spaces() -> None:
    given = parse(
        POOL + 'backend.redis.hook.message.acked.1={"topic": "t/#", "action": {"commands": '
        '["HSET ack:${clientid} ${topic} ${msgid}", "INCR n"]}}#comment\n'
    )
    assert given.rules[0].commands == (
        ("HSET", "ack:${clientid}", "${topic}", "${msgid}"),
        ("INCR", "n"),
    )


@pytest.mark.parametrize(
    ("value", "expected"), [("60", 60), ("0", None), ("-1", None), ("60 # a minute", 60)]
)
def test_expired_after_is_the_default_of_publish_rules(value: str, expected: int | None) -> None:
    own = PUBLISH.replace("publish.1", "publish.2").replace('"pool"', '"expired_time": 5, "pool"')
    acked = 'backend.redis.hook.message.acked.1 = {"action": {"function": "on_message_receipt"}}\n'
    given = parse(POOL + PUBLISH + own + acked + f"backend.redis.msg.expired_after = {value}\n")
    assert [rule.expired_time for rule in given.rules] == [expected, 5, None]


def test_pools_are_read_with_all_their_settings() -> None:
    given = parse(
        """
        backend.redis.s.type=sentinel
        backend.redis.s.server   =   10.0.0.1:26379, 10.0.0.2:26379
        backend.redis.s.sentinel = mymaster
        backend.redis.s.database = 2
        backend.redis.s.password = a#b  # the password
        backend.redis.s.pool_size = 16
        backend.redis.s.channel = orders
        backend.redis.c.type = cluster
        backend.redis.c.server = 10.0.0.3:7000,10.0.0.4:7000
        backend.redis.c.password =
        # backend.redis.c.database = 5
        backend.redis.c.tls = true
        """
    )
    assert given.rules == ()
    assert given.pools == (
        Pool(
            name="s", type="sentinel", servers=(("10.0.0.1", 26379), ("10.0.0.2", 26379)),
            sentinel="mymaster", database=2, password="a#b", pool_size=16, channel="orders",
        ),
        Pool(
            name="c", type="cluster", servers=(("10.0.0.3", 7000), ("10.0.0.4", 7000)), tls=True
        ),
    )  # fmt: skip


RULE = "backend.redis.hook.message.publish.1 = "


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", ["neither a comment nor"]),
        ("backend.redis.pool1.database", ["neither a comment nor"]),
        ("backend.mysql.pool1.server = h", ["unknown setting 'backend.mysql.pool1.server'"]),
        ("backend.redis.server = h", ["has the pool's name", "backend.redis.pool1.server"]),
        ('backend.redis.rule.1 = {"action": "on_client_connected"}', ["backend.redis.hook."]),
        ("backend.redis.msg.other = 1", ["unknown setting"]),
        ("backend.redis.hook.message = 1", ["unknown setting"]),
        ("backend.redis.hook.message.publish = {}", ["unknown setting"]),
        ("backend.redis.pool1.size = 1", ["unknown key 'size'", "'pool_size'?"]),
        ("backend.redis.pool1.pool_size = many", ["pool_size: expected `int`"]),
        ("backend.redis.pool1.pool_size = 0", ["pool_size: expected `int` >= 1"]),
        ("backend.redis.pool1.type = double", ["unknown type 'double'"]),
        ("backend.redis.pool1.server = h", ["given twice, first in line 1"]),
        ("backend.redis.pool2.database = 1", ["'pool2' needs a server"]),
        ("backend.redis.msg.expired_after = 1h", ["seconds", "'1h'"]),
        ("backend.redis.msg.expired_after = 3155760001", ["at most 3155760000"]),
        ("backend.redis.hook.message.del.1 = {}", ["unknown hook 'message.del'"]),
        ("backend.redis.pool1.sentinell = m", ["unknown key 'sentinell'", "'sentinel'?"]),
        ("backend.redis.pool1.ssl.enable = maybe", ["ssl.enable is on or off, not 'maybe'"]),
        ("backend.redis.hook.message.publish.x = {}", ["needs a number"]),
        ("backend.redis.hook.message.publish.01 = {}", ["needs a number"]),
        (RULE, ["not a JSON object"]),
        (RULE + "{", ["not a JSON object"]),
        (RULE + "[1]", ["not a JSON object"]),
        (RULE + '{"topic": "\\ud800"}', ["not a JSON object"]),
        (RULE + '{"topic": NaN}', ["not a JSON object"]),
        (RULE + "[" * 100_000, ["not a JSON object"]),
        (RULE + '{"action": {"function": "x"}} trailing', ["'trailing'"]),
        (RULE + '{"pool": "pool1"}', ["the action must be"]),
        (RULE + '{"action": "on_message_publish"}', ["the action must be"]),
        (RULE + '{"action": {}}', ["the action must be"]),
        (RULE + '{"action": {"sql": ["x"]}}', ["the action must be"]),
        (RULE + '{"action": {"function": "x", "commands": []}}', ["the action must be"]),
        (RULE + '{"action": {"commands": ["TIME"], "x": 1}}', ["the action must be"]),
        (RULE + '{"hook": "message.acked", "action": {"function": "x"}}', ["unknown key 'hook'"]),
        (RULE + '{"commands": ["TIME"]}', ["unknown key 'commands'"]),
        (RULE + '{"action": {"function": "on_x"}}', ["unknown action 'on_x'"]),
        (RULE + '{"action": {"function": "on_client_connected"}}', ["client.connected, not with"]),
        (RULE + '{"action": {"commands": []}}', ["commands is empty"]),
        (RULE + '{"action": {"commands": ["KEYS *"]}}', ["KEYS"]),
        (RULE + '{"action": {"commands": ["SET  a b"]}}', ["one space"]),
        (RULE + '{"topic": "a/#/", "action": {"commands": ["TIME"]}}', ["'#'"]),
        (RULE + '{"topic": 5, "action": {"commands": ["TIME"]}}', ["topic: expected"]),
        (RULE + '{"tpic": "#", "action": {"commands": ["TIME"]}}', ["unknown key 'tpic'"]),
        (RULE + '{"pool": "p2", "action": {"commands": ["TIME"]}}', ["'p2' is not defined"]),
        (RULE + '{"expired_time": 1.5, "action": {"commands": ["TIME"]}}', ["got `float`"]),
    ],
)
def test_an_invalid_line_is_refused(text: str, words: list[str]) -> None:
    fails(f"{POOL}# comment\n{text}\n", 3, *words)


def test_two_delivery_rules_for_one_topic_are_both_named() -> None:
    fails(
        DOCUMENTED.replace("pubsub/#", "queue/a/+"),
        13,
        "for 'queue/a/+'",
        "for 'queue/#' (line 12)",
    )


def test_all_rules_of_an_agent_need_the_same_pool() -> None:
    two = DOCUMENTED.replace('lookup"}, "pool": "pool1"}\n', 'lookup"}, "pool": "pool2"}\n')
    fails(
        two + "backend.redis.pool2.server = h:1\n",
        14,
        "'pool2'",
        "on_client_connected (line 9)",
        "'pool1'",
        "agent sessions",
    )


def test_all_faults_of_a_file_are_reported_in_one_run() -> None:
    text = """
        hello
        backend.redis.pool1.sever = h
        backend.redis.pool1.server = h:x
        backend.redis.msg.expired_after = 1h
        backend.redis.hook.message.publsh.1 = {}
        backend.redis.hook.message.publish.2 = {"action": {"function": "on_message_publsh"}, "pool": "pool1"}
        backend.redis.hook.message.publish.1 = {
        backend.redis.hook.client.connected.1 = {"topic": "#", "action": {"commands": ["KEYS *"]}}
        """
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert [fault.line for fault in caught.value.faults] == [2, 3, 4, 5, 6, 7, 8, 9]
    shown = str(caught.value)
    for meant in ("'server'?", "'message.publish'?", "'on_message_publish'?"):
        assert f"did you mean {meant}" in shown


# -- old files as they are

CONNECTED = "backend.redis.hook.client.connected.1 = "


def warned(text: str) -> tuple[Rules, list[str]]:
    said: list[str] = []
    return parse_conf(text, "a.conf", said.append), said


def test_a_sentinel_without_a_type_is_a_set_of_sentinels() -> None:
    given = parse("backend.redis.p.server = h\nbackend.redis.p.sentinel = mymaster\n")
    assert given.pools == (
        Pool(name="p", type="sentinel", sentinel="mymaster", servers=(("h", 26379),)),
    )


def test_a_sentinel_beside_another_type_is_ignored_with_a_warning() -> None:
    text = "backend.redis.p.server = h\nbackend.redis.p.sentinel = m\nbackend.redis.p.type = {}\n"
    for kind in ("single", "cluster"):
        given, said = warned(text.format(kind))
        assert (given.pools[0].type, given.pools[0].sentinel) == (kind, None)
        assert said == [f"a.conf:2: sentinel has no effect with type = {kind}"]


def test_the_hook_message_deliver_is_message_delivered() -> None:
    line = 'backend.redis.hook.message.{}.1 = {{"topic": "a", "action": {{"commands": ["INCR {}"]}}}}\n'
    given = parse(POOL + line.format("deliver", "old") + line.format("delivered", "new"))
    assert [(rule.hook, rule.commands[0][1]) for rule in given.rules] == [
        ("message.delivered", "old"),
        ("message.delivered", "new"),
    ]


@pytest.mark.parametrize("value", [0, -1])
def test_an_expired_time_that_is_not_positive_means_the_default(value: int) -> None:
    own = PUBLISH.replace('"pool"', f'"expired_time": {value}, "pool"')
    assert [rule.expired_time for rule in parse(POOL + own).rules] == [None]
    default = "backend.redis.msg.expired_after = 60\n"
    assert [rule.expired_time for rule in parse(POOL + own + default).rules] == [60]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("backend.redis.pool1.auto_reconnect = 1", "auto_reconnect has no effect"),
        ("backend.redis.pool1.query_timeout = 5s", "query_timeout has no effect"),
        ("backend.redis.pool1.ssl.verify = verify_peer", "ssl.verify has no effect"),
        ("backend.redis.time_range = 2h", "backend.redis.time_range has no effect"),
        ("backend.redis.max_returned_count = 500", "max_returned_count has no effect"),
        (
            CONNECTED
            + '{"topic": "#", "expired_time": 5, "action": {"function": "on_client_connected"}}',
            "has no topic",
        ),
        (
            CONNECTED + '{"expired_time": 5, "action": {"function": "on_client_connected"}}',
            "expired_time has no effect with on_client_connected",
        ),
    ],
)
def test_what_was_valid_and_means_nothing_here_is_a_warning(line: str, words: str) -> None:
    given, said = warned(f"{POOL}\n{line}\n")
    assert given.pools == parse(POOL).pools
    assert said[0].startswith("a.conf:3: ")
    assert words in said[0]


def test_an_empty_value_needs_no_warning() -> None:
    assert warned(POOL + "backend.redis.pool1.auto_reconnect =\n")[1] == []


def test_tls_of_an_old_file_is_tls() -> None:
    given, said = warned(
        POOL + "backend.redis.pool1.ssl.enable = on\nbackend.redis.pool1.ssl.cacertfile = ca.pem\n"
    )
    assert (given.pools[0].tls, given.pools[0].ca_file, said) == (True, "ca.pem", [])
    given, said = warned(
        POOL + "backend.redis.pool1.ssl = off\nbackend.redis.pool1.cacertfile = ca.pem\n"
    )
    assert (given.pools[0].tls, given.pools[0].ca_file, said) == (False, None, [])


def test_an_old_file_may_ask_for_wildcards() -> None:
    line = 'backend.redis.hook.session.subscribed.1 = {"topic": "q/#", "wildcards": "serve", '
    given = parse(POOL + line + '"action": {"function": "on_message_fetch_for_queue"}}\n')
    assert [rule.wildcards for rule in given.rules] == ["serve"]
