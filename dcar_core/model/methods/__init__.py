"""The methods: each a configuration of the shared model, with the losses and weight changes that only it has.

In: the name of a method. Out: a `Method`. A new one is a plug-in, or a line in `baselines`.
`model.dcar`, `training`, `evaluation` and the CLI import `registry`; the files of methods are imported by it alone.
"""
