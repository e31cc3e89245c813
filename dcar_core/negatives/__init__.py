"""Hard negative captions from two perspectives, for pairs that have none (section 3 of the method).

samples --taxonomy--> categories, most similar first --generate--> negatives --complete--> samples with negatives
"""

from dcar_core.negatives.complete import complete, fill
from dcar_core.negatives.views import views

__all__ = ["complete", "fill", "views"]
