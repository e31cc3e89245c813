"""The engines by name. A new engine is a file of its own and a line here."""

from pkgutil import resolve_name

from dcar_core.util.errors import DataError
from index_jobs.engines.protocol import Engine

ENGINES = {
    "faiss": "index_jobs.engines.faiss.engine:FaissEngine",
    "milvus": "index_jobs.engines.milvus:MilvusEngine",
}


def load_engine(text: str) -> Engine:
    """Return the engine that a spec's `engine` names: NAME, or NAME=URI for one that stores vectors elsewhere.

    Raises:
        DataError: no engine has this name, or it needs a URI, or takes none.
    """
    name, _, uri = text.partition("=")
    if name not in ENGINES:
        raise DataError(f"unknown engine {name!r}; there are: {', '.join(ENGINES)}")
    engine: Engine = resolve_name(ENGINES[name])(uri)
    return engine
