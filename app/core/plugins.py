"""Plug-ins of the service: entry points of the group `dcar.routes`."""

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from dcar_core.util.errors import DcarError

GROUP = "dcar.routes"


@cache
def find_plugins() -> tuple[type[Any], ...]:
    """Return the installed subclasses of `app.api.plugins.RoutesPlugin`. Raise
    DcarError if one cannot be loaded.
    """
    found = []
    for entry in entry_points(group=GROUP):
        try:
            found.append(entry.load())
        except Exception as error:
            raise DcarError(
                f"the plug-in {entry.value} cannot be loaded ({error}); update or"
                " uninstall it"
            ) from error
    return tuple(found)
