"""Two collections' results side by side."""

from typing import Any

import pytest

from tests.support.page import Page, searched, until

pytestmark = pytest.mark.browser


def choose(page: Page, select: str, name: str) -> None:
    (option,) = [each for each in page.all(f"#{select} option") if each.text == name]
    option.click()


def others(page: Page, count: int) -> list[Any]:
    until(lambda: len(page.all("#others .card")) == count and not page.all("#results[aria-busy]"))
    return page.all("#others .card")


def marks(cards: list[Any]) -> list[str]:
    return [card.find_element("css selector", ".place").text for card in cards]


def test_two_models_over_one_gallery_are_compared(page: Page, site: str, many: str) -> None:
    page.open(f"{site}/#q=red")
    page.settled(24)
    assert not page.has("#versus"), "there is no other collection"
    page.open(f"{many}/#q=a+red+circle")
    page.settled(24)
    assert not page.has("#other")
    assert not page.has("#results .place")
    choose(page, "beside", "another")
    there, here = others(page, 12), page.settled(12)
    assert "beside=another" in page.url
    assert [page.text("#results-name"), page.text("#other-name")] == ["shapes", "another"]
    assert page.text("#status").startswith("The best 12 of 24 images")
    ids = [searched(f"{many}{path}", query="a red circle", k=12) for path in ("", "/collections/another")]
    for cards, (mine, yours) in ((here, ids), (there, ids[::-1])):
        assert [card.get_attribute("data-id") for card in cards] == mine
        gains = [yours.index(each) - place if each in yours else None for place, each in enumerate(mine)]
        words = {None: "only here", 0: "="}
        assert marks(cards) == [words.get(gain) or f"{'↑' if gain > 0 else '↓'} {abs(gain)}" for gain in gains]  # type: ignore[operator, arg-type]
    assert {"only here"} < {*marks(here), *marks(there)}, "the lists differ in part"
    first, title = ids[0][0], here[0].find_element("css selector", ".place").get_attribute("title")
    ranked = f"rank {ids[1].index(first) + 1} in another" if first in ids[1] else "not in the first 12 of another"
    assert title == ranked

    link = page.url
    page.detail(of="#others")
    assert "of=another" in page.url
    page.similar(12)  # same gallery: both lists stay
    others(page, 12)
    assert f"item={ids[1][0]}" in page.url
    assert page.value("#collection") == "shapes"
    page.driver.back()
    page.appears("#detail")
    page.driver.back()
    until(lambda: page.url == link)
    others(page, 12)
    page.driver.back()
    page.vanishes("#other")
    page.open(link)
    others(page, 12)
    choose(page, "collection", "another")  # the sides swap
    page.says("#results-name", "another")
    page.says("#other-name", "shapes")


def test_two_galleries_are_compared(page: Page, many: str) -> None:
    page.open(f"{many}/#q=red&beside=circles")
    page.settled(12)
    cards = others(page, 6)
    assert not any(marks([*cards, *page.all("#results .card")])), "no item is in both"
    page.click("#results .select")
    assert page.one("#selected-less").is_enabled()
    page.click("#others .select", 1)  # the selection is of one gallery
    assert page.text("#selected-count") == "1 selected"
    assert [len(page.all(f"{place} .selected")) for place in ("#results", "#others")] == [0, 1]
    less = page.one("#selected-less")
    assert not less.is_enabled()
    assert less.get_attribute("title") == "These images are not in “shapes”, which is searched"
    page.detail(of="#others")
    assert not page.has("#less")
    page.close()
    chosen = cards[1].get_attribute("data-id")
    page.click("#selected-more")
    page.settled(5)
    assert page.url.endswith(f"#in=circles&beside=shapes&item={chosen}")
    assert not page.has("#error")
    assert ["422" in message for message in page.errors()] == [True], "the gallery beside has no such item"

    page.open(f"{many}/#q=red&beside=circles")
    page.settled(12)
    caption = others(page, 6)[0].find_element("css selector", ".caption").text
    page.detail(of="#others")
    page.similar(5)
    assert page.value("#collection") == "circles"
    page.says("#chips", caption)
    page.says("#other-status", "no item")
    assert page.all("#others .card") == []
    assert not page.has("#error")
    page.open(f"{many}/#q=red&beside=gone")
    page.says("#error", "no gallery “gone”")
    assert not page.has("#other")
