"""The cost of confirmation on a Redis Cluster: `python -m tests.benchmarks.cluster`.

One partition stores batches on three shards, once without replicas and once with one replica each. The replicas run on
the same machine, so the time contains their work, and no network.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from millpond.agents.effects import SetState
from millpond.pipeline.stores.redis.cluster_store import ClusterStore
from millpond.pipeline.stores.redis.connection import Access, Address
from tests.contracts.store_worlds import PARTITION, commit, kept, transaction
from tests.support.redis_servers import RedisProcess, cluster_processes, replicated_cluster

BATCHES, SIZES = 60, (1, 50, 500)


async def measure(nodes: Sequence[RedisProcess]) -> dict[int, float]:
    """Return the median time of a commit in ms, by the number of messages in it."""
    store = ClusterStore(PARTITION, [Address("127.0.0.1", each.port) for each in nodes], Access())
    await store.load()
    found, sequence, offset = {}, 0, 0
    for size in SIZES:
        times = []
        for _ in range(BATCHES):
            sequence, offset = sequence + 1, offset + size
            places = range(offset - size, offset)
            messages = [kept(at, f"m{at}", f"t/{at % 40}") for at in places]
            begun = time.perf_counter()
            await commit(store, transaction(sequence, *messages, SetState("t", b"s")))
            times.append(time.perf_counter() - begun)
        found[size] = median(times) * 1000
    await store.close()
    return found


def main() -> None:
    """Print a line for each size."""
    with tempfile.TemporaryDirectory() as name:
        with cluster_processes(Path(name) / "alone") as nodes:
            alone = asyncio.run(measure(nodes))
        with replicated_cluster(Path(name) / "replicated") as shards:
            confirmed = asyncio.run(measure([each.primary for each in shards]))
    for size in SIZES:
        print(
            f"{size} messages: {alone[size]:.2f} ms alone, {confirmed[size]:.2f} ms confirmed by replicas"
        )


if __name__ == "__main__":
    main()
