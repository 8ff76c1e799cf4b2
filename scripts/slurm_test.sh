#!/usr/bin/env bash
# The job files under a real SLURM of five nodes on this machine: minutes, as root, Debian's packages installed by apt.
# Where SLURM cannot be run the tests are skipped with the reason. Arguments go to pytest. Folders of failed tests are kept.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/environment.sh
make_environment test
exec .venv/bin/python -m pytest -q -rs -m slurm -o tmp_path_retention_policy=failed tests/slurm "$@"
