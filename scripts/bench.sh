#!/usr/bin/env bash
# Runs the benchmarks in .venv and prints their tables: figures of this machine, each against its target.
# Arguments go to tools/bench_trainer.py (--help lists them).
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ! -x .venv/bin/python ]]; then
    echo "bench.sh: there is no .venv; ./scripts/quickstart.sh or ./scripts/test.sh makes it" >&2
    exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec .venv/bin/python tools/bench_trainer.py "$@"
