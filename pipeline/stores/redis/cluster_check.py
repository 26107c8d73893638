"""A check of a Redis Cluster: does every shard have a replica? Workers ask at their start, `millpond config check` too."""

from __future__ import annotations

from millpond.pipeline.stores.redis.location import access_of, addresses
from millpond.pipeline.stores.redis.nodes import Nodes
from millpond.schemas.rules.pool import Pool


async def cluster_weaknesses(pool: Pool) -> list[str]:
    """Return what weakens the guarantees of a cluster, as sentences. Nothing for other kinds of pools.

    Raises:
        StoreDown, StoreRefused: no node answers, or one refuses the user.
    """
    if pool.type != "cluster":
        return []
    nodes = Nodes(addresses(pool), access_of(pool))
    try:
        await nodes.discover()
    finally:
        await nodes.close()
    alone = nodes.without_replicas
    if not alone:
        return []
    named = ", ".join(map(str, alone))
    loss = (
        f"no replica of {named} in the cluster: if such a node loses data, its stored messages are lost for good,"
        " because other nodes still have the applied offset; give every shard a replica"
    )
    return [loss]
