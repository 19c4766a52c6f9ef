#!/usr/bin/env bash
# Whole steps beside the estimates of launch/plan.py: peak memory and time at three lengths of two model sizes, on one GPU
# of 80 GB, and the levers that memory=auto chooses. Each part takes less than two minutes and prints a Markdown table:
#     benchmarks/plan.sh [small] [large] [host] [auto]
# TINY=1 runs all of it on a CPU, with a tiny model, to see that it runs.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-outputs/benchmarks/plan}
TINY=${TINY:-}
mkdir -p "$OUT"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

measure() {  # measure NAME "LENGTHS" KEY=VALUE...
    local csv=$OUT/$1.csv lengths=$2
    shift 2
    [ -n "$TINY" ] && lengths="2048 4096" && set -- +recipe=smoke
    rm -f "$csv"
    # shellcheck disable=SC2086
    "$PYTHON" launch/benchmark_steps.py --num-tokens $lengths --steps 1 --csv "$csv" -- "$@"
    "$PYTHON" launch/plan.py "$@" num_targets=1024 gpus=1 compare="$csv"
}

SMALL=(+recipe=step_1b5 model.liger_kernel=true data.context_length=4096)
LARGE=(+recipe=step_8b model.liger_kernel=true data.context_length=4096 parallel.sp_size=1)
for part in "${@:-small}"; do
    echo "== $part"
    case $part in
        small) measure small "65536 131072 262144" "${SMALL[@]}" ;;
        large) measure large "32768 65536 131072" "${LARGE[@]}" model.lora.rank=16 memory.offload_checkpoints=true ;;
        host) measure host "131072" "${SMALL[@]}" memory=long zero=stage3_offload ;;
        auto) measure auto "393216" "${SMALL[@]}" seq_len=393216 memory=auto ;;
        *) echo "unknown part: $part (small, large, host, auto)" >&2; exit 2 ;;
    esac
done
