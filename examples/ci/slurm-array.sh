#!/usr/bin/env bash
# A Slurm array: one task per job file in a folder, one model per file, so that models are converted in parallel.
#   sbatch --array=0-$(( $(ls jobs/*.toml | wc -l) - 1 ))%8 slurm-array.sh jobs
#SBATCH --job-name=df11
#SBATCH --cpus-per-task=8
#SBATCH --mem=2G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=df11-%A_%a.log
set -euo pipefail
folder=${1:?usage: sbatch --array=0-N slurm-array.sh FOLDER}
files=("$folder"/*.toml)
job=${files[$SLURM_ARRAY_TASK_ID]}

export TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}} # where shards wait for their upload
df11 job run --json "$job" >> "${job%.toml}.jsonl" & # In the background, so that the shell can forward the signal.
pid=$!
trap 'kill -TERM "$pid"' TERM
code=0
wait "$pid" || code=$?
if [ "$code" -gt 128 ]; then # The signal has only ended the wait.
    code=0
    wait "$pid" || code=$?
fi
case $code in
    5 | 130) scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" ;; # It continues where it stopped.
esac
exit "$code"
