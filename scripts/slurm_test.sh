#!/usr/bin/env bash
# The job files under a real SLURM of three nodes on this machine: minutes, as root, Debian's packages installed by apt.
# Where SLURM cannot be run the tests are skipped with the reason. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/environment.sh
make_environment test
exec .venv/bin/python -m pytest -q -m slurm tests/slurm "$@"
