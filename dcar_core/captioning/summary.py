"""Text summary of a captioning run."""

from dcar_core.captioning.options import CaptioningResult
from dcar_core.data.report import shorten


def summarize(result: CaptioningResult) -> str:
    """Format the accepted and rejected drafts, problem images, token usage and cost."""
    rejected = result.out.with_name(f"{result.out.stem}.rejected.jsonl")
    lines = [f"{result.out}: {result.accepted:,} captions"]
    if result.rejected:
        lines.append(f"{sum(result.rejected.values()):7,} drafts rejected, kept in {rejected.name}:")
        lines += [f"{number:11,} {reason}" for reason, number in result.rejected.most_common()]
    for what, names in (
        ("images given up, all drafts rejected", result.given_up),
        ("images outside of category folders, left out", result.loose),
        ("images unreadable, left out", [f"{name} ({why})" for name, why in sorted(result.broken.items())]),
        ("images failed, retried by the same command", [f"{n} ({why})" for n, why in sorted(result.failed.items())]),
    ):
        if names:
            lines.append(f"{len(names):7,} {what}: {shorten(names)}")
    for asked, usage in sorted(result.usage.items()):
        unknown = f", {usage.unknown:,} responses without token counts" if usage.unknown else ""
        lines.append(
            f"{usage.requests:7,} {asked} responses, {usage.tokens_in:,} + {usage.tokens_out:,} tokens{unknown}"
        )
    if result.cost is not None:
        lines.append(f"cost {result.cost:.4f}" + (" at least" if any(u.unknown for u in result.usage.values()) else ""))
    return "\n".join(lines)
