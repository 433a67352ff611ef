#!/usr/bin/env bash
# All checks: lint, types, import rules, shell scripts, documentation site, doctests, unit and system tests.
# Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
mypy
lint-imports
shellcheck scripts/*.sh .ci/run
site=$(mktemp -d)
mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml --site-dir "$site"
rm -rf "$site"
# One worker a core that this process may use; each keeps to one thread, so that they do not fight over cores. Most of
# the time goes into compilation, of which XLA's newer fusion emitters take two to three times as much.
workers=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
flags="--xla_cpu_multi_thread_eigen=false --xla_cpu_use_fusion_emitters=false"
export OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2 XLA_FLAGS="$flags ${XLA_FLAGS:-}"
exec pytest -n "$workers" --dist worksteal -q --durations=15 "$@"
