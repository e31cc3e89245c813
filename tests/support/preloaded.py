"""Everything that commands import, for the process that `tests.support.commands` forks them from."""

import gc

import faiss
import torch

import app.cli.datasets
import app.cli.indexing
import app.cli.serving
import app.cli.training
import app.main
import app.server  # noqa: F401
import dcar_core.evaluation
import dcar_core.training.train  # noqa: F401
import index_jobs.jobs.rebuild_run  # noqa: F401
import tests.support.commands  # noqa: F401

# As in conftest; threads themselves start in the commands.
torch.set_num_threads(1)
faiss.omp_set_num_threads(1)
gc.freeze()  # what is imported stays; otherwise each command copies its pages to look for garbage in them
