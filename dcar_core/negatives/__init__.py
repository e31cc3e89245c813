"""Hard negative captions, generated for pairs that have none (section 3 of the method).

    samples --rank_categories--> similar categories --generate--> negatives --> samples
    with negatives

In: samples with captions and categories. Out: the same samples with negative captions.
`training`, `evaluation` and the CLI import it; it imports `data`, `model` and `util`.
"""

from dcar_core.negatives.complete import (
    LETTER_FUNCTIONS,
    add_negatives,
    backbone_functions,
)

__all__ = ["LETTER_FUNCTIONS", "add_negatives", "backbone_functions"]
