"""Rules from a `millpond.toml`: valid files, and the line of the error for each fault."""

from __future__ import annotations

import pytest

from millpond.schemas.errors import ConfigError
from millpond.schemas.rules import Pool, Rule, Rules, default_rules, parse_toml

POOL = '[pool.pool1]\nserver = "127.0.0.1:6379"\n\n'  # three lines
QUEUE = (
    '[[rule]]\nhook = "session.subscribed"\ntopic = "queue/#"\n'
    'action = "on_message_fetch_for_queue"\n'
)


def parse(text: str) -> Rules:
    return parse_toml(text, "millpond.toml")


def fails(text: str, line: int | None, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    error = caught.value
    assert (error.file, error.line) == ("millpond.toml", line), error
    for word in words:
        assert word in error.reason, error


def test_rules_are_read_with_all_their_settings() -> None:
    (rule,) = parse(
        POOL
        + QUEUE
        + 'pool = "pool1"\nexpired_time = 60\nmax_inflight = 1\nack_timeout_s = 43200\n'
        'max_deliveries = 1000\nmax_length = 10\noverflow = "dead_letter"\nstore_qos0 = true\n'
    ).rules
    assert rule == Rule(
        hook="session.subscribed", topic="queue/#", action="on_message_fetch_for_queue",
        pool="pool1", expired_time=60, max_inflight=1, ack_timeout_s=43_200, max_deliveries=1_000,
        max_length=10, overflow="dead_letter", store_qos0=True, file="millpond.toml", line=4,
    )  # fmt: skip


def test_commands_are_split_at_single_spaces() -> None:
    (rule,) = parse(
        POOL + '[[rule]]\nhook = "message.acked"\ntopic = "#"\n'
        'commands = ["HSET ack:${clientid} ${topic} ${msgid}", "INCR n"]\n'
    ).rules
    assert rule.commands == (
        ("HSET", "ack:${clientid}", "${topic}", "${msgid}"),
        ("INCR", "n"),
    )
    assert rule.action is None


def test_settings_of_other_parts_are_ignored() -> None:
    text = 'app = "x"\n[kafka]\nbootstrap_servers = ["h:1"]\n[worker]\n[stack]\n[bridge]\n'
    assert parse(text).canonical() == default_rules().canonical()
    assert parse(text).pools == default_rules().pools


def test_a_file_without_rules_gets_the_documented_rules_on_its_pool() -> None:
    given = parse('[pool.mine]\nserver = "redis"\n')
    assert {rule.pool for rule in given.rules} == {"mine"}
    assert [rule.action for rule in given.rules] == [rule.action for rule in default_rules().rules]
    assert given.pool("queue").servers == (("redis", 6379),)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("", 86_400), ("expired_time = 5\n", 5), ('expired_time = "never"\n', None)],
)
def test_presence_has_a_lifetime_unless_the_rule_says_never(
    setting: str, expected: int | None
) -> None:
    action = "on_client_disconnected"
    rule = f'[[rule]]\nhook = "client.disconnected"\naction = "{action}"\n{setting}'
    assert [each.expired_time for each in parse(POOL + rule).rules] == [expected]


def test_an_empty_list_means_no_rules() -> None:
    assert parse("rule = []\n" + POOL).rules == ()


def test_pools_are_read_with_all_their_settings() -> None:
    given = parse(
        "rule = []\n"
        '[pool.s]\ntype = "sentinel"\nserver = ["h1", "[::1]:26380"]\nsentinel = "mymaster"\n'
        'database = 3\nusername = "u"\npassword_file = "f"\ntls = true\nca_file = "ca"\n'
        'pool_size = 2\nchannel = "c"\n'
        '[pool.c]\ntype = "cluster"\nserver = "h1:1, h2:2"\npassword = "p"\n'
    )
    assert given.pools == (
        Pool(
            name="s", type="sentinel", servers=(("h1", 26379), ("::1", 26380)), sentinel="mymaster",
            database=3, username="u", password_file="f", tls=True, ca_file="ca", pool_size=2,
            channel="c",
        ),
        Pool(name="c", type="cluster", servers=(("h1", 1), ("h2", 2)), password="p"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a = 1\nb = = 2\n", 2, "not TOML"),
        ('a = 1\nb = """\n', 3, "not TOML"),
        ("a = " + "[" * 100_000, None, "nested too deeply"),
        ("\npool = 5\n", 2, "[pool.pool1]"),
        ("\n[pool]\nx = 5\n", 3, "not a table"),
        ('[[pool]]\nserver = "h"\n', 1, "[pool.pool1]"),
        ("\nrule = 5\n", 2, "[[rule]]"),
        ('[rule]\nhook = "x"\n', 1, "[[rule]]"),
        ("\nrule = [1]\n", 2, "not a table"),
        ('[pool.a]\nserver = "h"\n[pool.b]\nserver = "h"\n', None, "several pools"),
    ],
)
def test_a_file_with_another_structure_is_refused(text: str, line: int | None, word: str) -> None:
    fails(text, line, word)


@pytest.mark.parametrize(
    ("settings", "line", "words"),
    [
        ("", 1, ["needs a server"]),
        ("server = []", 2, ["needs a server"]),
        ('server = ""', 2, ["host:port"]),
        ('server = "redis://h:1"', 2, ["'redis://h:1'", "host:port"]),
        ('server = "h:0"', 2, ["'h:0'"]),
        ('server = "h:65536"', 2, ["'h:65536'"]),
        ('server = "h:x"', 2, ["'h:x'"]),
        ("server = 5", 2, ["server: expected", "got `int`"]),
        ('\nserver = "h1,h2"', 3, ["several servers"]),
        ('server = "h"\ntype = "sentinel"', 3, ["needs sentinel"]),
        ('server = "h"\ntype = "sentinal"', 3, ["unknown type 'sentinal'", "'sentinel'?"]),
        ('server = "h"\ntype = "single"\nsentinel = "m"', 4, ['type = "sentinel"']),
        ('server = "h"\nsentinel_password_file = "f"', 3, ['type = "sentinel"']),
        (
            'server = "h"\nsentinel = "m"\nsentinel_username = "u"',
            4,
            ["needs a sentinel_password_file"],
        ),
        ('server = "h"\ntype = "cluster"\ndatabase = 1', 4, ["database 0"]),
        ('server = "h"\ndatabase = -1', 3, ["database: expected `int` >= 0"]),
        ('server = "h"\npool_size = 0', 3, ["pool_size: expected `int` >= 1"]),
        ('server = "h"\npool_size = true', 3, ["pool_size: expected `int`, got `bool`"]),
        ('server = "h"\npassword = "a"\npassword_file = "b"', 3, ["password and a password_file"]),
        ('server = "h"\nca_file = "b"', 3, ["tls = true"]),
        ('server = "h"\nname = "b"', 3, ["unknown key 'name'"]),
        ('server = "h"\npasword = "b"', 3, ["unknown key 'pasword'", "'password'?"]),
        ('server = "h"\nzzz = "b"', 3, ["known are type, "]),
    ],
)
def test_an_invalid_pool_is_refused(settings: str, line: int, words: list[str]) -> None:
    fails(f"[pool.pool1]\n{settings}\n", line, *words)


def test_a_secret_of_the_wrong_type_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse('[pool.p]\nserver = "h"\npassword = 90210\n')
    assert "90210" not in str(caught.value)


RULE = '[[rule]]\nhook = "message.publish"\n'  # lines 4 and 5


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[[rule]]\n", 4, ["no hook"]),
        ('[[rule]]\n\nhook = "message.published"\n', 6, ["unknown hook", "'message.publish'?"]),
        ('[[rule]]\nhook = "zzz"\n', 5, ["unknown hook 'zzz'", "known are client.connected, "]),
        ("[[rule]]\nhook = 5\n", 5, ["hook: expected"]),
        (RULE, 4, ["either an action or commands"]),
        (RULE + 'action = "on_mesage_publish"\n', 6, ["unknown action", "'on_message_publish'?"]),
        (RULE + "action = []\n", 6, ["action: expected"]),
        (RULE + 'action = "on_retain_lookup"\n', 6, ["session.subscribed, not with message.pub"]),
        (RULE + 'action = "on_retain_delete"\ncommands = ["TIME"]\n', 6, ["either"]),
        (RULE + "commands = []\n", 6, ["commands is empty"]),
        (RULE + 'commands = "TIME"\n', 6, ["commands: expected `array`"]),
        (RULE + 'commands = [\n"TIME",\n""]\n', 6, ["empty"]),
        (RULE + 'commands = ["FLUSHALL"]\n', 6, ["FLUSHALL"]),
        (RULE + 'commands = ["SET k ${x}"]\n', 6, ["message.publish has no ${x}"]),
        (RULE + 'commands = ["SET millpond:x 1"]\n', 6, ["Millpond's own"]),
        (RULE + 'topic = "a/#/b"\naction = "on_message_publish"\n', 6, ["'#'", "'a/#/b'"]),
        (RULE + 'topic = ""\naction = "on_message_publish"\n', 6, ["empty"]),
        (RULE + 'topic = 1\ncommands = ["TIME"]\n', 6, ["topic: expected"]),
        (RULE + 'topic = "$share/g/a"\ncommands = ["TIME"]\n', 6, ["plain filter"]),
        (RULE + 'topic = "$queue/a"\ncommands = ["TIME"]\n', 6, ["plain filter"]),
        (RULE + 'topic = "$SYS/#"\naction = "on_message_publish"\n', 6, ["$SYS/", "never"]),
        (RULE + 'topic = "$millpond/x"\ncommands = ["TIME"]\n', 6, ["$millpond/", "never"]),
        (
            '[[rule]]\nhook = "client.connected"\ntopic = "#"\ncommands = ["TIME"]\n',
            6,
            ["no topic"],
        ),
        (QUEUE.replace('topic = "queue/#"\n', ""), 4, ["needs a topic"]),
        (
            RULE.replace("publish", "acked") + 'action = "on_message_acked_for_queue"\n',
            4,
            ["needs a topic"],
        ),
        (RULE + 'commands = ["TIME"]\npool = "pool2"\n', 7, ["'pool2'", "defined pools: pool1"]),
        (RULE + 'commands = ["TIME"]\npool = 2\n', 7, ["pool: expected"]),
        (RULE + 'commands = ["TIME"]\nfile = "x"\n', 7, ["unknown key 'file'"]),
        (RULE + 'commands = ["TIME"]\n[rule.sub]\n', 7, ["unknown key 'sub'"]),
        (QUEUE + "expired_time = -1\n", 8, ["expired_time: expected `int` >= 1"]),
        (QUEUE + "expired_time = 0\n", 8, [">= 1"]),
        (QUEUE + "expired_time = 3155760001\n", 8, ["<= 3155760000"]),
        (QUEUE + "expired_time = 1.5\n", 8, ["got `float`"]),
        (QUEUE + 'expired_time = "1h"\n', 8, ["got `str`"]),
        (QUEUE + "expired_time = 2024-01-01\n", 8, ["expired_time"]),
        (QUEUE + 'expired_time = "never"\n', 8, ["'never' with on_client_disconnected alone"]),
        (QUEUE + "max_inflight = 0\n", 8, [">= 1"]),
        (QUEUE + "max_inflight = 65536\n", 8, ["<= 65535"]),
        (QUEUE + "ack_timeout_s = 0\n", 8, [">= 1"]),
        (QUEUE + "ack_timeout_s = 43201\n", 8, ["<= 43200"]),
        (QUEUE + "max_deliveries = 0\n", 8, [">= 1"]),
        (QUEUE + "max_deliveries = 1001\n", 8, ["<= 1000"]),
        (QUEUE + "max_length = 0\n", 8, [">= 1"]),
        (QUEUE + "max_length = 100000001\n", 8, ["<= 100000000"]),
        (QUEUE + 'overflow = "drop"\n', 8, ["unknown overflow 'drop'"]),
        (
            QUEUE + 'start = "earliest"\n',
            8,
            ["start has no effect with on_message_fetch_for_queue"],
        ),
        (QUEUE + "offset_retention_s = 60\n", 8, ["offset_retention_s has no effect"]),
        (
            QUEUE.replace("queue", "pubsub") + 'overflow = "drop_oldest"\n',
            8,
            ["overflow has no effect"],
        ),
        (QUEUE + "store_qos0 = 1\n", 8, ["store_qos0: expected `bool`"]),
        (
            RULE + 'action = "on_retain_delete"\nmax_inflight = 1\n',
            7,
            ["max_inflight has no effect"],
        ),
        (
            (
                '[[rule]]\nhook = "client.connected"\naction = "on_client_connected"\n'
                "expired_time = 1\n"
            ),
            7,
            ["expired_time has no effect"],
        ),
    ],
)
def test_an_invalid_rule_is_refused(text: str, line: int, words: list[str]) -> None:
    fails(POOL + text, line, *words)


def test_an_error_in_the_second_rule_has_its_line() -> None:
    fails(POOL + QUEUE + '\n[[rule]]\nhook = "message.publish"\naction = "x"\n', 11, "'x'")


def test_a_rule_needs_a_pool_that_exists() -> None:
    fails(QUEUE, 1, "no pool")
    fails(QUEUE + 'pool = "p"\n', 5, "'p' is not defined", "defined pools: none")
    fails(QUEUE + '[pool.a]\nserver = "h"\n[pool.b]\nserver = "h"\n', 1, "names no pool")


@pytest.mark.parametrize(
    ("action", "topic"),
    [
        ("on_message_fetch_for_pubsub", "+/a"),
        ("on_message_fetch_for_queue", "queue/#"),
        ("on_message_fetch_for_keep_latest", "#"),
    ],
)
def test_two_delivery_rules_for_one_topic_are_both_named(action: str, topic: str) -> None:
    other = f'[[rule]]\nhook = "session.subscribed"\ntopic = "{topic}"\naction = "{action}"\n'
    fails(POOL + QUEUE + other, 8, f"{action} for {topic!r}", "for 'queue/#' (line 4)")


TWO_POOLS = '[pool.one]\nserver = "h"\n[pool.two]\nserver = "h"\n'  # four lines
ON_TWO = (
    '[[rule]]\nhook = "message.publish"\ntopic = "{}"\naction = "on_message_publish"\n'
    'pool = "two"\n'
)


@pytest.mark.parametrize(
    ("first", "topic", "agent"),
    [
        (QUEUE, "#", "queue"),
        (QUEUE, "+/a", "queue"),
        (ON_TWO.format("a").replace("two", "x"), "b", "messages"),
    ],
)
def test_all_rules_of_an_agent_need_the_same_pool(first: str, topic: str, agent: str) -> None:
    text = TWO_POOLS + first.replace('pool = "x"\n', "") + 'pool = "one"\n' + ON_TWO.format(topic)
    fails(text, 10, "'two'", "'one'", "(line 5)", f"agent {agent}")


def test_different_agents_may_have_different_pools() -> None:
    presence = '[[rule]]\nhook = "client.connected"\naction = "on_client_connected"\npool = "two"\n'
    acked = (
        '[[rule]]\nhook = "message.acked"\ntopic = "#"\naction = "on_message_acked_for_queue"\n'
        'pool = "one"\n'
    )
    given = parse(
        TWO_POOLS + QUEUE + 'pool = "one"\n' + ON_TWO.format("other/#") + presence + acked
    )
    assert given.pool("queue").name == "one"
    assert given.pool("messages").name == given.pool("sessions").name == "two"


@pytest.mark.parametrize(
    ("hook", "action"),
    [
        ("message.acked", "on_message_acked_for_queue"),
        ("message.acked", "on_message_acked_for_pubsub"),
        ("message.acked", "on_message_acked_for_keep_latest"),
        ("message.publish", "on_message_store_keep_latest"),
    ],
)
def test_a_companion_without_its_delivery_rule_is_refused(hook: str, action: str) -> None:
    beside = f'[[rule]]\nhook = "{hook}"\ntopic = "jobs/#"\naction = "{action}"\n'
    fails(POOL + QUEUE + beside, 8, f"{action} for 'jobs/#' has no effect", "on_message_fetch_for_")


EVERY_FAULT = """\
[pool.one]
server = 5
sever = "h"
type = "sentinal"
[pool.two]
server = "h, h:x, :1"
[[rule]]
hook = "message.publsh"
topic = "a/#/b"
[[rule]]
hok = "message.acked"
pool = "two"
[[rule]]
hook = "message.acked"
topic = "a/#/b"
action = "on_message_receit"
max_inflight = 0
pool = "three"
[[rule]]
hook = "message.publish"
topic = "$SYS/#"
commands = ["FLUSHALL", "SET k ${x}"]
start = "latest"
pool = "one"
[[rule]]
hook = "message.acked"
topic = "queue/#"
action = "on_message_acked_for_queue"
pool = "one"
[[rule]]
hook = "session.subscribed"
topic = "pubsub/#"
action = "on_message_fetch_for_pubsub"
pool = "one"
[[rule]]
hook = "session.subscribed"
topic = "#"
action = "on_message_fetch_for_pubsub"
pool = "two"
"""


def faults(text: str) -> list[tuple[int | None, str]]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    lines = str(caught.value).splitlines()
    assert lines == [str(fault) for fault in caught.value.faults]
    return [(fault.line, fault.reason) for fault in caught.value.faults]


def test_all_faults_of_a_file_are_reported_in_one_run_in_the_order_of_its_lines() -> None:
    expected = [
        (2, "server: expected"),
        (3, "'server'?"),
        (4, "'sentinel'?"),
        (6, "'h:x' is not"),
        (6, "':1' is not"),
        (7, "names no pool"),
        (8, "'message.publish'?"),
        (10, "names no hook"),
        (11, "'hook'?"),
        (15, "'#' stands only at the end"),
        (16, "'on_message_receipt'?"),
        (17, "max_inflight: expected"),
        (18, "'three' is not defined"),
        (21, "never stored"),
        (22, "FLUSHALL"),
        (22, "no ${x}"),
        (23, "start has no effect"),
        (35, "(line 30) can both match"),
        (35, "'two', but"),
    ]
    found = faults(EVERY_FAULT)
    assert [line for line, _ in found] == [line for line, _ in expected]
    for (_, reason), (_, words) in zip(found, expected, strict=True):
        assert words in reason


def test_a_companion_is_blamed_unless_its_delivery_rule_may_be_one_that_cannot_be_read() -> None:
    companion = (
        '[[rule]]\nhook = "message.acked"\ntopic = "q/#"\naction = "on_message_acked_for_queue"\n'
    )
    wrong = '[[rule]]\nhook = "message.publish"\naction = "x"\n'
    assert len(faults(POOL + companion + wrong)) == 2
    unread = wrong.replace("message.publish", "session.subscribed")
    assert [line for line, _ in faults(POOL + companion + unread)] == [10]


def test_structures_that_are_wrong_do_not_hide_each_other() -> None:
    assert [line for line, _ in faults("rule = [1]\n[pool]\nx = 5\n")] == [1, 3]
    assert [line for line, _ in faults("pool = 1\n[rule]\n")] == [1, 2]
