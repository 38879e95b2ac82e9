#!/usr/bin/env bash
# On a machine with GPUs, in one call that is meant to take less than ten minutes, without a network: a MiniLLM run in the
# shapes of GPT-2 XL (1.5B) and GPT-2 (124M) with random weights, ZeRO-2, bf16, 20 steps; the teacher whole on each GPU,
# then in host memory; one run stopped half-way and gone on. Peak memory against `minillm plan`, tokens a second, MFU.
# Code 1 where memory is more than 7 % from the plan, a run fails, or one that goes on ends elsewhere.
#
#   bash scripts/gpu_check.sh [FOLDER]       (runs/gpu_check; MINILLM_PYTHON names another interpreter, RANKS fewer GPUs)
#   bash scripts/gpu_check.sh --tiny FOLDER  (tiny shapes on a CPU: tries the script itself)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${MINILLM_PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${MINILLM_PYTHON:-}" ] && python=.venv/bin/python
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$python" scripts/gpu_check.py "$@"
