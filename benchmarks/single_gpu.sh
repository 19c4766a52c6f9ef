#!/usr/bin/env bash
# All measurements on one GPU, in about half an hour; names select parts:
#     benchmarks/single_gpu.sh [tests] [attention] [generation] [steps] [answers]
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-outputs/benchmarks}
MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
mkdir -p "$OUT"
run() { "$PYTHON" launch/train.py "$@" checkpoint.overwrite=true log.progress=false || echo "failed: $*"; }

part() {
    case $1 in
        tests) "$PYTHON" -m pytest -q -m gpu tests ;;  # the slow ones too
        attention)
            "$PYTHON" launch/benchmark.py attention --num-tokens 8192 32768 131072 --retention 0.25 0.125 \
                --csv "$OUT/attention.csv"
            "$PYTHON" launch/benchmark.py attention --num-tokens 524288 --retention 0.125 --repetitions 2 \
                --methods "dense cuDNN" "dense fa4" "LRSA flex" "LRSA fa4" --csv "$OUT/attention.csv"
            "$PYTHON" benchmarks/plot.py "$OUT/attention.csv" "$OUT/attention.png" ;;
        generation)
            "$PYTHON" launch/benchmark.py generation --num-tokens 8192 32768 131072 --retention 0.25 0.125 \
                --csv "$OUT/generation.csv" ;;
        steps)
            "$PYTHON" launch/benchmark_steps.py --num-tokens 32768 131072 --retention 1 0.25 0.125 \
                --csv "$OUT/steps.csv" -- +recipe=step_1b5 ;;
        answers)
            for kind in lrsa dense; do
                run +recipe=qa_smollm2 attention=$kind model.name="$MODEL" eval.before=false log.wandb=disabled \
                    attention.lag_size=512 eval.layers=[] 'eval.retentions=[1.0,0.5,0.25,0.125]' \
                    data.questions_per_context=1 \
                    checkpoint.every=50 output_dir="$OUT/answers_$kind"
            done
            "$PYTHON" benchmarks/table.py "$OUT"/answers_* ;;
        *) echo "unknown part: $1 (tests, attention, generation, steps, answers)" >&2; exit 2 ;;
    esac
}

for name in ${@:-tests attention generation steps answers}; do
    echo "== $name"
    part "$name" 2>&1 | tee "$OUT/$name.log"
done
