#!/usr/bin/env bash
# Measures a student on test prompts, beside its teacher: measures with intervals, and every response.
#
#   bash scripts/evaluate.sh TEACHER STUDENT [key=value ...] [--hostfile FILE] [--dry-run]
#   bash scripts/evaluate.sh gpt2-xl runs/my-run/student data.test=test.jsonl
#
# STUDENT is the model that is measured, a folder mostly, and TEACHER gives the reverse KL. OUT names another folder for
# results.json and samples.jsonl than runs/evaluated/STUDENT, with '-' for each '/'; CONFIG another run file than
# recipes/jsonl.yaml, and RANKS another number of processes than one a GPU. Interrupted, the same command goes on.
# Paths: --hostfile, OUT and CONFIG count from where you stand, models and key=value from the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/arguments.sh
source scripts/setup.sh
source scripts/launch.sh
out=${student%/} out=${out#/} out=${OUT:-runs/evaluated/${out//\//-}}
exec "${launcher[@]}" evaluate "$student" --config "${CONFIG:-recipes/jsonl.yaml}" --out "$out" teacher="$teacher" "${settings[@]}"
