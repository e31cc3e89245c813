"""Two collections' results side by side on the page."""

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
    assert not page.one("#versus").is_displayed(), "there is no other collection"

    page.open(f"{many}/#q=a+red+circle")
    page.settled(24)
    assert not page.one("#other").is_displayed()
    assert not page.one("#results .place").is_displayed()
    choose(page, "beside", "another")
    there = others(page, 12)
    here = page.settled(12)
    assert "beside=another" in page.driver.current_url
    assert [page.one("#results-name").text, page.one("#other-name").text] == ["shapes", "another"]
    assert page.one("#status").text.startswith("The best 12 of 24 images")
    ids = [searched(f"{many}{path}", query="a red circle", k=12) for path in ("", "/collections/another")]
    for cards, (mine, yours) in ((here, ids), (there, ids[::-1])):
        assert [card.get_attribute("data-id") for card in cards] == mine
        expected = []
        for place, each in enumerate(mine):
            gain = yours.index(each) - place if each in yours else None
            expected.append(
                "only here" if gain is None else "=" if not gain else f"{'↑' if gain > 0 else '↓'} {abs(gain)}"
            )
        assert marks(cards) == expected
    assert {"only here"} < {*marks(here), *marks(there)}, "the lists differ in part"
    title = here[0].find_element("css selector", ".place").get_attribute("title")
    assert title == (f"rank {ids[1].index(ids[0][0]) + 1} in another" if ids[0][0] in ids[1]
                     else "not in the first 12 of another")  # fmt: skip
    address = page.driver.current_url

    there[0].find_element("css selector", ".open").click()
    until(lambda: page.one("#detail").is_displayed())
    assert "of=another" in page.driver.current_url
    page.one("#similar").click()  # same gallery: both lists stay
    until(lambda: "item=" in page.driver.current_url)
    page.settled(12)
    others(page, 12)
    assert f"item={ids[1][0]}" in page.driver.current_url
    assert page.one("#collection").get_attribute("value") == "shapes"
    page.driver.back()
    until(lambda: page.one("#detail").is_displayed())
    page.driver.back()
    until(lambda: page.driver.current_url == address)
    others(page, 12)
    page.driver.back()
    until(lambda: not page.one("#other").is_displayed())
    page.open(address)  # as a shared link
    others(page, 12)
    choose(page, "collection", "another")  # the sides swap
    until(lambda: page.one("#results-name").text == "another" and page.one("#other-name").text == "shapes")


def test_two_galleries_are_compared(page: Page, many: str) -> None:
    page.open(f"{many}/#q=red&beside=circles")
    page.settled(12)
    cards = others(page, 6)
    assert not any(marks([*cards, *page.all("#results .card")])), "no item is in both"
    caption = cards[0].find_element("css selector", ".caption").text
    cards[0].find_element("css selector", ".open").click()
    until(lambda: page.one("#detail").is_displayed())
    page.one("#similar").click()
    page.settled(5)
    assert page.one("#collection").get_attribute("value") == "circles"
    until(lambda: caption in page.one("#chips").text)
    until(lambda: "no item" in page.one("#other-status").text)
    assert page.all("#others .card") == []
    assert not page.one("#error").is_displayed()
    page.open(f"{many}/#q=red&beside=gone")
    until(lambda: "no gallery “gone”" in page.one("#error").text)
    assert not page.one("#other").is_displayed()


def test_selected_images_are_searched_in_their_gallery(page: Page, many: str) -> None:
    page.open(f"{many}/#q=red&beside=circles")
    page.settled(12)
    cards = others(page, 6)
    page.all("#results .select")[0].click()
    assert page.one("#selected-less").is_enabled()
    page.all("#others .select")[1].click()  # the selection is of one gallery
    assert page.one("#selected-count").text == "1 selected"
    assert [len(page.all(f"{place} .selected")) for place in ("#results", "#others")] == [0, 1]
    assert not page.one("#selected-less").is_enabled()
    assert page.one("#selected-less").get_attribute("title") == "These images are not in “shapes”, which is searched"
    cards[0].find_element("css selector", ".open").click()
    until(lambda: page.one("#detail").is_displayed())
    assert not page.one("#less").is_displayed()
    page.one("#close").click()
    until(lambda: not page.one("#detail").is_displayed())
    chosen = cards[1].get_attribute("data-id")
    page.one("#selected-more").click()
    page.settled(5)
    assert page.driver.current_url.endswith(f"#in=circles&beside=shapes&item={chosen}")
    assert not page.one("#error").is_displayed()
    assert ["422" in message for message in page.errors()] == [True], "the gallery beside has no such item"
