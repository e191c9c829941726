#!/usr/bin/env bash
# Run a df11 job on Hugging Face Jobs: the data stays within the Hub's own network.
# Needs `pip install huggingface_hub` and `hf auth login`.
#   ./hf-jobs.sh job.toml
set -euo pipefail
job=$(realpath "${1:?usage: hf-jobs.sh JOB.toml}")

# A new attempt continues where the last one ended.
hf jobs run --flavor cpu-upgrade --timeout 6h --attempts 3 --secrets HF_TOKEN \
    --volume "$(dirname "$job"):/job" \
    python:3.12 \
    bash -c "pip install --quiet 'df11[jobs] @ git+https://github.com/OWNER/df11' && df11 job run --json $(printf '/job/%q' "$(basename "$job")")"
