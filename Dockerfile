# Images of the service and the index job (docs/how-to/containers.md), by --target:
# - serve, the default: builds indexes and serves them, without PyTorch.
# - full: with PyTorch; trains and re-ranks as well, with every model. With EXTRAS=gpu it searches on an NVIDIA GPU.
#
# Build arguments:
# - BASE: a Debian image with Python 3.11 or newer as `python`, and pip. Pin it by digest for reproducible builds.
# - EXTRAS: extras of pyproject.toml to include: http, s3, ...
# - LOCK, SERVE_LOCK: lock files with hashes. If one is empty, the ranges in pyproject.toml apply.
# - PIP_EXTRA_INDEX_URL: for full, an index of PyTorch's CPU builds; PyPI's torch for Linux is the CUDA build, several GB.
# - PIP_INDEX_URL: a mirror. PIP_FIND_LINKS, PIP_CONSTRAINT: addresses, or paths that the build can see.
ARG BASE=python:3.12-slim

# The dependencies of pyproject.toml as files of their own, so other edits of pyproject.toml keep the installed layers.
FROM ${BASE} AS requirements
ARG EXTRAS=""
COPY pyproject.toml .
RUN for target in serve: full:torch; do python -c "import sys, tomllib; \
    wanted = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = sys.argv[1].replace(',', ' ').split(); \
    parts = [wanted['optional-dependencies'][each] for each in extras]; lines = sum(parts, wanted['dependencies']); \
    print(*[line for line in lines if 'gpu' not in extras or not line.startswith('faiss-cpu')], sep='\n')" \
    "${target#*:},$EXTRAS" > "/${target%%:*}.txt"; done

# Each stage names the arguments of pip: Buildah hands none down.
FROM ${BASE} AS builder
ENV PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip
RUN python -m venv --without-pip /opt/venv
COPY requirements*.lock /locks/

# The locks leave out PyTorch, since the index decides its build; the second command adds it. faiss-gpu and faiss-cpu are
# one module under two names.
FROM builder AS installed-full
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CONSTRAINT
ARG LOCK="requirements.lock"
COPY --from=requirements /full.txt /
RUN --mount=type=cache,target=/var/cache/pip \
    test -z "$LOCK" || { grep -q '^faiss-cpu' /full.txt || sed -i '/^faiss-cpu==/,/[^\\]$/d' "/locks/$LOCK"; \
    pip --python /opt/venv/bin/python install --require-hashes --no-deps --requirement "/locks/$LOCK"; }
RUN --mount=type=cache,target=/var/cache/pip \
    pip --python /opt/venv/bin/python install --requirement /full.txt

# Without what no command uses: plugins for other devices and readers of other formats than the export's, Arrow's network
# protocol and object store, symbols of debuggers, headers, stubs and tests.
FROM builder AS installed-serve
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CONSTRAINT
ARG SERVE_LOCK="requirements-serve.lock"
COPY --from=requirements /serve.txt /
RUN --mount=type=cache,target=/var/cache/pip \
    test -z "$SERVE_LOCK" \
    || pip --python /opt/venv/bin/python install --require-hashes --no-deps --requirement "/locks/$SERVE_LOCK"
RUN --mount=type=cache,target=/var/cache/pip \
    pip --python /opt/venv/bin/python install --requirement /serve.txt \
    && apt-get update && apt-get install --yes --no-install-recommends binutils \
    && cd /opt/venv/lib/python3*/site-packages \
    && find openvino/libs -name '*_frontend.so*' ! -name '*_ir_*' -delete \
    && find openvino/libs -name '*_plugin.so' ! -name '*_cpu_*' -delete \
    && rm -rf openvino/libs/cache.json openvino/frontend/*/ openvino/include openvino/cmake openvino/tools \
    pyarrow/include pyarrow/src pyarrow/*flight* pyarrow/*s3* pyarrow/libarrow_python.so pyarrow/libarrow_python.so.*.* \
    numpy/f2py numpy/distutils \
    && find . -regex '.*\.\(pyi\|pyx\|pxd\|pxi\|h\|a\)' -delete && find . -type d -name tests -prune -exec rm -rf {} + \
    && find pyarrow tantivy tokenizers uvloop '(' -name '*.so' -o -name '*.so.*' ')' -exec strip --strip-unneeded {} +

FROM builder AS project
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CONSTRAINT
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY dcar_core dcar_core
COPY index_jobs index_jobs
COPY app app
RUN --mount=type=cache,target=/var/cache/pip \
    pip wheel --no-deps --wheel-dir /dist . \
    && pip --python /opt/venv/bin/python install --no-index --no-deps --no-cache-dir /dist/*.whl

# The user is numeric, so an orchestrator can verify that it is not root. Volumes: /data for indexes, /cache for weights,
# exported models and their measurements.
FROM ${BASE} AS service
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin dcar \
    && install -d -o dcar -g dcar /data /cache
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 DCAR_HOST=0.0.0.0 DCAR_PORT=8000 DCAR_RUNTIME_CACHE=/cache \
    HF_HOME=/cache/hub
WORKDIR /app
USER 10001:10001
EXPOSE 8000
CMD ["dcar", "serve"]

# In each image the dependencies are one layer; a change of the source replaces only the small one after it. Copied, not
# mounted: Buildah reuses a cached step even if a mounted file has changed.
FROM service AS full
COPY --from=installed-full /opt/venv /opt/venv
COPY --from=project /opt/venv /opt/venv
COPY examples/emoji examples/emoji

FROM service AS serve
COPY --from=installed-serve /opt/venv /opt/venv
COPY --from=project /opt/venv /opt/venv
COPY examples/emoji examples/emoji
