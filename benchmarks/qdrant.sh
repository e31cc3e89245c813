#!/usr/bin/env bash
# benchmarks/qdrant.sh http://HOST:6333    the tests of the engine, and the figures, on a real server
set -euo pipefail
cd "$(dirname "$0")/.."
QDRANT_URL=${1:?give the URL of a Qdrant server} .venv/bin/python -m pytest -q tests/index_jobs/test_qdrant.py tests/app/test_qdrant_ranking.py
.venv/bin/python benchmarks/qdrant.py "$@"
