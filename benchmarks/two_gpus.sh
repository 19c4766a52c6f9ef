#!/usr/bin/env bash
# Sequence parallelism on two GPUs: parity on NCCL, step time against one GPU, traffic, longest sequence.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-outputs/benchmarks}
mkdir -p "$OUT"
exec > >(tee "$OUT/two_gpus.log") 2>&1
on() {  # on NUMBER_OF_GPUS SCRIPT ARGUMENT...
    local gpus=$1 script=$2; shift 2
    deepspeed --num_gpus "$gpus" "launch/$script.py" "$@" || echo "failed: $*"
}

"$PYTHON" -m pytest -q -m gpu tests/multi_gpu
for exchange in gather_kept head_groups; do
    on 2 benchmark_steps --num-tokens 131072 --retention 0.125 --csv "$OUT/exchanges.csv" -- \
        +recipe=step_1b5 parallel.sp_size=2 parallel.exchange=$exchange
done
on 2 selftest +recipe=smoke parallel.sp_size=2 seq_len=4096 data.context_length=3000
for gpus in 1 2; do
    on $gpus benchmark_steps --num-tokens 131072 --retention 1 0.125 --csv "$OUT/steps.csv" -- \
        +recipe=step_1b5 parallel.sp_size=$gpus
done
# The longest sequence: each ends at the first length that does not fit. 491,520 is 1.9 times 253,952 and more.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
on 1 benchmark_steps --num-tokens 229376 253952 --steps 1 --csv "$OUT/longest.csv" -- +recipe=step_1b5
on 2 benchmark_steps --num-tokens 442368 491520 --steps 1 --csv "$OUT/longest.csv" -- \
    +recipe=step_1b5 parallel.sp_size=2
