"""CLIP's vocabulary, parsed and hashed once a process.

Both take most of the time in which a tiny model loads, and the suite loads hundreds. Other vocabularies are left alone.
"""

from typing import Any

import pytest
from open_clip import tokenizer as open_clip_tokenizer

from dcar_core.model import backbone


def share_vocabulary(patch: pytest.MonkeyPatch) -> None:
    """Let tokenizers with CLIP's own vocabulary share it; each has its own cache of words."""
    stock = open_clip_tokenizer.SimpleTokenizer()
    parse, vocabulary = open_clip_tokenizer.SimpleTokenizer.__init__, backbone._vocabulary
    digest, special = vocabulary(stock), dict(stock.cache)

    def shared(self: Any, *args: Any, **options: Any) -> None:
        if args or options.keys() - {"context_length"}:
            parse(self, *args, **options)
            return
        self.__dict__.update(stock.__dict__ | {"cache": dict(special)} | options)

    patch.setattr(open_clip_tokenizer.SimpleTokenizer, "__init__", shared)
    patch.setattr(
        backbone,
        "_vocabulary",
        lambda given: digest if getattr(given, "encoder", None) is stock.encoder else vocabulary(given),
    )
