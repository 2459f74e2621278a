set -uo pipefail
export PYTHONUNBUFFERED=1
warned=0 told=0 child=
# of an array this task alone: the number of one of its tasks means all of them
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}
# what is finished stays: near the time limit the task is requeued and goes on with the rest
trap 'warned=1; [[ -z $child ]] || kill -TERM "$child"' USR1
trap 'told=1' TERM

"${PYTHON[@]}" -m data_pipeline.cli build "$@" --processes "${SLURM_CPUS_PER_TASK:-1}" \
    --node-rank "$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))" \
    --num-nodes "${SLURM_ARRAY_TASK_COUNT:-1}" &
child=$!
while wait "$child"; status=$?; kill -0 "$child" 2>/dev/null; do :; done
[[ $warned -eq 1 && $told -eq 0 && $status -ne 0 && $status -ne 2 ]] || exit "$status"
[[ ${SLURM_RESTART_COUNT:-0} -lt $MAX_RESTARTS ]] || {
    echo "maskbank: the task was restarted $MAX_RESTARTS times, the most that it may be; ending" >&2
    exit 1
}
for _ in {1..20}; do
    if known=$(timeout 30 scontrol --oneliner show job "$job"); then
        # on a node that was cut off the task may long since run elsewhere
        [[ $known == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] || exit 0
        timeout 30 scontrol requeue "$job" && sleep 300 && exit
    fi
    sleep 5
done
echo "maskbank: the task could not be requeued; submit the same again, it goes on" >&2
exit 1
