"""Client of a DCAR image search service, synchronous (`Client`) and asynchronous
(`AsyncClient`).

from dcar_client import Client

with Client("http://127.0.0.1:8000") as client:
    for result in client.search_text("crying cat", k=3).results:
        print(result.score, result.id, result.caption)
"""

from dcar_client import models
from dcar_client.calls import ItemFields, NewEvent, NewItem, NewQuery
from dcar_client.client import AsyncClient, Client
from dcar_client.errors import ServiceError
from dcar_client.models import *  # noqa: F403

__all__ = [
    "AsyncClient",
    "Client",
    "ItemFields",
    "NewEvent",
    "NewItem",
    "NewQuery",
    "ServiceError",
]
__all__ += models.__all__
