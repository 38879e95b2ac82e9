#!/usr/bin/env bash
# The parity matrix: five MiniLLM steps on two ranks against one process, for every place of student and teacher, all
# weights and LoRA, fp32 and bf16. Writes docs/parity.md; code 1 where a cell deviates too far. About five minutes of
# two cores.
#
#   bash scripts/parity.sh
#   bash scripts/parity.sh zero3-offload tp    # only cells with one of these words in their name; prints, writes nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m tests.dist.matrix "$@"
