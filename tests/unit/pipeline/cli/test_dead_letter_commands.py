"""`millpond dead-letters` without servers: wrong arguments, confirmation, snapshots, and how messages are shown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from millpond.agents.delivery.dead_messages import DeadMessage
from millpond.pipeline.cli import common
from millpond.pipeline.cli.main import app
from millpond.pipeline.operate import dead_letters, operator_events
from millpond.pipeline.operate.dead_letter_snapshot import WRITTEN_AT_ONCE, DeadLetterSnapshot
from millpond.pipeline.operate.dead_letters import (
    AGENTS,
    FoundDeadLetter,
    has_owner,
    no_such,
    stored_message,
)
from millpond.schemas.errors import ConfigError, MillpondError
from millpond.schemas.events import OperatorDrop
from tests.support import given


def refusal(*arguments: str) -> Exception:
    """The error of a command that reaches no server: its configuration does not exist."""
    done = CliRunner().invoke(app, ["dead-letters", *arguments, "--config", "nowhere.toml"])
    assert isinstance(done.exception, Exception), done.output
    return done.exception


@pytest.mark.parametrize("verb", ["requeue", "drop"])
@pytest.mark.parametrize(
    "choice", [(), ("m", "--all"), ("m", "-t", "a"), ("--all", "--topic", "a", "--yes")]
)
def test_an_order_takes_ids_or_a_filter_or_all(verb: str, choice: tuple[str, ...]) -> None:
    error = refusal(verb, *choice)
    assert isinstance(error, ConfigError)
    assert str(error) == f"{verb} takes one of: message ids, --topic FILTER, --all"


@pytest.mark.parametrize("verb", ["requeue", "drop"])
@pytest.mark.parametrize("choice", [("--all",), ("--topic", "a/#")])
def test_without_a_terminal_an_order_about_many_needs_the_option_yes(
    verb: str, choice: tuple[str, ...]
) -> None:
    error = refusal(verb, *choice)
    assert isinstance(error, ConfigError)
    assert str(error) == f"{verb} needs a confirmation, and stdin is no terminal: add --yes"
    assert "nowhere.toml" in str(refusal(verb, *choice, "--yes"))


def test_an_order_about_ids_needs_no_confirmation() -> None:
    assert "nowhere.toml" in str(refusal("drop", "m1", "m2"))


@pytest.mark.parametrize("command", ["list", "requeue", "drop"])
@pytest.mark.parametrize(
    ("topic_filter", "reason"),
    [("a/#/b", "only at the end"), ("", "is empty"), ("$share/g/a", "without $share")],
)
def test_an_invalid_filter_is_an_error_with_the_reason(
    command: str, topic_filter: str, reason: str
) -> None:
    error = refusal(command, "--topic", topic_filter)
    assert isinstance(error, ConfigError)
    assert str(error).startswith("--topic: ")
    assert reason in str(error)


def test_a_limit_is_at_least_one() -> None:
    done = CliRunner().invoke(app, ["dead-letters", "list", "--limit", "0"])
    assert (done.exit_code, "--limit" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("answer", "written"), [("y\n", True), ("n\n", False), ("\n", False), ("yes\n", True)]
)
def test_only_yes_means_yes(
    answer: str, written: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def two(_: object, __: object, ___: object, snapshot: DeadLetterSnapshot) -> int:
        for at in range(2):
            snapshot.add("queue", dead(f"m{at}", at))
        return 0

    async def write(_: object, events: Iterable[OperatorDrop]) -> int:
        ordered.extend(events)
        return len(ordered)

    ordered: list[OperatorDrop] = []
    monkeypatch.setattr(dead_letters, "fill_snapshot", two)
    monkeypatch.setattr(operator_events, "write", write)
    monkeypatch.setattr(common, "can_ask", lambda: True)
    (tmp_path / "stack.toml").write_text("")
    done = CliRunner().invoke(
        app, ["dead-letters", "drop", "--all", "--data", str(tmp_path)], input=answer
    )
    assert "Drop 2 dead letters? [y/N]" in done.stderr
    assert [each.message_id for each in ordered] == (["m0", "m1"] if written else [])
    if not written:
        assert str(done.exception) == "not confirmed: nothing was changed"


def dead(message_id: str, at: int = 0, topic: str = "queue/a") -> DeadMessage:
    return DeadMessage(topic=topic, message_id=message_id, reason="r", deliveries=1, at=at)


def test_a_snapshot_has_each_dead_letter_once_the_oldest_first() -> None:
    many = 2 * WRITTEN_AT_ONCE + 1
    with DeadLetterSnapshot() as snapshot:
        assert (len(snapshot), list(snapshot), snapshot.newest(1)) == (0, [], [])
        for at in (*reversed(range(many)), 7, 8):
            snapshot.add("queue", dead(f"m{at:05}", at // 2))
        snapshot.add("pubsub", dead("m00000", 0))
        assert len(snapshot) == many + 1
        ids = [each.message_id for _, each in snapshot]
        assert ids == ["m00000", *(f"m{at:05}" for at in range(many))]
        newest = [each for _, each in snapshot.newest(2)]
        assert newest == [dead(f"m{at:05}", at // 2) for at in (many - 2, many - 1)]


BODY = {
    "id": b"m", "from": b"pub", "qos": b"1", "topic": b"queue/a", "payload": b"hello",
    "ts": b"1542338754", "retain": b"true",
}  # fmt: skip


def test_a_stored_message_has_the_payload_of_its_publisher() -> None:
    found = stored_message("m", BODY)
    assert found is not None
    assert (found.client_id, found.qos, found.retain) == ("pub", 1, True)
    assert (found.published_at, found.expires_at) == (1_542_338_754_000, None)
    assert (found.payload, found.payload_encoding) == ("hello", "utf-8")
    binary = stored_message("m", {**BODY, "payload": b"\xff", "expires_at": b"5"})
    assert binary is not None
    assert (binary.payload, binary.payload_encoding, binary.expires_at) == ("/w==", "base64", 5)


@pytest.mark.parametrize(
    "other",
    [{"id": b"other"}, {"qos": b"3"}, {"qos": b"x"}, {"ts": b"-1"}, {"from": b"\xff"}],
    ids=str,
)
def test_the_key_of_another_program_is_no_stored_message(other: dict[str, bytes]) -> None:
    assert stored_message("m", {**BODY, **other}) is None
    assert stored_message("m", {}) is None


def test_a_dead_letter_has_an_owner_only_while_its_agent_owns_the_topic() -> None:
    rules = given.rules(given.queue("queue/#"))
    assert has_owner(rules, FoundDeadLetter("queue", dead("m", topic="queue/a")))
    assert not has_owner(rules, FoundDeadLetter("queue", dead("m", topic="once/a/queue")))
    assert not has_owner(rules, FoundDeadLetter("pubsub", dead("m", topic="queue/a")))


def test_the_delivery_agents_keep_dead_letters() -> None:
    assert AGENTS == ("queue", "pubsub")


def test_an_error_names_the_first_ids_and_counts_the_rest() -> None:
    error = no_such([f"m{at}" for at in range(8)])
    assert isinstance(error, MillpondError)
    assert "'m0', 'm1', 'm2', 'm3', 'm4' and 3 more" in str(error)


def test_text_of_publishers_cannot_move_the_cursor() -> None:
    assert common.printable("a\x1b[2J\u202eß\n", "\n") == "a\\x1b[2J\\u202eß\n"
    assert common.printable("a\nb") == "a\\nb"
