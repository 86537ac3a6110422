#!/usr/bin/env bash
# Installs what the tests need and runs them: bash scripts/test.sh [pytest arguments]
# The slow ones are run by name: bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test,smollm2
exec .venv/bin/python -m pytest "$@"
