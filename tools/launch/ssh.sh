#!/bin/bash
# Train on machines that can be reached by SSH without a password and share this folder at the same path:
#
#     tools/launch/ssh.sh hosts.txt configs/moe_10b.yaml parallel.ep=8 [key=value ...]
#
# hosts.txt has one machine a line (empty lines and # comments are skipped); the first one is where all meet. Ctrl-C or
# SIGTERM lets the run end after its step, saved; the same command resumes it. The first machine to fail ends all.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: tools/launch/ssh.sh HOSTS CONFIG [key=value ...]" >&2
    exit 2
fi

PYTHON=${PYTHON:-.venv/bin/python}
PORT=${PORT:-29500}
PROCESSES=${PROCESSES:-gpu}  # on one machine; gpu: as many as it has GPUs
RESTARTS=${RESTARTS:-3}      # after an error, before the run itself fails
SAVING=${SAVING:-540}        # seconds to save in before torchrun kills; torch's own: 30
mapfile -t hosts < <(sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "$1")
shift
if [ ${#hosts[@]} -eq 0 ]; then
    echo "the host file names no machine; write one a line" >&2
    exit 2
fi

id="mmoe-$(date +%s)-$$"
run=("$PYTHON" -m torch.distributed.run --nnodes="${#hosts[@]}" --nproc-per-node="$PROCESSES"
    --max-restarts="$RESTARTS" --rdzv-backend=c10d --rdzv-endpoint="${hosts[0]}:$PORT" --rdzv-id="$id"
    -m mmoe train "$@")
printf -v command '%q ' "${run[@]}"
printf -v folder '%q' "$PWD"

stopped=""
stop() { # torchrun hands the signal to its processes; only its own command line has the id ([-]: and not pkill's)
    stopped=yes
    for host in "${hosts[@]}"; do
        ssh -n "$host" "pkill -TERM -f -- '[-]-rdzv-id=$id'" || true # already gone there
    done
}
trap stop INT TERM

running=()
for host in "${hosts[@]}"; do
    ssh -n "$host" "cd $folder && TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SAVING exec $command" &
    running+=($!)
done

status=0
while [ ${#running[@]} -gt 0 ]; do
    sleep 1
    for index in "${!running[@]}"; do
        kill -0 "${running[index]}" 2>/dev/null && continue
        code=0
        wait "${running[index]}" || code=$?
        [ "$status" -ne 0 ] || status=$code # the first failure, not what follows from it
        unset "running[index]"
    done
    if [ "$status" -ne 0 ] && [ -z "$stopped" ]; then
        stop
    fi
done
exit "$status"
