#!/usr/bin/env bash
# Holds `minillm plan` against the memory that real steps take, in twenty cases on this machine's CPU (about ten minutes of two
# idle cores), and writes docs/results/plan_check.json. docs/planning.md shows its table.
#
#   bash scripts/plan_check.sh
#   bash scripts/plan_check.sh --only WORDS    # cases whose name has these words in it; prints, writes nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
(($#)) || set -- --json docs/results/plan_check.json
exec "${PYTHON:-python}" -m minillm bench plan "$@"
