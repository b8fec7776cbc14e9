#!/bin/bash
%%options

# Written by `lrnn submit` from slurm/job.sh; slurm/README.md explains it. This shell runs on the job's first node: it
# starts one task a rank, passes signals on to them, and decides what becomes of the job when they are done.
#   0     trained: the job is done
#   2     a mistake in what was asked: the job is done, for it would fail again
#   85    stopped by a signal after saving: back into the queue
#   other (a crash, a killed rank): back into the queue
# A job that has left no new checkpoint in %%attempts starts in a row ends there.

runs=(%%runs)
run=${runs[${SLURM_ARRAY_TASK_ID:-0}]:?no such run in the array}
restart=${SLURM_RESTART_COUNT:-0}
# An element of an array goes by its number in it: the last one's job id is that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
starts=$run/launch/starts # the checkpoint that this start found, and how many before it in a row left none
export LRNN_LOGS=$run/logs/$job-start$restart

say() { echo "lrnn: $(date '+%F %T') $*"; }
newest() { # of a file system without links, or a copy of the run, by number
    local folders=("$run"/checkpoints/step-*)
    readlink "$run/checkpoints/latest" || { [[ -d ${folders[-1]} ]] && basename "${folders[-1]}"; } || echo none
}

signalled=
warned= # by SIGUSR1: the time limit is near
step=
stop() { # srun hands SIGUSR1 on to the ranks as it is; SIGTERM would end it
    signalled=$1
    [[ $1 != SIGUSR1 ]] || warned=yes
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null
}
trap 'stop SIGUSR1' USR1
trap 'stop SIGTERM' TERM

found=$(newest)
fruitless=0
if ((restart > 0)) && [[ -e $starts ]]; then # none: SLURM requeued the job before this script ever ran
    read -r before fruitless <"$starts" || exit 1
    [[ $before == "$found" ]] && fruitless=$((fruitless + 1)) || fruitless=0
fi
echo "$found $fruitless" >"$starts" || exit 1 # uncounted starts could go on for ever
if ((fruitless >= %%attempts)); then
    say "no new checkpoint in the last $fruitless starts: given up"
    exit 1
fi
mkdir -p "$LRNN_LOGS" && rm -f "$LRNN_LOGS"/exit-* || exit 1
say "job $job, start $restart of $run on $SLURM_JOB_NODELIST, from checkpoint $found; logs in $LRNN_LOGS"

# The ranks meet at the address by which SLURM itself reaches the first node.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')
export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
%%setup

# What every task runs. It leaves its exit code in a file, for srun tells only the highest, and reports a stop as no
# failure: the first rank that stops must not end those that are still saving.
rank='
trap : USR1 TERM INT # the trainer gets them, too, and this shell waits for it
if ((SLURM_NTASKS > 1)); then
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
fi
"$@"
code=$?
echo $code >"$LRNN_LOGS/exit-$SLURM_PROCID"
((code == 85)) || exit $code'

# Whoever saw a mistake knows; else the first rank, which is on this node; else any that failed; else srun.
verdict() {
    local codes
    codes=$(cat "$LRNN_LOGS"/exit-* 2>/dev/null)
    if grep -qx 2 <<<"$codes"; then
        echo 2
    else
        cat "$LRNN_LOGS/exit-0" 2>/dev/null || grep -vx 0 <<<"$codes" | grep -m 1 . || echo $(($1 ? $1 : 1))
    fi
}

code=143 # if a signal came before the ranks
if [[ -z $signalled ]]; then
    srun --export=ALL --kill-on-bad-exit=1 --wait=0 --output="$LRNN_LOGS/rank-%5t.log" %%srun \
        bash -c "$rank" rank \
        %%command &
    step=$!
    while # a signal ends `wait`, not the step
        signalled=
        wait "$step"
        code=$?
        [[ -n $signalled ]]
    do
        say "$signalled: asked the ranks to save and stop"
    done
    code=$(verdict "$code")
fi

case $code in
    0) say "done" && exit 0 ;;
    2) say "a mistake in what was asked: $(tail -n 1 "$LRNN_LOGS/rank-00000.log")" && exit 2 ;;
    85) say "stopped after saving $(newest)" ;;
    *) say "exit code $code; the ranks' last words are in $LRNN_LOGS" ;;
esac
record=$(scontrol show job "$job")
if [[ $record != *" Restarts=$restart "* ]]; then # a node that was taken for dead comes back
    say "the job was started anew meanwhile: left to that"
    exit "$code"
fi
# SLURM is ending the job itself: by `scancel` (or by preempting it without grace), unless the time limit was near.
if [[ -z $warned && $record =~ JobState=(CANCELLED|COMPLETING) ]]; then
    say "SLURM is ending this job itself: not put back into the queue"
    exit "$code"
fi
[[ $(newest) == "$found" ]] && fruitless=$((fruitless + 1)) || fruitless=0
if ((fruitless >= %%attempts)); then
    say "no new checkpoint in the last $fruitless starts: given up"
    exit "$code"
fi
say "back into the queue"
scontrol requeue "$job" || exit "$code"
