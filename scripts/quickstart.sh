#!/usr/bin/env bash
# Trains a small ten-direction translator on the embedded corpus, decodes the held-out test and prints the scores.
# Flags are handed on to `t5x_ext train`, for example --steps=2 or --run_dir=runs/other.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh core
exec .venv/bin/t5x_ext train --gin_file=runs/quickstart.gin --run_dir=runs/quickstart "$@"
