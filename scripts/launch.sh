# Sourced by the scripts, after setup.sh: `minillm` in one process, and `launch`, the same under DeepSpeed's launcher.
#
# RANKS sets the number of processes of `launch`: by default every GPU, or two on a machine without one.
PATH=$(dirname "$python"):$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
[[ $gpus -gt 0 ]] || export DS_ACCELERATOR=cpu

launch() {
  deepspeed --quiet --num_accelerators "$ranks" --module minillm "$@"
}
