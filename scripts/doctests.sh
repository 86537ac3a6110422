#!/usr/bin/env bash
# Runs the examples in the docstrings of the package: bash scripts/doctests.sh [pytest arguments]
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,/^[^#]/s/^# \?//p' "$0"; exit ;;
esac
cd "$(dirname "$0")/.."
source scripts/environment.sh test,smollm2
JAX_PLATFORMS=cpu exec .venv/bin/python -m pytest --doctest-modules rlhf_jax "$@"
