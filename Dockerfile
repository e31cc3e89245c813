# One image for the service and the index job. Build it with `docker compose build`, or docker build -t dcar:local .
#
# Build arguments (docs/how-to/containers.md):
# - BASE: a Debian image with Python 3.11 or newer as `python`, and pip. Pin it by digest for reproducible builds.
# - EXTRAS: extras of pyproject.toml to include: openvino (several times as fast on a CPU), otel, http, s3, ...
# - LOCK: a lock file with hashes. If it is empty, the ranges in pyproject.toml apply.
# - PIP_EXTRA_INDEX_URL: an index of PyTorch's CPU builds; PyPI's torch for Linux is the CUDA build, several GB.
# - PIP_INDEX_URL: a mirror. PIP_FIND_LINKS, PIP_CONSTRAINT: addresses, or paths that the build can see.
ARG BASE=python:3.12-slim

# The dependencies of pyproject.toml as a file of their own, so other edits of pyproject.toml keep the installed layer.
FROM ${BASE} AS requirements
ARG EXTRAS=""
COPY pyproject.toml .
RUN python -c "import sys, tomllib; wanted = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = sys.argv[1].replace(',', ' ').split(); parts = [wanted['optional-dependencies'][each] for each in extras]; \
    print(*sum(parts, wanted['dependencies']), sep='\n')" "$EXTRAS" > /requirements.txt

FROM ${BASE} AS builder
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CONSTRAINT
ARG LOCK="requirements.lock"
ENV PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CACHE_DIR=/var/cache/pip
RUN python -m venv --without-pip /opt/venv
COPY --from=requirements /requirements.txt /requirements.txt
COPY requirements*.lock /locks/
# The locks leave out PyTorch, since the index decides its build; the second command adds it.
RUN --mount=type=cache,target=/var/cache/pip \
    test -z "$LOCK" || pip --python /opt/venv/bin/python install --require-hashes --no-deps --requirement "/locks/$LOCK"
RUN --mount=type=cache,target=/var/cache/pip \
    pip --python /opt/venv/bin/python install --requirement /requirements.txt

FROM builder AS project
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY dcar_core dcar_core
COPY index_jobs index_jobs
COPY app app
RUN --mount=type=cache,target=/var/cache/pip \
    pip wheel --no-deps --wheel-dir /dist .

FROM ${BASE}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin dcar \
    && install -d -o dcar -g dcar /data /cache
# Dependencies form one layer; a change of the source replaces only the small layers after it.
COPY --from=builder /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# Copied, not mounted: Buildah reuses a cached step even if a mounted file has changed.
COPY --from=project /dist /dist
RUN pip --python /opt/venv/bin/python install --no-index --no-deps --no-cache-dir --root-user-action ignore /dist/*.whl
WORKDIR /app
COPY examples/emoji examples/emoji

# The user is numeric, so an orchestrator can verify that it is not root. Volumes: /data for indexes, /cache for exported
# models and their measurements.
USER 10001:10001
ENV DCAR_HOST=0.0.0.0 DCAR_PORT=8000 DCAR_RUNTIME_CACHE=/cache
EXPOSE 8000
CMD ["dcar", "serve"]
