"""Training of one method on one data set: frozen features, losses, the loop,
validation, resumable state.

In: a `Dataset` and a `TrainConfig`. Out: trained parameters and the best validation
recall. `evaluation`, `index_jobs.jobs` and the CLI import it; it imports `model`,
`data`, `negatives`, `encoder` and `util`.
"""
