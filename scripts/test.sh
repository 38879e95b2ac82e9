#!/usr/bin/env bash
# Makes the environment where it is not there, then runs the tests. Arguments go to pytest:
#
#   bash scripts/test.sh                     # all but the gpu and slow ones
#   bash scripts/test.sh tests/exact -x      # one folder, up to the first failure
#   bash scripts/test.sh -m slow             # the slow ones
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

# One thread a process: these tensors are tiny, and tests that start several ranks would otherwise fight for the cores.
export OMP_NUM_THREADS=1
exec "$python" -m pytest "$@"
