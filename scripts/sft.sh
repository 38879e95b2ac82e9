#!/usr/bin/env bash
# Fine-tunes a student on reference responses with DeepSpeed, on several ranks.
#
#   bash scripts/sft.sh TEACHER STUDENT [key=value ...] [--hostfile FILE] [--dry-run]
#   bash scripts/sft.sh gpt2-xl gpt2 data.train=rows.jsonl name=my-sft
#   bash scripts/sft.sh - teachers/gpt2-xl data.train=rows.jsonl name=my-teacher
#
# STUDENT is what is trained; a teacher to be, too. TEACHER only measures the result (reverse KL on data.test): - for none.
# Both are cards, model folders or hub names. CONFIG names another run file than recipes/sft.yaml, and RANKS another number
# of processes than one a GPU. SIGTERM and Ctrl-C save at the next step and end with exit code 75; the same command goes on.
# Paths: --hostfile and CONFIG count from where you stand, models and key=value from the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
teacher_may_lack=yes
source scripts/arguments.sh
source scripts/setup.sh
source scripts/launch.sh
[[ $teacher == - ]] && teacher=null
exec "${launcher[@]}" sft --config "${CONFIG:-recipes/sft.yaml}" teacher="$teacher" student="$student" "${settings[@]}"
