"""The domains that one process serves: by name, an index with its own checkpoint, over one backbone in memory.

- The default collection is DCAR_INDEX, named after its directory; routes without a name mean it.
- Backbone and encoders are shared through what is loaded: a collection costs its trainables and its index.
- The service is ready when each collection has been loaded, and stays so when one cannot follow a new version.
"""

import asyncio
from collections.abc import Callable, Iterator

from app.core.problems import NotReady, Problem
from app.core.settings import Settings
from app.search.snapshots import Snapshot, Snapshots
from dcar_core.util.errors import DcarError


class Collections:
    """All collections; the default one comes first."""

    def __init__(self, settings: Settings, *, on_start_failure: Callable[[DcarError], None] | None = None) -> None:
        turn = asyncio.Lock()
        self._all = {
            name: Snapshots(index, settings, loaded=self._loaded, turn=turn, on_start_failure=on_start_failure)
            for name, index in settings.indexes.items()
        }
        self.default = next(iter(self._all))
        self.draining = False  # about to end: still answers, but says that it is not ready

    def __iter__(self) -> Iterator[tuple[str, Snapshots]]:
        return iter(self._all.items())

    def __getitem__(self, name: str | None) -> Snapshots:
        """A collection; None is the default.

        Raises:
            Problem: there is none of this name.
        """
        found = self._all.get(self.default if name is None else name)
        if found is None:
            known = ", ".join(self._all)
            message = f"there is no collection {str(name)[:200]!r}; there are: {known}"
            raise Problem(404, message[:1].upper() + message[1:], errors=[("collection", message)])
        return found

    def require_all(self) -> None:
        """Nothing happens when every collection can answer.

        Raises:
            NotReady: one cannot; the message is its reason.
        """
        for name, snapshots in self:
            if snapshots.live is None:
                where = "" if len(self._all) == 1 else f"{name}: "
                raise NotReady(where + (snapshots.reason or "The model is being loaded."))

    @property
    def reason(self) -> str | None:
        """Why some collection is not at its published version; None when all are."""
        reasons = [
            snapshots.reason if len(self._all) == 1 else f"{name}: {snapshots.reason}"
            for name, snapshots in self
            if snapshots.reason is not None
        ]
        return "; ".join(reasons) or None

    def start(self) -> None:
        """Load every collection, one after the other, and begin to poll, in the background."""
        for _, snapshots in self:
            snapshots.start()

    async def close(self) -> None:
        """Stop polling."""
        await asyncio.gather(*(snapshots.close() for _, snapshots in self))

    async def reload(self) -> dict[str, bool]:
        """Serve what is published; says by name what has changed.

        Raises:
            DcarError: of those collections that cannot be loaded, after all have been tried.
        """
        changed: dict[str, bool] = {}
        failed: list[str] = []
        for name, snapshots in self:
            try:
                changed[name] = await snapshots.reload()
            except DcarError as error:
                failed.append(str(error) if len(self._all) == 1 else f"{name}: {error}")
        if failed:
            raise DcarError("; ".join(failed))
        return changed

    def _loaded(self) -> list[Snapshot]:
        return [snapshots.live for _, snapshots in self if snapshots.live is not None]
