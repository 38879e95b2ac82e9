#!/usr/bin/env bash
# Compares ways to distil a teacher into a student over several training seeds, all ranks on one cell at a time.
#
#   bash scripts/study.sh TEACHER STUDENT [key=value ...] [--hostfile FILE] [--dry-run]
#   bash scripts/study.sh gpt2-xl gpt2 data.train=rows.jsonl data.test=test.jsonl name=my-study 'seeds=[1,2]'
#
# Every cell starts from STUDENT. A key of the study's file (name, results, seeds) replaces that, any other a setting of its
# recipe. CONFIG names another study than scripts/study.yaml, and RANKS another number of processes than one a GPU. Cells
# that are there are not made again.
# Paths: --hostfile and CONFIG count from where you stand, models and key=value from the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/arguments.sh
source scripts/setup.sh
source scripts/launch.sh
exec "${launcher[@]}" study --config "${CONFIG:-scripts/study.yaml}" teacher="$teacher" student="$student" "${settings[@]}"
