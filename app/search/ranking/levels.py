"""Levels: how likely a result fits, by the cut-off that the index build has calibrated.

- A result is likely if its score reaches the cut-off, or if the item contains the words of the query.
- The scores of a query whose words no item has say little. It needs a strong score, and its other results that reach
  the cut-off are possible.
- Without a cut-off, and for queries that are not by text alone, every result is possible.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from app.search.plan import Plan
from app.search.query import Level
from app.search.ranking.rank import RankedRow
from index_jobs.store.artifact import Artifact

FAMILIAR = 0.5  # share of the query's words that items have, from which on its scores count
_CONTAINED = 0.6  # share of the words, by their rarity, from which on an item fits whatever its image shows
_NEAR_SPELLING = 0.4  # the same where no item has the words


@dataclass(frozen=True, slots=True)
class Levels:
    """The limits of the levels of one query. cutoff: score of a likely result; None if results cannot be judged."""

    cutoff: float | None = None
    possible: float = -math.inf
    contained: float = math.inf

    def of(self, ranked: RankedRow) -> Level:
        """Return the level of a result. Scores are compared as responses round them."""
        if self.cutoff is None:
            return "possible"
        score = round(ranked.score, 6)
        if score >= self.cutoff or (ranked.text_score or 0.0) >= self.contained:
            return "likely"
        return "possible" if score >= self.possible else "unlikely"

    def none_fits(self, ranked: Iterable[RankedRow]) -> bool:
        """Return True if results can be judged and none is likely."""
        return self.cutoff is not None and all(self.of(each) != "likely" for each in ranked)


def find_levels(artifact: Artifact, plan: Plan, ranked: list[RankedRow]) -> Levels:
    """Return the limits for the results of a plan. ranked: from the first one on."""
    cutoff, strong = (artifact.manifest.cutoff.get(name) for name in ("min_score", "strong_score"))
    if cutoff is None or not plan.is_judged:
        return Levels()
    best = max((each.score for each in ranked), default=math.inf)
    lexical = artifact.lexical if strong is not None and best < strong else None
    if lexical is not None and lexical.known_share(plan.query.query) < FAMILIAR:
        return Levels(strong, cutoff, _NEAR_SPELLING)
    return Levels(cutoff, cutoff, _CONTAINED)
