"""What a plug-in adds to the service: routes, settings, work beside the event loop, and
a look at each answered search.

The packages name no plug-in; `app.core.plugins` finds those that are installed.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from fastapi import Request

from app.api.guard import CALLER
from app.api.routing import Routes, collection_of, state_of
from app.core.metrics import Metrics
from app.core.plugins import find_plugins
from app.core.settings import PluginSettings, Settings, read_settings
from app.search.query import Query
from app.search.results import SearchResponse

P = TypeVar("P", bound="RoutesPlugin")


@dataclass(frozen=True)
class SearchContext:
    """Where a search came from.

    caller: name of the API key, or "". collection: named in the path; None is the
    default one.
    """

    request: Request
    caller: str
    collection: str | None
    has_image: bool


class RoutesPlugin:
    """A plug-in of the service. Each process of the service makes one object of it.

    routes: added to those of the service. settings_model: read from the environment at
    start, into `settings`.
    """

    routes: ClassVar[Routes]
    settings_model: ClassVar[type[PluginSettings] | None] = None

    def __init__(self, service: Settings, settings: Any, metrics: Metrics) -> None:
        self.service = service
        self.settings = settings
        self.metrics = metrics

    @classmethod
    def of(cls: type[P], request: Request) -> P:
        """Return the object that the service of a request made."""
        return cast(P, state_of(request).plugins[cls])

    def start(self) -> None:
        """Begin work, in the running event loop."""

    async def close(self) -> None:
        """End it. Requests are finished by then."""

    def on_search(
        self,
        query: Query,
        response: SearchResponse,
        context: SearchContext,
    ) -> None:
        """Look at an answered search, or add to its response. The response waits."""


def make_plugins(
    service: Settings, metrics: Metrics
) -> dict[type[RoutesPlugin], RoutesPlugin]:
    """Return an object of each installed plug-in by its class. Raise DcarError if a
    setting is wrong.
    """
    made: dict[type[RoutesPlugin], RoutesPlugin] = {}
    for kind in find_plugins():
        settings = None
        if kind.settings_model is not None:
            settings = read_settings(kind.settings_model)
        made[kind] = kind(service, settings, metrics)
    return made


def report_search(
    request: Request,
    query: Query,
    response: SearchResponse,
    *,
    has_image: bool,
) -> None:
    """Show an answered search to the plug-ins."""
    caller = request.scope.get(CALLER, "")
    context = SearchContext(request, caller, collection_of(request), has_image)
    for plugin in state_of(request).plugins.values():
        plugin.on_search(query, response, context)
