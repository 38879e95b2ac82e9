#!/usr/bin/env bash
# How a run begins on a hundred thousand prompts against ten thousand: seconds from the start of the process to the end
# of the first step, with an empty cache and with a full one, and the most memory it had resident. Prompts of about sixty
# tokens in eight Parquet files, a tiny model, one process. Ends with code 1 where the start takes over thirty seconds or
# the memory differs by more than 5 %.
#   bash scripts/data_check.sh [ROWS]             # 100000; another number for a look at more
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" scripts/data_check.py "$@"
