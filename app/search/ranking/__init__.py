"""Ranking: from the vector and the text of a query to the rows of an index.

In: a snapshot, a unit vector, and options such as a filter. Out: ranked rows, groups and counts. Everything here
blocks, so callers use a thread unless the search is a quick one; it knows neither requests nor the model. Used by
`app.search`, the page's routes and `dcar search`.
"""
