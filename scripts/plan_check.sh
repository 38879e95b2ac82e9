#!/usr/bin/env bash
# Holds `minillm plan` against the memory that real steps take, in eighteen cases on this machine's CPU (about ten minutes of two
# idle cores), and writes docs/results/plan_check.json. docs/planning.md shows its table.
#
#   bash scripts/plan_check.sh [--only WORDS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
exec "${PYTHON:-python}" -m minillm bench plan --json docs/results/plan_check.json "$@"
