#!/usr/bin/env bash
# Trains a small ten-direction translator on the embedded corpus, decodes the held-out test and prints the scores.
# Flags are handed on to `t5x_ext train`: --gin_file=optim/flora.gin for another optimizer, --run_dir=runs/other, --steps=2.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh core
# Large pages for the arrays of a step: on Linux a fifth less CPU time (ignored elsewhere).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
.venv/bin/t5x_ext train --gin_file=runs/quickstart.gin --run_dir=runs/quickstart "$@"

cat <<'EOF_NEXT'

What to try next:
  . .venv/bin/activate
  echo "Tuesday, Friday, and Sunday" | t5x_ext translate --run_dir=runs/quickstart --source_language=en --target_language=ja
  t5x_ext train --train_source=a.en --train_target=a.de --source_language=en --target_language=de --run_dir=out
                        two text files of your own; README.md has the whole example
  t5x_ext --help        everything else
EOF_NEXT
