#!/usr/bin/env bash
# Installs what the tests need and runs them: bash scripts/test.sh [pytest arguments]
# The slow tests are not included; to run them, in one process: bash scripts/test.sh -n 0 -m slow
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,/^[^#]/s/^# \?//p' "$0"; exit ;;
esac
cd "$(dirname "$0")/.."
source scripts/environment.sh test,smollm2
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"  # two processes, each file in one of them
