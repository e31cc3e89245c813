"""The jobs themselves: rebuild, add and remove, with the quality gate and the score cut-off.

In: a gallery, a checkpoint and options. Out: a published version and a summary.
`index_jobs.rebuild` and the CLI import it; it imports every other folder of `index_jobs`.
"""
