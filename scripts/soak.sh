#!/usr/bin/env bash
# Runs of the embedded world, on two ranks, that are killed, stopped, damaged and started again at random moments for
# two hours; each must end with the bits of the run that nothing happened to.
#
#   bash scripts/soak.sh                          # two hours; the same command goes on after it was killed itself
#   bash scripts/soak.sh --minutes 20 --seed 2 --folder runs/soak-2
#   bash scripts/soak.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in *" -h "* | *" --help "*) exec python3 -m tests.campaign soak --help ;; esac  # without an environment
source scripts/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m tests.campaign soak "$@"
