"""Several collections: one chosen, and two side by side."""

from typing import Any

import pytest

from tests.support.page import Page, searched, until

pytestmark = pytest.mark.browser


def choose(page: Page, select: str, name: str) -> None:
    page.click(f"#{select} option[value='{name}']")


def others(page: Page, count: int) -> list[Any]:
    until(
        lambda: (
            len(page.all("#others .card")) == count
            and not page.all("#results[aria-busy]")
        )
    )
    return page.all("#others .card")


def test_collection_can_be_chosen(page: Page, site: str, many: str) -> None:
    page.open(site, 24)
    assert not page.has("#where"), "there is only one collection"
    page.open(many)
    page.appears("#where")
    assert page.texts("#collection option") == [
        "shapes",
        "circles",
        "another",
        "products",
    ]
    page.type("#query", "red")
    page.settled(24)
    choose(page, "collection", "circles")
    page.settled(6)
    assert "in=circles" in page.url
    assert page.value("#query") == "red"
    page.detail()
    page.similar(5)
    assert "/collections/circles/" in page.one(".chip img").get_attribute("src")
    link = page.url
    page.back(2)
    page.settled(6)
    page.back()
    page.settled(24)
    assert page.value("#collection") == "shapes"
    page.open(link, 5)
    assert page.value("#collection") == "circles"
    page.open(f"{many}/#q=red&in=gone")
    page.says("#error", "no gallery “gone”")
    # as after a reload, which loses the image
    page.open(f"{many}/#picture=1&q=red&in=circles", 6)
    assert not page.has("#error")
    assert "picture" not in page.url


def test_two_models_over_one_gallery_are_compared(
    page: Page,
    site: str,
    many: str,
) -> None:
    page.open(f"{site}/#q=red", 24)
    assert not page.has("#versus"), "there is no other collection"
    page.open(f"{many}/#q=a+red+circle", 24)
    assert not page.has("#other")
    assert not page.has("#results .place")
    choose(page, "beside", "another")
    others(page, 12)
    page.settled(12)
    assert "beside=another" in page.url
    assert page.text("#results-name") == "shapes"
    assert page.text("#other-name") == "another"
    assert page.text("#status").startswith("The best 12 of 24 images")
    ids = [
        searched(f"{many}{path}", query="a red circle", k=12)
        for path in ("", "/collections/another")
    ]
    marks = []
    for place, (mine, yours) in (("#results", ids), ("#others", ids[::-1])):
        assert [
            card.get_attribute("data-id") for card in page.all(f"{place} .card")
        ] == mine
        gains = [
            yours.index(each) - rank if each in yours else None
            for rank, each in enumerate(mine)
        ]
        marks += [
            (
                "only here"
                if gain is None
                else "="
                if gain == 0
                else f"{'↑' if gain > 0 else '↓'} {abs(gain)}"
            )
            for gain in gains
        ]
    assert page.texts("#results .place") + page.texts("#others .place") == marks
    assert {"only here"} < {*marks}, "the lists differ in part"

    link = page.url
    page.detail(of="#others")
    assert "of=another" in page.url
    page.similar(12)  # same gallery: both lists stay
    others(page, 12)
    assert f"item={ids[1][0]}" in page.url
    assert page.value("#collection") == "shapes"
    page.open(link)
    others(page, 12)
    choose(page, "collection", "another")  # the sides swap
    page.says("#results-name", "another")
    page.says("#other-name", "shapes")


def test_two_galleries_are_compared(page: Page, many: str) -> None:
    page.open(f"{many}/#q=red&beside=circles", 12)
    cards = others(page, 6)
    assert not any(page.texts(".card .place")), "no item is in both"
    page.click("#results .select")
    assert page.one("#selected-less").is_enabled()
    page.click("#others .select", 1)  # the selection is of one gallery
    assert page.text("#selected-count") == "1 selected"
    assert [
        len(page.all(f"{place} .selected")) for place in ("#results", "#others")
    ] == [0, 1]
    less = page.one("#selected-less")
    assert not less.is_enabled()
    assert (
        less.get_attribute("title")
        == "These images are not in “shapes”, which is searched"
    )
    page.detail(of="#others")
    assert not page.has("#less")
    page.close()
    chosen = cards[1].get_attribute("data-id")
    page.click("#selected-more")
    page.settled(5)
    assert page.url.endswith(f"#in=circles&beside=shapes&item={chosen}")
    assert not page.has("#error")
    assert ["422" in message for message in page.errors()] == [True], (
        "the gallery beside has no such item"
    )

    page.open(f"{many}/#q=red&beside=gone")
    page.says("#error", "no gallery “gone”")
    assert not page.has("#other")
