#!/usr/bin/env bash
# Runs the four steps of RLHF on CPU, from nothing to a table:
#   bash scripts/quickstart.sh [WORKDIR] [--config.KEY=VALUE …]
# Repeated, it resumes where it stopped; once finished, it only prints the table.
set -euo pipefail
cd "$(dirname "$0")/.."
workdir=runs/quickstart
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  workdir=$1
  shift
fi
source scripts/environment.sh ""
JAX_PLATFORMS=cpu exec .venv/bin/python -m rlhf_jax \
  --config=experiments/quickstart.py --workdir="$workdir" "$@"
