"""The jobs: build, update (add and remove), apply (changes over HTTP), relocate; the quality gate; their command line.

In: a gallery, a checkpoint and options. Out: a published version and a summary.
`index_jobs.rebuild` and the CLI import it; it imports every other folder of `index_jobs`.
"""
