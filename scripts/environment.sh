# Sourced by the other scripts: makes .venv beside this folder with everything that ling needs, once; the kernels are
# compiled again when their sources change. LING_BUILD_CUDA=1 or 0 forces or forbids CUDA's (see setup.py).
# usage: . scripts/environment.sh; make_environment [EXTRA]     EXTRA: an extra of pyproject.toml, such as test

TORCH=2.13.0
TRANSFORMERS_4=4.57.6 # the last of version 4, beside the newest that pip installs; tests/hf names it, too

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python3.13; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer with the venv module is needed; install it, or name it: PYTHON=/path/to/python3 $0" >&2
    return 2
}

make_environment() {
    local extra=${1:-} python wanted stamp
    stamp=.venv/ling-installed${extra:+-$extra}
    wanted="$(cat pyproject.toml setup.py scripts/environment.sh kernels/csrc/* | cksum) ${LING_BUILD_CUDA:-}"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    python=$(find_python) || return
    echo "installing into .venv (torch $TORCH, megatron-core, ling${extra:+ and its $extra tools}) ..."
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # torch by its exact version and first: a looser requirement would take the newest build, CUDA packages included,
    # also where an index serves a CPU build of this one.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==$TORCH" >.venv/pip.log 2>&1 &&
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" >>.venv/pip.log 2>&1 || {
        tail -n 20 .venv/pip.log >&2
        echo "error: pip could not install what is needed (the whole log is .venv/pip.log); run this again when that is mended" >&2
        return 1
    }
    echo "$wanted" >"$stamp"
}

# transformers 4 in a folder of its own, for PYTHONPATH, with the packages that it wants in other versions.
make_transformers_4() {
    local folder=.venv/transformers-$TRANSFORMERS_4
    [ ! -d "$folder" ] || return 0
    echo "installing into $folder ..."
    rm -rf "$folder.partial"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder.partial" \
        "transformers==$TRANSFORMERS_4" "huggingface-hub==0.36.2" "tokenizers==0.22.2" >.venv/pip.log 2>&1 || {
        tail -n 20 .venv/pip.log >&2
        echo "error: pip could not install transformers $TRANSFORMERS_4 (the whole log is .venv/pip.log); run this again when that is mended" >&2
        return 1
    }
    mv "$folder.partial" "$folder"
}
