#!/usr/bin/env bash
# The memory that `minillm merge` takes of models in the shape of OPT-1.3B (1.3 billion weights, fp16, 2.6 GB each): a random
# start and two random models from it are written to disk piece by piece, merged by a process of its own, and removed. Needs
# 11 GB of disk and some minutes of two CPU cores. Code 1 where the merge takes 3 GB or more.
#
#   bash scripts/merge_memory.sh [FOLDER]      (runs/merge_memory; it must not be there)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${MINILLM_PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${MINILLM_PYTHON:-}" ] && python=.venv/bin/python
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$python" scripts/merge_memory.py "$@"
