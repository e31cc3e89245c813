"""Beginning and end of a tokenized text, by the ids of its tokenizer.

Every method takes NumPy arrays and PyTorch tensors alike, so that runtimes without PyTorch follow the same rule. A text
ends at its first end token: the largest id marks the end in CLIP's vocabulary alone.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextLayout:
    """One tokenized text: start tokens, caption, end token, padding.

    context_length: L, the most positions, prompts included.
    start_ids: tokens before the caption; prompts follow them.
    reads_padding: the tower attends to padding or reads the last row, so it needs texts of the whole context.
    """

    context_length: int
    start_ids: tuple[int, ...]
    end_id: int
    pad_id: int
    reads_padding: bool = False

    @property
    def start(self) -> int:
        """Position of the first prompt or caption token."""
        return len(self.start_ids)

    def lengths(self, tokens: Any) -> Any:
        """(B, n) -> (B,): tokens up to the end token, which is included."""
        before_end = (tokens == self.end_id).cumsum(-1) == 0
        return (before_end.sum(-1) + 1).clip(max=tokens.shape[-1])

    def caption_mask(self, tokens: Any) -> Any:
        """(B, n) -> bool (B, n): the caption's own tokens, without start, end and padding."""
        before_end = (tokens == self.end_id).cumsum(-1) == 0
        position = (tokens == tokens).cumsum(-1) - 1
        return before_end & (position >= self.start)

    def padded_length(self, prompt_tokens: int) -> int | None:
        """Length that texts must have beside this many prompts; None where they may be trimmed."""
        return self.context_length - prompt_tokens if self.reads_padding else None
