"""Clocks of copies, for queue and pubsub alike: what becomes of a lease whose time is over.

Rule 1: every transition that time makes of a lease is in this file; the rest is in `leasing.py`. Rule 2: no IO, no clock,
no chance.

The clock of a copy runs from the later of its sending and the last acknowledgement of its member: a member that works
through what it has is alive, however long the last copy waits for its turn. A lease whose clock runs out is silent. Its
member keeps the copy, and gets it no second time over that connection ([MQTT-4.4.0-1]); another member with room may
take the lease over. An attempt is a confirmed send, so attempts are on different connections.

Where the broker gives copies ids of its own, it holds them in a queue, and drops them without a report when their
validity ends (EMQX). There, a copy is sent again to the same member in two cases: after its validity, when the member
has acknowledged a later one; and the first silent one of a window, as a probe, at intervals that double. Neither counts
as an attempt.
"""

from __future__ import annotations

from typing import Final

from millpond.agents.delivery.leasing import Done, Leasing, W, too_often, valid_until
from millpond.agents.delivery.members import client_of
from millpond.agents.delivery.window import Lease

# Between two probes of a silent member whose broker may drop copies: `ack_timeout_s`, twice that, at most an hour.
PROBE_MS_MAX: Final = 3_600_000


class Silence(Leasing[W]):
    """The deadlines of one partition's leases."""

    def overdue_leases(self, offset: int, key: str, now_ms: int) -> Done:
        """The leases of a window whose time is over fall silent, or return; then it is looked at again when the next one's is."""
        window = self.window(offset, key)
        window.due = None
        done: Done = []
        returned: dict[str, None] = {}
        overdue = [(x, lease) for x, lease in window.leases.items() if 0 < lease.until <= now_ms]
        for message_id, lease in overdue:
            if not self._stays(key, message_id, lease, now_ms, probed=lease.member in returned):
                returned[lease.member] = None
                done += self.give_back(offset, key, message_id, now_ms)
        done += self._give_up_silent(offset, key, now_ms)
        done += self.freed(offset, key, returned, now_ms)
        done += self.deadline(key, window, window.next_deadline())
        return done

    def _stays(self, key: str, message_id: str, lease: Lease, now_ms: int, *, probed: bool) -> bool:
        """True if a lease whose time is over stays with its holder: until a later deadline, or silent."""
        window, delivery = self._windows[key], self.delivery(key)
        member = self._members[lease.member]
        timeout_ms = 0 if delivery is None else delivery.ack_timeout_ms
        alive_until = member.alive_until(timeout_ms)
        if not lease.sent:
            return False
        if not member.filters and alive_until <= now_ms:
            return False
        may_be_dropped = lease.alias is not None and valid_until(lease) < now_ms
        if may_be_dropped and lease.number < member.acked_to:
            lease.deliveries -= 1  # it is sent again over the same connection: that is no attempt
            return False
        if alive_until > now_ms:
            window.set_deadline(message_id, alive_until)
            return True
        if may_be_dropped and lease.silent and not (probed or window.is_behind(message_id)):
            lease.deliveries -= 1
            member.probes += 1
            return False
        wait_ms = min(max(timeout_ms, 1) << min(member.probes, 16), PROBE_MS_MAX)
        probe_at = max(valid_until(lease) + 1, now_ms + wait_ms)
        window.fall_silent(message_id, 0 if lease.alias is None else probe_at)
        return True

    def _give_up_silent(self, offset: int, key: str, now_ms: int) -> Done:
        """Silent leases of messages that were delivered too often: a message is dead if another member is to get it next."""
        window, delivery = self._windows[key], self.delivery(key)
        done: Done = []
        for _, message_id in tuple(window.silent):
            lease = window.leases[message_id]
            if delivery is None or lease.deliveries < delivery.max_deliveries:
                continue
            if self._members[lease.member].alive_until(delivery.ack_timeout_ms) > now_ms:
                continue
            waiting = window.leased_as(message_id)
            if any(
                reach.wants(waiting)
                and self.may_take_over(key, lease, message_id, client_of(reach.name))
                for reach in self.reaching(key)
            ):
                done += self.leave_copy(key, message_id)
                window.forget_holders(lease.holders)
                window.remove(message_id)
                done += self.given_up(offset, key, waiting, too_often(lease.deliveries), now_ms)
        return done
