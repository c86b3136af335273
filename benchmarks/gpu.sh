#!/bin/bash
# All that is to be known of one GPU, in at most 8 minutes: the tests that need it, steps of every objective in
# eager and compiled against the roofline, the served teacher, no wait of the host in a step, and FSDP2 of ViT-G.
#
#   bash benchmarks/gpu.sh OUT            on a GPU: ViT-B, ViT-L and ViT-g
#   bash benchmarks/gpu.sh OUT --nano     on any machine: the same, small, to know that this script works
#
# Needs torch, timm, einops, pyarrow and xxhash, and what is in WHEELS (a folder of wheels for this Python, made with
# `pip download pydantic jaxtyping safetensors fastapi uvicorn ... --dest WHEELS`): no network, no Ray.
set -euo pipefail
out=${1:?"usage: bash benchmarks/gpu.sh OUT [--nano]"}
size=${2:-}
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=$PWD
python=${PYTHON:-python}
if [ -n "${WHEELS:-}" ]; then
    "$python" -m venv --system-site-packages "$out/venv"
    python="$out/venv/bin/python"
    "$python" -m pip install --quiet --no-index --find-links "$WHEELS" "$WHEELS"/*.whl
fi
tests=passed
FAIL_WITHOUT_CUDA=$([ "$size" = --nano ] && echo 0 || echo 1) \
    "$python" -m pytest -q -m needs_cuda tests/test_update.py -p no:cacheprovider > "$out/tests.txt" 2>&1 || tests=failed
timeout "$([ "$size" = --nano ] && echo 1500 || echo 420)" "$python" benchmarks/gpu.py --out "$out/gpu.json" --tests "$tests" $size
