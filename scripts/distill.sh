#!/usr/bin/env bash
# Distils a teacher into a student with DeepSpeed, on several ranks.
#
#   bash scripts/distill.sh TEACHER STUDENT [key=value ...] [--hostfile FILE] [--dry-run]
#   bash scripts/distill.sh gpt2-xl gpt2 data.train=prompts.jsonl name=my-run
#
# TEACHER and STUDENT are cards (teachers/*.yaml, students/*.yaml), model folders or hub names. CONFIG names another run file
# than recipes/jsonl.yaml, and RANKS another number of processes than one a GPU. SIGTERM and Ctrl-C save at the next step
# and end with exit code 75; the same command goes on. Several nodes: docs/launching.md.
# Paths: --hostfile and CONFIG count from where you stand, models and key=value from the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/arguments.sh
source scripts/setup.sh
source scripts/launch.sh
exec "${launcher[@]}" distill --config "${CONFIG:-recipes/jsonl.yaml}" teacher="$teacher" student="$student" "${settings[@]}"
