"""From a pool of the configuration to a store."""

from __future__ import annotations

from typing import Any

from millpond.agents.ports import Store
from millpond.pipeline.stores.redis.cluster_store import ClusterStore
from millpond.pipeline.stores.redis.location import access_of, addresses, connector
from millpond.pipeline.stores.redis.store import RedisStore
from millpond.schemas.keys import Partition
from millpond.schemas.rules.pool import Pool


def open_store(pool: Pool, partition: Partition) -> Store[Any]:
    """Return the store of a partition in a pool. Nothing connects before `load`.

    Raises:
        ConfigError: the password file or certificate file of the pool cannot be read.
    """
    if pool.type == "cluster":
        return ClusterStore(partition, addresses(pool), access_of(pool))
    return RedisStore(partition, connector(pool))
