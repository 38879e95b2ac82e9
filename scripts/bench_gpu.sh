#!/usr/bin/env bash
# What docs/performance.md measures, on one GPU, in one call that is meant to take less than ten minutes, without a
# network: shapes of GPT-2 XL -> GPT-2 and of a 13B teacher with a 1.3B student, random weights, bf16; the loss core at
# a large vocabulary.
#   bash scripts/bench_gpu.sh [FILE.json]     (MINILLM_PYTHON names another interpreter)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${MINILLM_PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${MINILLM_PYTHON:-}" ] && python=.venv/bin/python
out=${1:-bench_gpu.json}
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "bench_gpu.sh: torch sees no GPU here")'

bench() { # NAME OF THE FILE, WORDS: each into a file of its own, since one file holds one section of a kind
  local into="${out%.json}.$1.json"
  shift
  "$python" -m minillm bench "$@" --json "$into"
}
bench loss loss --tokens 8192 --vocabulary 151936 --hidden 4096 --dtype bfloat16 --repeats 3
bench gpt2.step step --teacher bench-gpt2-xl --student bench-gpt2 --batch 64 --new-tokens 256 --precision bf16 --repeats 2
bench gpt2.rollout rollout --teacher bench-gpt2-xl --student bench-gpt2 --batch 64 --new-tokens 256 --precision bf16 \
  --repeats 2 --coin-rollouts 3
bench 13b.step step --teacher bench-13b --student bench-1.3b --batch 16 --new-tokens 128 --precision bf16 --repeats 1
