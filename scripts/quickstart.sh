#!/usr/bin/env bash
# Runs the four steps of RLHF on the CPU, from scratch to a table of results:
#   bash scripts/quickstart.sh [WORKDIR] [--config.KEY=VALUE …]
# Run it again to resume an interrupted run; a finished one only prints its table.
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,/^[^#]/s/^# \?//p' "$0"; exit ;;
esac
cd "$(dirname "$0")/.."
workdir=runs/quickstart
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  workdir=$1
  shift
fi
source scripts/environment.sh ""
JAX_PLATFORMS=cpu exec .venv/bin/python -m rlhf_jax \
  --config=experiments/quickstart.py --workdir="$workdir" "$@"
