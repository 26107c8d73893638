"""The names of leases: what bridges report, and who hears of it."""

from __future__ import annotations

import pytest

from millpond.schemas.errors import DecodeError
from millpond.schemas.keys import Partition
from millpond.schemas.leases import LeaseName, lease_name, parse_lease


def test_a_lease_is_named_after_who_gave_it_out() -> None:
    name = lease_name(Partition("app", "queue", 7), 18_823)
    assert name == "queue/7/18823" == str(LeaseName("queue", 7, 18_823))
    assert parse_lease(name) == LeaseName("queue", 7, 18_823)


@pytest.mark.parametrize(
    "name",
    ["", "queue", "queue/7", "queue/7/1/2", "nobody/7/1", "queue/x/1", "queue/7/-1", "queue/7/²", "queue/7/" + "1" * 19],
)  # fmt: skip
def test_anything_else_is_a_decode_error(name: str) -> None:
    with pytest.raises(DecodeError, match="not the name of a lease"):
        parse_lease(name)
