"""A page as one file, which opens without a server or a network, in light and dark."""

from html import escape

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .best { font-weight: 700; }
svg { width: 100%; height: auto; overflow: visible; fill: currentColor; margin: 1rem 0; }
figure { display: inline-flex; gap: .4rem; align-items: center; margin: .3rem 1.2rem .3rem 0; }
figure img { width: 72px; height: 72px; object-fit: contain; background: #fff; border: 1px solid var(--line); }
figcaption { max-width: 16rem; font-size: 13px; } details { margin: .6rem 0; } summary { cursor: pointer; }
"""


def html_page(title: str, body: str) -> str:
    """Return the page; body: HTML below the heading."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
