"""FILIP (Yao et al. 2022): every weight, by late interaction of words and patches in the contrastive loss.

FILIP also searches by late interaction. Here vectors are searched, so they are half of the loss [ours]; all else is
FLYP's, for a comparison of the losses alone.
"""

from dataclasses import replace

from dcar_core.model.methods import flyp
from dcar_core.model.methods.method import CONTRASTIVE, plain_config

METHODS = (replace(flyp.METHODS[0], config=replace(plain_config("filip"), loss=replace(CONTRASTIVE, late=0.5))),)
