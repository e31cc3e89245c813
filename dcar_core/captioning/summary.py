"""How a captioning run ended, in lines for a person."""

from dcar_core.captioning.options import CaptioningResult
from dcar_core.data.report import shorten


def summarize(found: CaptioningResult) -> str:
    """What was accepted, what was not and why, what it took, and what to do next."""
    rejected = found.out.with_name(f"{found.out.stem}.rejected.jsonl")
    lines = [f"{found.out}: {found.accepted:,} captions"]
    if found.rejected:
        lines.append(f"{sum(found.rejected.values()):7,} drafts rejected, kept in {rejected.name}:")
        lines += [f"{number:11,} {reason}" for reason, number in found.rejected.most_common()]
    for what, names in (
        ("pictures given up, all drafts rejected", found.given_up),
        ("pictures in no category's folder, left out", found.loose),
        ("pictures broken, left out", [f"{name} ({why})" for name, why in sorted(found.broken.items())]),
        ("pictures failed, the same command asks again", [f"{n} ({why})" for n, why in sorted(found.failed.items())]),
    ):
        if names:
            lines.append(f"{len(names):7,} {what}: {shorten(names)}")
    for asked, usage in sorted(found.usage.items()):
        unknown = f", {usage.unknown:,} answers did not say how many" if usage.unknown else ""
        lines.append(f"{usage.requests:7,} {asked} answers, {usage.tokens_in:,} + {usage.tokens_out:,} tokens{unknown}")
    if found.cost is not None:
        lines.append(f"cost {found.cost:.4f}" + (" at least" if any(u.unknown for u in found.usage.values()) else ""))
    return "\n".join(lines)
