"""The jobs: build, update (also over HTTP), watch (a gallery), retrain (on clicks), and
the quality gate.

In: a gallery with a checkpoint, or changes of items. Out: a new version of an index, if
it passes the gate.
"""
