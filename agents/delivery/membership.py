"""Members, for queue and pubsub alike: who comes and goes, rests, and is forgotten.

Rule 1: every transition of a member is in this file. Rule 2: no IO, no clock, no chance.

ON joined: the member may be served; a new session ends the old one's leases, a session that goes on keeps them: its
broker sends the copies again itself, as long as they are valid. ON left: it is served no more; leases of a session that
ended return at once, those of one that goes on when their validity ends, and not before. ON tick: rested members are
served again, those that have gone are forgotten in the end.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Final

from millpond.agents.delivery.leasing import Done, W, valid_until
from millpond.agents.delivery.members import HeldFilter, Member, is_of_group, member_name
from millpond.agents.delivery.silence import Silence
from millpond.agents.topics.due_times import MEMBER, due_member
from millpond.schemas.errors import DecodeError
from millpond.schemas.events import AgentName, SubscriberJoined, SubscriberLeft
from millpond.schemas.topics import filter_error, has_wildcard, intersects

# How long a member that has gone is remembered, so that late words of it are known to be old.
FORGET_MS: Final = 600_000


class Membership(Silence[W]):
    """The members of one partition."""

    agent: AgentName

    def remember(self, name: str, topic_filter: str, event: SubscriberJoined, score: int) -> Done:
        """A member is to be served by a filter, perhaps once more."""
        return []

    def forget(self, offset: int, name: str, topic_filter: str, now_ms: int, score: int) -> Done:
        """A member's subscription was given up, and not only its connection."""
        return []

    def went(self, name: str, topic_filter: str, now_ms: int, *, ended: bool) -> Done:
        """A member is no longer served by a filter, since it has gone; `ended` with its session."""
        return []

    @abstractmethod
    def own_key(self, name: str, topic: str) -> str:
        """The key of the window that a member has, or shares, for a topic."""

    def joined(self, offset: int, event: SubscriberJoined, now_ms: int, score: int) -> Done:
        """A client may be served by one filter more, or again over a new connection."""
        error = filter_error(event.topic_filter)
        if error is not None:
            raise DecodeError(error)
        name, topic_filter = member_name(event.client_id, event.topic_filter)
        member = self._members.get(name)
        done: Done = []
        if member is None:
            member = Member(event.client_id, event.session, event.source_offset)
            self._members.add(name, member)
        elif event.source_offset < member.joined_at:
            return []  # old news, told again
        elif member.session != event.session:
            done += self._end(offset, name, topic_filter, now_ms, ended=True)
            member.session = event.session
        rested, returned = member.rests_until > 0, dict[str, None]()
        member.joined_at = event.source_offset
        if rested or not member.filters or topic_filter in member.filters:
            # Over a new connection, as far as can be told.
            self.begin_epoch(member)
            returned, resumed = self._resume(offset, name, member, now_ms)
            done += resumed
            member.failures = 0
        done += self.remember(name, topic_filter, event, score)
        known = member.filters.get(topic_filter)
        since = score if known is None else known.since
        member.served = 0  # more may wait for it than did
        self._members.hold(name, topic_filter, HeldFilter(event.qos, since, event.broker_delivers))
        for key in returned:
            done += self.freed(offset, key, (name,), now_ms)
        wild = has_wildcard(topic_filter)
        everything = wild and self._is_served(name, topic_filter)
        if rested or everything or member.round.active:
            return [*done, *self.start_round(name, member, everything=everything)]
        if wild:
            return done
        return [*done, *self.dispatch(offset, self.own_key(name, topic_filter), now_ms)]

    def _is_served(self, name: str, topic_filter: str) -> bool:
        """True if some rule of this agent may serve a member by a filter with a wildcard."""
        return any(
            (rule.wildcards == "serve" or is_of_group(name))
            and intersects(rule.topic_filter, topic_filter)
            for rule in self._storage.rules.delivery_rules_of(self.agent)
        )

    def left(self, offset: int, event: SubscriberLeft, now_ms: int, score: int) -> Done:
        """A client is no longer to be served: by one filter, or, without its session or connection, at all."""
        name, topic_filter = member_name(event.client_id, event.topic_filter)
        member = self._members.get(name)
        if member is None:
            # Long forgotten; what it is remembered by besides may go on from here to its end.
            return self.went(name, topic_filter, now_ms, ended=event.reason == "session_ended")
        if event.source_offset < member.joined_at or event.session < member.session:
            return []  # old news, told again
        member.joined_at = event.source_offset
        done: Done = []
        if event.reason == "unsubscribed":
            self._members.let_go(name, topic_filter)
            done += self.forget(offset, name, topic_filter, now_ms, score)
            if member.filters:
                return done
        # One that has unsubscribed is alive. For one that is offline only the validity of its copies counts.
        member.acked_at = now_ms if event.reason == "unsubscribed" else 0
        ended = event.reason == "session_ended"
        return [*done, *self._end(offset, name, topic_filter, now_ms, ended=ended)]

    def _end(self, offset: int, name: str, left: str, now_ms: int, *, ended: bool) -> Done:
        """A member has gone, as the word about one of its filters says. What it has returns: at once if its session
        `ended`, else when the copies' validity does.
        """
        done: Done = []
        member = self._members[name]
        for topic_filter in dict.fromkeys((*member.filters, left)):
            self._members.let_go(name, topic_filter)
            done += self.went(name, topic_filter, now_ms, ended=ended)
        self._members.touch(name)
        member.left.clear()
        member.forget_at = now_ms + FORGET_MS
        done.append(self._due.falls_due(due_member(MEMBER, name), member.forget_at))
        if not ended:
            return [*done, *self._end_with_validity(offset, name, member, now_ms)]
        keys = dict.fromkeys(member.leases.values())
        for key in keys:
            window = self.window(offset, key)
            for message_id in [each for each, held in window.leases.items() if held.member == name]:
                done += self.give_back(offset, key, message_id, now_ms)
        for key in keys:
            done += self.dispatch(offset, key, now_ms)
        return done

    def _end_with_validity(self, offset: int, name: str, member: Member, now_ms: int) -> Done:
        """The leases of a member that has gone end when no bridge delivers their copies any more. A client that only gave
        up its filters may still be at work: the clocks of its copies run on.
        """
        done: Done = []
        for key in dict.fromkeys(member.leases.values()):
            window, delivery = self.window(offset, key), self.delivery(key)
            timeout_ms = 0 if delivery is None else delivery.ack_timeout_ms
            for message_id, lease in list(window.leases.items()):
                if lease.member == name:
                    until = max(valid_until(lease), now_ms, member.alive_until(timeout_ms))
                    window.set_deadline(message_id, until)
                    done += self.deadline(key, window, until)
            done += self.note_waiting(key, window)
        return done

    def _resume(
        self, offset: int, name: str, member: Member, now_ms: int
    ) -> tuple[dict[str, None], Done]:
        """A session goes on over a new connection. Its broker sends again what it has: the clocks of these copies start
        now. Copies that nobody has reported end with their validity; so did those of a client that was away for longer.
        The windows in which the member has room by that.
        """
        done: Done = []
        returned = dict.fromkeys(copy.key for copy in member.left.values())
        member.left.clear()
        was_away = not member.filters
        for key in dict.fromkeys(member.leases.values()):
            window, delivery = self.window(offset, key), self.delivery(key)
            for message_id, lease in list(window.leases.items()):
                if lease.member != name:
                    continue
                until = max(valid_until(lease), now_ms)
                if not lease.sent:
                    until = min(lease.until, until)
                elif was_away and valid_until(lease) <= now_ms:
                    done += self.give_back(offset, key, message_id, now_ms)
                    returned[key] = None
                    continue
                elif delivery is not None:
                    until = now_ms + delivery.ack_timeout_ms
                window.set_deadline(message_id, until)
                done += self.deadline(key, window, until)
            done += self.note_waiting(key, window)
        return returned, done

    def member_due(self, name: str, now_ms: int) -> Done:
        """A member has rested, or may be forgotten."""
        member = self._members[name]
        if not member.filters:
            if member.forget_at > now_ms or member.leases or member.round.active:
                later = max(member.forget_at, now_ms + FORGET_MS)
                return [self._due.falls_due(due_member(MEMBER, name), later)]
            self._members.remove(name)
            return []
        if not member.rests_until:
            return []
        if member.rests_until > now_ms:
            return [self._due.falls_due(due_member(MEMBER, name), member.rests_until)]
        self.begin_epoch(member)
        return self.start_round(name, member)
