"""A Redis that comes back without its last writes: an image of its keys, put back."""

from __future__ import annotations

from dataclasses import dataclass

from app import redis_client as keys
from tests.property.simulation.processes import Arena


@dataclass(frozen=True, slots=True)
class Image:
    """Every key as it was, and the id that history had come to."""

    values: dict[bytes, bytes]
    last_id: int

    @classmethod
    async def taken(cls, arena: Arena) -> Image:
        """The keys as they are now."""
        names = [key async for key in arena.redis.scan_iter()]
        async with arena.redis.pipeline(transaction=True) as pipeline:
            for name in names:
                pipeline.dump(name)
            pipeline.get(keys.HISTORY_LAST_ID)
            *values, last_id = await pipeline.execute()
        return cls(dict(zip(names, values, strict=True)), int(last_id))

    async def put_back(self, arena: Arena) -> None:
        """Make Redis what it was, whatever came after."""
        async with arena.redis.pipeline(transaction=True) as pipeline:
            pipeline.flushdb()
            for name, value in self.values.items():
                pipeline.restore(name, 0, value)
            await pipeline.execute()


async def lost_tail(arena: Arena, image: Image) -> bool:
    """Put ``image`` back, if all that came after it is in Postgres; whether it was."""
    last_id = int(await arena.redis.get(keys.HISTORY_LAST_ID) or 0)
    tables = ("trades", "transfers", "liquidations", "recoveries", "adjustments")
    counted = " + ".join(f"(SELECT count(*) FROM {table} WHERE id > {image.last_id})" for table in tables)
    ((recorded,),) = await arena.rows(f"SELECT {counted}")
    if recorded < last_id - image.last_id:
        return False
    await image.put_back(arena)
    return True
