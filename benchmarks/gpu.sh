#!/usr/bin/env bash
# Everything that runs on a GPU, by one command: tests, runtimes, training, encoding, kinds of index.
#
#     benchmarks/gpu.sh                 on a machine with CUDA and the extra gpu in place of faiss-cpu; half an hour
#     DEVICE=cpu benchmarks/gpu.sh      without the tests, on a processor, in a minute: shows that the commands run
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} emoji=examples/emoji/twemoji
python=${PYTHON:-.venv/bin/python}
if [ "$device" = cuda ]; then
  runtime=cuda captions=2000 model=ViT-B-32 pictures=8192 batch=256 vectors=1000000 batches=20
  kinds=(hnsw gpu-flat gpu-ivf) methods=clip-adapter,dcar,block-adapters
else
  runtime=torch captions=64 model=ViT-S-16-alt pictures=16 batch=8 vectors=2000 batches=1
  kinds=(flat) methods=clip-adapter
fi
run() { printf '\n$ %s\n' "$*"; "$@"; }

if [ "$device" = cuda ]; then run "$python" -m pytest -q -m gpu tests; fi
run "$python" benchmarks/runtimes.py --device "$device" --checkpoint "$emoji/checkpoint" --data "$emoji" --pictures "$captions" --runtimes "$runtime"
run "$python" benchmarks/training_cost.py --device "$device" --model "$model" --batches "$batches" --batch-size "$batch" --methods "$methods"
run "$python" benchmarks/encode.py --device "$device" --runtime "$runtime" --model "$model" --pictures "$pictures" --batch-size "$batch"
vectors_of=$(mktemp -d)
run "$python" benchmarks/emoji_vectors.py "$vectors_of" --count "$vectors"
run "$python" benchmarks/index_kinds.py "$vectors_of" "${kinds[@]/#/--kind=}"
