#!/usr/bin/env bash
# Checks format, lint, types and texture: bash scripts/check_style.sh
# Most of what it finds in format and lint is corrected by: ruff format . && ruff check --fix .
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,/^[^#]/s/^# \?//p' "$0"; exit ;;
esac
cd "$(dirname "$0")/.."
source scripts/environment.sh test,smollm2
.venv/bin/python -m ruff format --check .
.venv/bin/python -m ruff check .
.venv/bin/python -m mypy
.venv/bin/python scripts/texture.py --check
.venv/bin/python scripts/constraints.py
