set -uo pipefail
restarts=${SLURM_RESTART_COUNT:-0}
attempt=$SLURM_JOB_ID.$restarts
# of an array this task alone: the number of one of its tasks means all of them
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
warned=0 told=0 too_late=0 child= timer=
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-RANKS_PER_NODE} / RANKS_PER_NODE))}
[[ $OMP_NUM_THREADS -gt 0 ]] || OMP_NUM_THREADS=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_DUMP_ON_TIMEOUT=1
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} PYTHONUNBUFFERED=1

# Before the time limit SLURM signals this shell alone; srun passes it on to all nodes, whose ranks
# finish their step and write a checkpoint. In the last seconds they are ended as they are.
warn() {
    warned=1
    [[ -z $child ]] || kill -USR1 "$child" 2>/dev/null
    (
        trap 'kill "$pause"' TERM
        sleep "$((SIGNAL_SECONDS > 40 ? SIGNAL_SECONDS - 30 : SIGNAL_SECONDS / 2))" & pause=$!
        wait "$pause" && kill -USR2 $$
    ) &
    timer=$!
}
trap warn USR1
trap '[[ -z $timer ]] || kill "$timer" 2>/dev/null' EXIT
trap 'too_late=1' USR2
# scancel, preemption, scontrol requeue: SLURM signals the nodes itself, and knows what comes next
trap 'told=1' TERM

# Runs a command so that the traps act at once; its exit status is in $status.
run() {
    "$@" &
    child=$!
    while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do
        [[ $too_late -eq 0 ]] || break
    done
    for _ in {1..20}; do # only where it was too late
        kill -TERM "$child" 2>/dev/null || break
        sleep 0.5
    done
    child=
}

fail() {
    echo "maskbank: $1" >&2
    exit "${2:-1}"
}

# Ends this script too. On a node that was cut off the job may long since run elsewhere.
requeue() {
    for _ in {1..20}; do
        if known=$(timeout 30 scontrol --oneliner show job "$job"); then
            [[ $known == *" Restarts=$restarts "* ]] || fail "the job has been started elsewhere" 0
            timeout 30 scontrol requeue "$job" && sleep 300 && exit
        fi
        sleep 5
    done
    fail "the job could not be requeued; submit the same again, it goes on from its checkpoint"
}

# What the ranks' end means: 0 is done, 75 is again; else it failed, for the reason in the last line.
conclude() {
    "${PYTHON[@]}" -m launch.attempt end "$run_folder" --attempt "$attempt" --status "$status" \
        --warned "$warned" --told "$told" --max-crashes "$MAX_CRASHES" \
        --job "$(timeout 30 scontrol --oneliner show job "$job")"
    status=$?
    [[ $status -ne 75 ]] || requeue
}

read_folders() {
    folders=$("${PYTHON[@]}" -m trainer.folders "$@") || exit
    read_json='import json, sys; print(json.loads(sys.argv[1])[sys.argv[2]])'
    run_folder=$("${PYTHON[@]}" -c "$read_json" "$folders" run)
    shards=$("${PYTHON[@]}" -c "$read_json" "$folders" shards)
}

read_folders "$@"
nodes=$SLURM_JOB_NODELIST num_nodes=$((SLURM_JOB_NUM_NODES - SPARE_NODES))
[[ $num_nodes -gt 0 ]] || fail "SPARE_NODES $SPARE_NODES leaves none of $SLURM_JOB_NUM_NODES nodes"
"${PYTHON[@]}" -m launch.attempt begin "$run_folder" --attempt "$attempt" --nodes "$nodes" \
    --max-restarts "$MAX_RESTARTS" --job "$(scontrol --oneliner show job "$job")" || exit
record=$run_folder/slurm/$attempt
cp "$0" "$record/script.sbatch"

# A minute on every node: devices, shards, and a sum over all; then the nodes to train on.
if [[ $CHECK_SECONDS -gt 0 ]]; then
    run srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 "${PYTHON[@]}" -m launch.node_check \
        look --record "$record" --shards "$shards" --device "$DEVICE" \
        --ranks-per-node "$RANKS_PER_NODE" --seconds "$CHECK_SECONDS"
    nodes=$("${PYTHON[@]}" -m launch.node_check choose --record "$record" --num-nodes "$num_nodes" \
        --names "$(scontrol show hostnames "$nodes")") || [[ $warned -eq 1 ]] || exit
fi

if [[ -n $STAGE_FOLDER ]]; then
    stage=$STAGE_FOLDER/maskbank-$SLURM_JOB_ID
    run srun --nodes="$num_nodes" --ntasks="$num_nodes" --nodelist="$nodes" --kill-on-bad-exit=1 \
        "${PYTHON[@]}" -m data_pipeline.stage "$shards" "$stage"
    [[ $status -eq 0 || $told -eq 1 || $warned -eq 1 ]] ||
        fail "the shards could not be copied to $stage on every node" "$status"
    set -- "$@" "data.shards=$stage"
fi

# One torchrun a node; they meet on the first one, at a port that no other start of a job has.
head=$(scontrol show hostnames "$nodes" | head -n1)
port=$((20000 + (SLURM_JOB_ID * 7 + restarts) % 10000))
status=0
if [[ $told -eq 0 && $warned -eq 0 ]]; then
    echo "training on $nodes, $RANKS_PER_NODE ranks each; output in $run_folder/logs"
    run srun --nodes="$num_nodes" --ntasks="$num_nodes" --nodelist="$nodes" --kill-on-bad-exit=1 \
        "${PYTHON[@]}" -m launch.node_agent --run "$run_folder" --attempt "$attempt" \
        --nnodes="$num_nodes" --nproc-per-node="$RANKS_PER_NODE" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-id="$attempt" --rdzv-endpoint="$head:$port" \
        -m trainer.train "$@"
fi
conclude
[[ -z $STAGE_FOLDER ]] || srun --nodes="$num_nodes" --ntasks="$num_nodes" --nodelist="$nodes" \
    rm -rf -- "$stage"
exit "$status"
