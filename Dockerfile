# One image for the service and for the index job. `docker compose up` builds it; by hand: docker build -t dcar:local .
#
# PyPI's torch for Linux is the CUDA build, gigabytes of it. pip's own settings are taken as build arguments, so for the
# much smaller CPU build give the index of CPU wheels that PyTorch's install page names:
#   PIP_EXTRA_INDEX_URL=<that index> docker compose build
# A mirror goes into PIP_INDEX_URL. PIP_FIND_LINKS and PIP_CONSTRAINT are addresses, or paths that the build can see
# (podman build -v DIR:DIR:ro). BASE is any Debian with Python 3.11 or newer as `python`, with pip. EXTRAS are parts of
# pyproject.toml that the image is to have as well: openvino (several times as fast on a CPU), otel, http, s3, ...
# LOCK names a lock file with hashes, such as requirements.lock; without it, pyproject.toml's ranges decide. Pin BASE by
# digest (python:3.12-slim@sha256:...) for builds that can be repeated. docs/how-to/lock-dependencies.md says more.
ARG BASE=python:3.12-slim

# What pyproject.toml asks for, alone: an edit there that leaves the dependencies as they are installs nothing anew.
FROM ${BASE} AS requirements
ARG EXTRAS=""
COPY pyproject.toml .
RUN python -c "import sys, tomllib; wanted = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = sys.argv[1].replace(',', ' ').split(); parts = [wanted['optional-dependencies'][each] for each in extras]; \
    print(*sum(parts, wanted['dependencies']), sep='\n')" "$EXTRAS" > /requirements.txt

FROM ${BASE} AS builder
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CONSTRAINT
ARG LOCK=""
ENV PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv --without-pip /opt/venv
COPY --from=requirements /requirements.txt /requirements.txt
COPY requirements*.lock /locks/
# The lock leaves out PyTorch, whose build the index decides; the second command adds it.
RUN --mount=type=cache,target=/root/.cache/pip \
    test -z "$LOCK" || pip --python /opt/venv/bin/python install --require-hashes --no-deps --requirement "/locks/$LOCK"
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --requirement /requirements.txt

FROM builder AS project
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY dcar_core dcar_core
COPY index_jobs index_jobs
COPY app app
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /dist .

FROM ${BASE}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin dcar \
    && install -d -o dcar -g dcar /data /cache
# The dependencies are a layer of their own; a change of the source replaces the small ones after it.
COPY --from=builder /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# Copied, not mounted: Buildah takes a step from its cache although what is mounted has changed.
COPY --from=project /dist /dist
RUN pip --python /opt/venv/bin/python install --no-index --no-deps --no-cache-dir --root-user-action ignore /dist/*.whl
WORKDIR /app
COPY examples/emoji examples/emoji

# By number, so that an orchestrator can tell that it is not root. The index lies in /data, exports of the model and what
# was measured of them in /cache, both on volumes.
USER 10001:10001
ENV DCAR_HOST=0.0.0.0 DCAR_PORT=8000 DCAR_RUNTIME_CACHE=/cache
EXPOSE 8000
CMD ["dcar", "serve"]
