# Sourced by the scripts, after setup.sh: `minillm` in one process, and `launch`, the same on several ranks. The array
# `launcher` is for a script whose last act it is: `exec "${launcher[@]}" …` puts it in the script's place, so that a
# signal to the script reaches it.
#
# RANKS sets the number of ranks: by default every GPU, or two on a machine without one. MASTER_PORT names the port where
# they meet; by default each launch takes a free one. On several nodes: a hostfile, or NODE_RANK, NNODES and MASTER_ADDR
# (docs/launching.md).
PATH=$(dirname "$python"):$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[[ -v for_launch ]] || for_launch=()
launcher=("$python" -m minillm launch "${for_launch[@]}")
if [[ " ${for_launch[*]-}" == *" --hostfile"* ]]; then
  launcher+=(${RANKS:+--ranks "$RANKS"}) # the file says it, and this machine's GPUs are not theirs
else
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
  [[ $ranks =~ ^[1-9][0-9]*$ ]] || {
    printf 'RANKS=%s: wanted a number of ranks, 1 or more\n  unset it for one a GPU\n' "$ranks" >&2
    exit 2
  }
  [[ $gpus -gt 0 ]] || export DS_ACCELERATOR=cpu
  launcher+=(--ranks "$ranks")
fi
launch() { "${launcher[@]}" "$@"; }
