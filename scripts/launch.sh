# Sourced by the scripts, after setup.sh: `minillm` in one process, and `launch`, the same under DeepSpeed's launcher.
#
# RANKS sets the number of processes of `launch`: by default every GPU, or two on a machine without one.
PATH=$(dirname "$python"):$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
[[ $gpus -gt 0 ]] || export DS_ACCELERATOR=cpu

# A free port for each launch, unless MASTER_PORT names one: DeepSpeed's own choice is the same for every job on a machine.
launch() {
  local port=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
  deepspeed --quiet --num_accelerators "$ranks" --master_port "$port" --module minillm "$@"
}
