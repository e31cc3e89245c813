"""Measure the search page in a browser: milliseconds from the last letter to results, and to pictures, on the screen.

    python benchmarks/page.py                     # the bundled twemoji gallery, as `make demo` serves it
    python benchmarks/page.py --index INDEX --queries QUERIES.txt

- Half of the queries are entered at once, as a paste or an example is; the others are typed, eight letters a second, so
  the searches of earlier letters may still run. The service has seen none of them.
- Results are on the screen in the first frame after they are in the document; pictures when those in view are decoded.
- Requests are counted for each query, without pictures. The browser is Chromium without a window, with its own driver.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selenium import webdriver
from service import ROOT, emoji, serving

QUERIES = ROOT / "examples" / "emoji" / "queries" / "validation.tsv"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900")
LETTER_S = 0.125
REST_S = 0.8  # after each query, so that the counts of the filters do not run into the next one
WATCH = """
    const results = document.getElementById('results');
    window.began = window.shown = window.seen = window.turn = 0;
    addEventListener('input', ({timeStamp}) => (window.began = timeStamp), true);
    new MutationObserver(() => {
        if (!results.children.length) return;
        const mine = ++turn;
        window.seen = 0;
        requestAnimationFrame(() => setTimeout(() => (window.shown = performance.now())));
        const inView = [...results.querySelectorAll('img')].filter((i) => i.getBoundingClientRect().top < innerHeight);
        const decoded = inView.map((i) => i.decode().catch(() => {}));
        Promise.all(decoded).then(() => mine === turn && (seen = performance.now()));
    }).observe(results, {childList: true});
"""
IS_DONE = """
    const isBusy = document.getElementById('results').ariaBusy === 'true';
    return !isBusy && shown > began && seen > began && document.title.startsWith(arguments[0] + ' ·');
"""
ENTER = """
    const query = document.getElementById('query');
    query.value = arguments[0];
    query.dispatchEvent(new Event('input', {bubbles: true}));
"""
ASKED = """
    const asked = performance.getEntriesByType('resource').filter(({name}) => !name.includes('/image?'));
    performance.clearResourceTimings();
    return asked.length;
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="folder of the index")
    parser.add_argument("--index", type=Path, help="serve this index instead")
    parser.add_argument("--queries", type=Path, default=QUERIES, help="lines of queries, the last column without a tab")
    parser.add_argument("--count", type=int, default=120)
    given = parser.parse_args()
    lines = given.queries.read_text(encoding="utf-8").splitlines()
    queries = list(dict.fromkeys(line.split("\t")[min(1, line.count("\t"))] for line in lines))[: given.count]
    index = given.index or emoji(given.work)
    options = webdriver.ChromeOptions()
    for flag in FLAGS:
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        with serving(index) as server:
            driver.get(f"http://127.0.0.1:{server.port}/")
            time.sleep(3)
            driver.execute_script(WATCH)
            driver.execute_script(ASKED)
            for name, chosen, is_typed in (("at once", queries[::2], False), ("typed", queries[1::2], True)):
                measured = [measure(driver, query, is_typed) for query in chosen]
                print(f"{name}: {len(chosen)} queries; results {told([each[0] for each in measured])}; "
                      f"pictures {told([each[1] for each in measured])}; "
                      f"{statistics.mean(each[2] for each in measured):.1f} requests", flush=True)  # fmt: skip
    finally:
        driver.quit()


def measure(driver: Any, query: str, is_typed: bool) -> tuple[float, float, int]:
    """Return the milliseconds to results and to pictures, and the number of requests."""
    driver.execute_script(ENTER, "")
    time.sleep(REST_S)
    driver.execute_script(ASKED)
    if is_typed:
        for letter in query:
            driver.find_element("id", "query").send_keys(letter)
            time.sleep(LETTER_S)
    else:
        driver.execute_script(ENTER, query)
    end = time.monotonic() + 30
    while not driver.execute_script(IS_DONE, query):
        assert time.monotonic() < end, f"no results for {query}"
        time.sleep(0.05)
    took = driver.execute_script("return [shown - began, seen - began]")
    time.sleep(REST_S)
    return *took, driver.execute_script(ASKED)


def told(values: Sequence[float]) -> str:
    return f"p50 {statistics.median(values):.0f} ms, p95 {statistics.quantiles(values, n=20)[-1]:.0f} ms"


if __name__ == "__main__":
    main()
