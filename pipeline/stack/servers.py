"""Whether a Kafka or a Redis answers a request."""

from __future__ import annotations

import contextlib

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from millpond.pipeline.settings import KafkaSettings


async def kafka_answers(settings: KafkaSettings) -> bool:
    """True if Kafka answers a metadata request."""
    admin = AIOKafkaAdminClient(**settings.client_options(), request_timeout_ms=2_000)
    try:
        await admin.start()
        await admin.describe_cluster()
    except (KafkaError, OSError):
        return False
    finally:
        with contextlib.suppress(KafkaError, OSError):
            await admin.close()
    return True


async def redis_answers(url: str) -> bool:
    """True if Redis answers PING."""
    client: Redis = Redis.from_url(url)
    try:
        return bool(await client.ping())
    except (RedisError, OSError):
        return False
    finally:
        await client.aclose()
