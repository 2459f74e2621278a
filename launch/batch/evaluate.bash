set -uo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-RANKS_PER_NODE} / RANKS_PER_NODE))}
[[ $OMP_NUM_THREADS -gt 0 ]] || OMP_NUM_THREADS=1
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} PYTHONUNBUFFERED=1

if [[ $SLURM_JOB_NUM_NODES -eq 1 ]]; then
    exec "${PYTHON[@]}" -m launch.ranks --standalone --nproc-per-node="$RANKS_PER_NODE" \
        -m evaluation.cli "$@"
fi

# An evaluation starts from the beginning if its nodes fail; SLURM then requeues it.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
port=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))
exec srun --quiet --ntasks-per-node=1 --kill-on-bad-exit=1 "${PYTHON[@]}" -m launch.ranks \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint="$head:$port" -m evaluation.cli "$@"
