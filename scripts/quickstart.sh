#!/usr/bin/env bash
# From nothing to a distilled student on the embedded micro-world, with a table and a report at the end. No network after
# the install, nothing to prepare.
#
#   bash scripts/quickstart.sh            # stages that are done are skipped
#   bash scripts/quickstart.sh --fresh    # start over
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  "" | --fresh) fresh=("$@") ;;
  *) printf 'quickstart: unknown argument %s\nusage: bash scripts/quickstart.sh [--fresh]\n' "$1" >&2 && exit 2 ;;
esac
source scripts/setup.sh
source scripts/launch.sh
began=$SECONDS
out=runs/quickstart
recipes=recipes/quickstart
mkdir -p "$out"

title() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# Waits for the job in the background; shows the end of its log, all of its last lines if it failed.
finish_background() {
  wait "$background" || { tail -n 20 "$1" >&2 && exit 1; }
  tail -n 1 "$1"
}
background=
trap '[[ -z $background ]] || kill "$background" 2>/dev/null || true' EXIT

title "1/4  A teacher and a far smaller student learn the micro-world (the student beside it, log in $out/sft.log)"
minillm sft --config $recipes/sft.yaml "${fresh[@]}" >"$out/sft.log" 2>&1 &
background=$!
minillm sft --config $recipes/teacher.yaml "${fresh[@]}"
finish_background "$out/sft.log"

title "2/4  MiniLLM: the student learns from the teacher on its own text ($ranks ranks, ZeRO-2, teacher sharded)"
launch distill --config $recipes/minillm.yaml "${fresh[@]}"

title "3/4  The control: the same student gets about the same seconds of more fine-tuning"
launch sft --config $recipes/control.yaml "${fresh[@]}"

title "4/4  Teacher and first student answer the same held-out prompts"
minillm evaluate $out/teacher/student --config $recipes/minillm.yaml --out $out/teacher "${fresh[@]}" >"$out/teacher.log" 2>&1 &
background=$!
minillm evaluate $out/sft/student --config $recipes/minillm.yaml --out $out/sft "${fresh[@]}"
finish_background "$out/teacher.log"

title "Result"
minillm report teacher=$out/teacher sft=$out/sft sft_control=$out/control minillm=$out/minillm \
  --difference minillm,sft_control --out $out --title "Quickstart: the micro-world" \
  --training teacher=$out/teacher --training sft=$out/sft --training sft_control=$out/control --training minillm=$out/minillm
printf '\nreport: %s   student: %s   seconds: %d\n' "$out/report.html" "$out/minillm/student" "$((SECONDS - began))"
