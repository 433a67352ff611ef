#!/usr/bin/env bash
# Writes scripts/locks/{core,test}.txt anew from pyproject.toml: exact versions with hashes, for every supported Python,
# without index addresses. Run it by hand after a change of dependencies, then run scripts/test.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools/venv"
"$tools/venv/bin/pip" install --quiet uv

compile() { # OUTPUT FLAG...
  local output=$1
  shift
  # The build backend is locked too: the project itself is installed without build isolation.
  printf 'hatchling\neditables\n' | "$tools/venv/bin/uv" pip compile --quiet pyproject.toml - "$@" --universal \
    --python-version 3.11 --fork-strategy fewest --generate-hashes --no-header --no-annotate --no-emit-index-url \
    --index-strategy unsafe-best-match --output-file "$output"
}

# One resolution with every extra that runs on a plain machine, so that extras never pull the core apart.
compile "$tools/all.txt" --extra seqio --extra beam --extra clean --extra gcs --extra tpu --extra notebooks \
  --extra pretrained --extra tasks --extra dev
sed -n 's/^\([A-Za-z][^ ]*==[^ ]*\).*/\1/p' "$tools/all.txt" >"$tools/constraints.txt"
compile scripts/locks/core.txt --constraint "$tools/constraints.txt"
compile scripts/locks/test.txt --constraint "$tools/constraints.txt" --extra seqio --extra beam --extra clean \
  --extra tpu --extra notebooks --extra pretrained --extra tasks --extra dev
