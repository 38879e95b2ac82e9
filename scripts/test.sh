#!/usr/bin/env bash
# Makes the environment where it is not there, then runs the tests. Arguments go to pytest:
#
#   bash scripts/test.sh                     # all but the gpu and slow ones
#   bash scripts/test.sh tests/exact -x      # one folder, up to the first failure
#   bash scripts/test.sh -m slow             # the slow ones
#   bash scripts/test.sh -n 0 --pdb FILE     # in one process, as a debugger wants it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

# One thread a process: these tensors are tiny, and tests that start several ranks would otherwise fight for the cores.
export OMP_NUM_THREADS=1
# Two files at a time: most tests keep one core busy. A file stays in one process, which makes its models and runs once;
# in the order of the tree the small ones come last, so that the two processes end together.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
