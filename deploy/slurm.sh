#!/bin/bash
# A run as a job of Slurm that goes back into the queue before its time limit, and goes on from there: see docs/slurm.md.
#   sbatch deploy/slurm.sh RUN student --data SHARDS ...     is     salt-train student --data SHARDS ... --out RUN
#SBATCH --job-name=salt
#SBATCH --exclusive --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue --open-mode=append
set -u
run=$1
shift
command=(salt-train "$@" --out "$run")
if [ -e "$run/config.yaml" ]; then command+=(--resume); fi

if [ "${SLURM_NNODES:-1}" -gt 1 ]; then  # one Ray of all nodes; this script is on the first
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.salt/ray-token"
  head=$(hostname)
  export RAY_ADDRESS="$head:6379"
  srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port=6379 --disable-usage-stats --block &
  until ray status > /dev/null 2>&1; do sleep 2; done
  others=$((SLURM_NNODES - 1))
  srun --nodes="$others" --ntasks="$others" --exclude="$head" ray start --address="$RAY_ADDRESS" --disable-usage-stats --block &
  until [ "$(ray status 2> /dev/null | grep -c node_)" -ge "$SLURM_NNODES" ]; do sleep 2; done
fi

"${command[@]}" &
pid=$!
trap 'kill -TERM "$pid"' TERM
wait "$pid"
code=$?
while kill -0 "$pid" 2> /dev/null; do  # the signal ended the wait, not the command
  wait "$pid"
  code=$?
done
if [ "$code" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
