#!/usr/bin/env bash
# Does a larger teacher make the policy gradient noisier? Teachers of five sizes, each trained short and long, and one of them made
# sharper and flatter; then `minillm diagnose` of one student with each of them. What is there already is skipped. What came out:
# docs/methods/teacher-size.md.
#
#   bash scripts/quickstart.sh         # first: its fine-tuned student and its teacher are taken
#   bash scripts/teacher_sizes.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
source scripts/launch.sh
out=runs/teacher-sizes

# Width x layers, short or long, updates, Muon's learning rate.
train() {
  minillm sft --config recipes/quickstart/teacher.yaml name=teacher-sizes/"$1-$2" student=students/micro-world-"$1" \
    stages.0.steps="$3" stages.0.validate_every="$3" stages.0.optimiser.muon_lr="$4"
}

for size in 24x2 32x2 64x3; do train $size short 500 2e-2; done
train 96x3 short 500 1e-2
train 128x4 short 500 7e-3
for size in 24x2 32x2; do train $size long 2400 2e-2; done
[[ -d $out/64x3-long ]] || cp -r runs/quickstart/teacher $out/64x3-long # 3,200 updates
train 96x3 long 1600 1e-2
train 128x4 long 1600 7e-3

for temperature in 0.5 0.7 1.4 2; do "$python" scripts/teacher_sizes.py cool $out/64x3-long $temperature; done
for teacher in "$out"/*/; do
  minillm evaluate "$teacher/student" --config recipes/quickstart/minillm.yaml --out "$teacher/test" \
    teacher=runs/quickstart/teacher/student 'evaluation.temperatures=[1.0]' 'evaluation.seeds=[10,20]'
done

# Two students: the quickstart's, at the end of fine-tuning, and the same early in it.
minillm sft --config recipes/quickstart/sft.yaml name=teacher-sizes-early stages.0.steps=400 stages.0.validate_every=400
results=docs/results/teacher-sizes
"$python" scripts/teacher_sizes.py measure $out runs/quickstart/sft/student $results
"$python" scripts/teacher_sizes.py measure $out runs/teacher-sizes-early/student $results/early
for folder in $results $results/early; do "$python" scripts/teacher_sizes_told.py "$folder"; done
"$python" docs/images/draw_teacher_size.py $results $results/early
