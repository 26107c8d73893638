"""Names of leases: commands carry them to bridges, and reports carry them back."""

from __future__ import annotations

import pytest

from millpond.schemas.errors import DecodeError
from millpond.schemas.keys import Partition
from millpond.schemas.leases import LeaseName, lease_name, parse_lease


def test_the_name_of_a_lease_has_agent_partition_and_number() -> None:
    name = lease_name(Partition("app", "queue", 7), 18_823)
    assert name == "queue/7/18823" == str(LeaseName("queue", 7, 18_823))
    assert parse_lease(name) == LeaseName("queue", 7, 18_823)


@pytest.mark.parametrize(
    "name",
    ["", "queue", "queue/7", "queue/7/1/2", "other/7/1", "queue/x/1", "queue/7/-1", "queue/7/²", "queue/7/" + "1" * 19],
)  # fmt: skip
def test_any_other_name_raises_decode_error(name: str) -> None:
    with pytest.raises(DecodeError, match="not the name of a lease"):
        parse_lease(name)
