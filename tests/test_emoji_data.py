"""The bundled data of the emoji example: what training may read, and the record of the bundled checkpoints."""

import json
from typing import Any

import pytest

from tests.support.paths import ROOT

EMOJI = ROOT / "examples" / "emoji"
DOMAINS = ("twemoji", "openmoji")


def read(domain: str, split: str) -> list[dict[str, Any]]:
    return list(json.loads((EMOJI / domain / f"{split}.json").read_text(encoding="utf-8")).values())


def captions(domain: str, split: str) -> set[str]:
    positives = [pair["positive"] for pair in read(domain, split)]
    return {text for positive in positives for text in ([positive] if isinstance(positive, str) else positive)}


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("split", "unseen"), [("train", "val"), ("train", "test"), ("val", "test")])
def test_negatives_are_no_captions_of_a_later_split(domain: str, split: str, unseen: str) -> None:
    negatives = {text for pair in read(domain, split) for text in pair["negative"]}
    assert len(negatives) > 500
    assert not negatives & captions(domain, unseen)
