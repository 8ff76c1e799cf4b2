#!/usr/bin/env bash
# On a machine with a GPU: builds the kernels, runs their tests there, then the benchmarks, and prints a short table last.
#   PYTHON=python3 OUT=build/gpu kernels/bench/gpu.sh        needs torch with CUDA, nvcc, a C++20 compiler, pytest; no network
# Logs go to $OUT. Exit code: 0 if all of it passed.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
results=()

# step NAME COMMAND...: its output to $out/NAME.log and its end to the terminal; NAME, ok or FAILED, and time to the table
step() {
    local name=$1 start=$SECONDS state=ok
    shift
    printf '\n==> %s\n' "$name"
    "$@" >"$out/$name.log" 2>&1 || state=FAILED
    tail -n 40 "$out/$name.log"
    results+=("$(printf '%-28s %-7s %5d s' "$name" "$state" $((SECONDS - start)))")
    [ "$state" = ok ]
}

"$python" -c '
import torch
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())' || exit 1
if step build env LING_BUILD_CUDA=1 "$python" setup.py -q build_ext --inplace; then
    step tests_gpu "$python" -m pytest -q --durations=5 tests/gpu
    step tests_kernels "$python" -m pytest -q --durations=5 -m "not slow" tests/kernels
    step sass "$python" kernels/bench/sass.py
    for program in kernels/bench/*.py; do
        name=$(basename "$program" .py)
        [ "$name" = sass ] || step "bench_$name" "$python" "$program"
    done
fi
printf '\n%s\n' "${results[@]}"
[[ "${results[*]}" != *FAILED* ]]
