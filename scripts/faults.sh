#!/usr/bin/env bash
# The campaign of faults: a small run killed once at each of its fault points, on one rank and on two; real two-rank runs
# killed at a hundred random moments; runs ended over and over at random points. Each must end with the bits of the run
# that nothing happened to.
#
#   bash scripts/faults.sh                        # 300 points, 100 kills; the same command goes on after it was killed
#   bash scripts/faults.sh --part points --all    # every fault point
#   bash scripts/faults.sh --quick                # some minutes
#   bash scripts/faults.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in *" -h "* | *" --help "*) exec python3 -m tests.campaign faults --help ;; esac  # without an environment
source scripts/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m tests.campaign faults "$@"
