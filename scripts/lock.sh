#!/bin/sh
# Write requirements.lock, requirements-serve.lock and requirements-ci.lock: one version and the hashes of every package, for
# Python 3.11 and newer.
#
#     pip install uv
#     scripts/lock.sh              update the locks to what pyproject.toml asks for
#     scripts/lock.sh --upgrade    with the newest version of every package
#
# PyTorch, torchvision and what only CUDA builds need are left out: their builds and hashes differ between the CPU and the
# CUDA index, and the index is the user's choice.
set -eu
cd "$(dirname "$0")/.."

lock() {
  lock=$1 extras=$2
  shift 2
  uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet \
    --output-file "$lock" ${extras:+--extra "$extras"} "$@" >/dev/null
  { echo "# Written by scripts/lock.sh; extras: ${extras:-none}."
    echo "# Without PyTorch: install it from the index of your choice, after this file."
    awk '/^[a-z0-9]/ { skip = /^(torch|torchvision|triton|nvidia-.+|cuda-.+)==/ } !skip' "$lock"
  } >"$lock.new"
  mv "$lock.new" "$lock"
}

lock requirements.lock torch "$@"
lock requirements-serve.lock "" "$@"
lock requirements-ci.lock "$(sed -n 's/^export EXTRAS=//p' .ci/run)" "$@"
