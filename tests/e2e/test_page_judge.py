"""The page on which a person grades results, opened as a file."""

from importlib.resources import files
from pathlib import Path

import pytest

from app.feedback.judge import Run, order_unjudged
from app.feedback.judge_page import judge_page
from app.search import Index
from dcar_core.data.judgements import JudgedList, read_judgements
from tests.support.page import Page, until

pytestmark = pytest.mark.browser


def keeps_storage(page: Page) -> bool:
    """Return whether the browser keeps what a page stores: one that has just started sometimes loses it once."""
    page.driver.execute_script("localStorage.setItem('kept', '')")
    page.driver.refresh()
    return bool(page.driver.execute_script("return 'kept' in localStorage"))


def test_keys_grade_results_and_the_download_is_a_judged_list(
    page: Page, indexes: dict[str, Path], tmp_path: Path
) -> None:
    opened = [Index.open(indexes[name], device="cpu") for name in ("shapes", "another")]
    judged, text = JudgedList(), 'red "circle", </script><img src=x onerror=alert(1)>'
    judged.add({"query_id": "q,1", "query": text, "item_id": opened[0].snapshot.artifact.item(0).id, "grade": 3}, "")
    runs = [Run.of(index, "index", judged) for index in opened]
    pairs = order_unjudged(runs)
    (tmp_path / "judge.html").write_text(judge_page(runs)[0])
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.driver.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    page.open((tmp_path / "judge.html").as_uri())
    until(lambda: keeps_storage(page))
    assert page.one("#query").text == text
    assert page.driver.execute_script("return document.querySelector('#image').naturalWidth") > 0
    for key in "3s0z2x":
        page.one("body").send_keys(key)
    page.one("button[data-key='1']").click()
    progress = f"4 of {len(pairs)}; 3 with a grade"
    assert page.one("#progress").text == progress
    page.driver.refresh()
    assert page.one("#progress").text == progress, "answers outlive the page"
    page.driver.execute_script((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
    run = "axe.run({resultTypes: ['violations']}).then((result) => arguments[0](result.violations))"
    assert page.driver.execute_async_script(run) == []
    page.one("#download").click()
    (table,) = until(lambda: [*tmp_path.glob("judged-*.csv")])
    found = read_judgements([table])
    assert found.texts == {"q,1": text}
    assert found.grades == {"q,1": {pairs[0][1]: 3, pairs[2][1]: 2, pairs[3][1]: 1}}
    for _ in pairs:
        page.one("body").send_keys("0")
    assert page.one("#query").text == "Nothing is left here: download the CSV."
    assert not page.one("#task").is_displayed()
