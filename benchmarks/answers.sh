#!/usr/bin/env bash
# Does a model answer from a smaller cache? Dense tuning against tuning on several caches in turn, on the same data, for
# the same steps, by several seeds. Needs two GPUs, or one after the other with GPUS="0 0". Parts:
#     benchmarks/answers.sh data            rows of PASSAGES, articles held out
#     benchmarks/answers.sh 1 2 3           dense and LRSA tuning with each of these seeds, one on each GPU
#     benchmarks/answers.sh compare         the table of all seeds that are whole
# Seeds may run at the same time: three commands took 14 minutes on two H100s. A part that was stopped resumes. Results, without weights, are copied
# to RESULTS. TINY=1 tries the same with a tiny random model, on a CPU too.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
WORK=${WORK:-outputs/answers}
RESULTS=${RESULTS:-$WORK/results}
MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
PASSAGES=${PASSAGES:-passages.jsonl.gz}  # see benchmarks/answers_data.py
LIMIT=${LIMIT:-560}                      # seconds of one pair of runs
read -ra GPUS <<< "${GPUS:-0 1}"

# The layers of qa_smollm2, and one retention for all layers beside them.
CACHES="{0-: 1.0}, {3 7 8 14 17 18 20 23 24: 1.0, rest: 0.0}, {14 17 18 20 23 24: 1.0, rest: 0.0}"
CACHES+=", {18 20 23: 1.0, rest: {retention: 0.0, lag_size: 64}}"
UNIFORM="{0-: {retention: 0.25, lag_size: 512}}, {0-: {retention: 0.125, lag_size: 512}}"
# Held-out questions are all those of whole articles. Recall keeps the model from learning answers by heart.
SOURCES="{source: recall, path: $WORK/data/texts.jsonl, weight: 2, num_validation: ${TINY:-12}}"
SOURCES+=", {source: stdlib_qa, weight: 1, num_validation: ${TINY:-16}}"
for source in xquad covid; do
    SOURCES+=", {path: $WORK/data/${source}_train.jsonl, validation_path: $WORK/data/${source}_test.jsonl"
    SOURCES+=", make_contexts: true, weight: 0.5, num_validation: ${TINY:-1000}}"
done
SETTINGS=(
    +recipe=qa_smollm2 data=mixture "data.sources=[$SOURCES]" data.questions_per_context=12
    "eval.layers=[$CACHES, $UNIFORM]" eval.before=false
    optim.num_steps=240 checkpoint.every=80 checkpoint.keep=1 checkpoint.export=false log.wandb=disabled log.progress=false
)
if [ -n "${TINY:-}" ]; then
    SETTINGS+=(
        model=tiny_qwen2 model.random.num_hidden_layers=30 seq_len=4096 data.questions_per_context=2 eval.num_examples=1
        optim.num_steps=2 optim.warmup_steps=1 optim.micro_batch=1 checkpoint.every=1
    )
else
    SETTINGS+=(model.name="$MODEL")
fi

tune() {  # tune PLACE NAME SEED SETTING...
    local place=$1 directory=$WORK/$2_$3 seed=$3; shift 3
    [ -e "$directory/COMPLETED" ] && return
    # Without a launcher each run finds a free port by itself.
    CUDA_VISIBLE_DEVICES=${GPUS[$place]} timeout --signal=TERM "$LIMIT" \
        "$PYTHON" launch/train.py "${SETTINGS[@]}" "$@" seed="$seed" output_dir="$directory" \
        > "$directory.log" 2>&1 || { echo "not done: $directory, see $directory.log" >&2; tail -n 5 "$directory.log" >&2; }
}

copy_results() {
    local run
    for run in "$WORK"/dense_* "$WORK"/lrsa_*; do
        [ -d "$run" ] || continue
        mkdir -p "$RESULTS/$(basename "$run")"
        cp "$run"/{config.yaml,*.jsonl,*.txt,*.png,COMPLETED} "$RESULTS/$(basename "$run")" 2> /dev/null || true
    done
}

compare() {
    local dense="" lrsa="" seed run
    for run in "$RESULTS"/dense_*; do
        seed=${run##*_}
        [ -e "$run/COMPLETED" ] && [ -e "$RESULTS/lrsa_$seed/COMPLETED" ] || continue
        dense+=,$run lrsa+=,$RESULTS/lrsa_$seed
    done
    [ -n "$dense" ] || { echo "no seed is whole" >&2; return 1; }
    "$PYTHON" launch/compare.py "dense-tuned=${dense#,}" "LRSA-tuned=${lrsa#,}" --output "$RESULTS"
}

mkdir -p "$WORK" "$RESULTS"
trap copy_results EXIT
for part in "${@:-help}"; do
    case $part in
        data) "$PYTHON" benchmarks/answers_data.py "$PASSAGES" "$WORK/data" ;;
        compare) copy_results; compare ;;
        [0-9]*)
            tune 0 dense "$part" attention=dense & first=$!
            if [ "${GPUS[0]}" = "${GPUS[1]}" ]; then wait "$first"; fi
            tune 1 lrsa "$part" "attention.layers=[$CACHES]" & second=$!
            wait "$first" "$second" ;;
        *) echo "parts: data, numbers of seeds, compare" >&2; exit 2 ;;
    esac
done
