"""The jobs: build, update (add, remove), apply (changes over HTTP), watch (a gallery), retrain (on clicks);
the quality gate; their command line.

In: a gallery, a checkpoint and options. Out: a published version and a summary.
`index_jobs.rebuild` and the CLI import it; it imports every other folder of `index_jobs`.
"""
