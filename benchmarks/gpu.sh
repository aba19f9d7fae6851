#!/usr/bin/env bash
# All measurements on a GPU, in under eight minutes: bash benchmarks/gpu.sh [FILE.json]
# Where PYTHON (python3) has no fedlora, an environment is made first with the torch that it has, or one from pip.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c "import torch, transformers, peft, fedlora.client" 2>/dev/null; then
  "$python" -m venv --system-site-packages .venv-gpu
  python=.venv-gpu/bin/python
  "$python" -m pip install --quiet --constraint constraints.txt --editable '.[quantized]'
fi
timeout 480 "$python" -m benchmarks.gpu --json "${1:-gpu.json}"
