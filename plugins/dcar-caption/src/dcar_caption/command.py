"""The command `dcar data caption`. Nothing heavy is imported before it runs."""

from typing import Any

from dcar_caption.options import CaptionOptions
from dcar_core.util.options import with_options


@with_options(CaptionOptions)
def caption(**options: Any) -> int:
    """Caption images with a vision model, and write annotations for training.

    Keys come from the environment: DCAR_CAPTION_API_KEY, and DCAR_JUDGE_API_KEY for a
    judge at another endpoint. An interrupted run resumes with the same command and
    repeats no request.
    """
    from dcar_caption.run import caption_images

    run = caption_images(CaptionOptions(**options))
    print(run.summary())
    return int(bool(run.failed) or not run.accepted)
