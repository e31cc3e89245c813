"""Everything that commands import, for the process that `tests.support.commands` forks them from."""

import faiss  # noqa: F401

import app.cli.datasets
import app.cli.indexing
import app.cli.serving
import app.cli.training
import app.main
import app.server  # noqa: F401
import dcar_core.evaluation
import dcar_core.training.train  # noqa: F401
import index_jobs.rebuild  # noqa: F401
import tests.support.commands  # noqa: F401
