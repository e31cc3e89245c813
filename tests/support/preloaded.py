"""Everything that commands import or read, for the process that
`tests.support.commands` forks them from.
"""

import gc
import importlib
import pkgutil
from contextlib import suppress

import faiss
import pyarrow.compute  # noqa: F401
import torch

import app
import dcar_core
import index_jobs
import tests.support.commands  # noqa: F401
from dcar_core.model.tokenizer import TextTokenizer

for package in (app, index_jobs, dcar_core):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):  # of an extra
                importlib.import_module(module.name)
with suppress(ImportError):
    importlib.import_module("pandas")  # by pyarrow, where it is installed
TextTokenizer.for_clip()

# As in conftest; threads themselves start in the commands.
torch.set_num_threads(1)
faiss.omp_set_num_threads(1)
# what is imported stays; otherwise each command copies its pages to look for garbage in
# them
gc.freeze()
