#!/usr/bin/env bash
# Sets up .venv and runs the tests. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

selection="not slow"
arguments=()
for argument in "$@"; do
    case $argument in
        --all) selection="" ;;
        -h | --help) echo "usage: ./scripts/test.sh [--all] [pytest arguments]   --all: the slow tests too"; exit 0 ;;
        *) arguments+=("$argument") ;;
    esac
done

. scripts/environment.sh
make_environment test
make_transformers_4
exec .venv/bin/python -m pytest -m "$selection" ${arguments[@]+"${arguments[@]}"}
