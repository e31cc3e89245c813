"""The jobs: build, update (also over HTTP), watch (a gallery), retrain (on clicks); the quality gate; the command line.

`index_jobs.rebuild` and the CLI import it; it imports every other folder of `index_jobs`.
"""
