#!/usr/bin/env bash
# What two GPUs show about sequence parallelism: parity on NCCL, step time against one GPU, traffic, longest sequence.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-outputs/benchmarks}
mkdir -p "$OUT"
on() {  # on NUMBER_OF_GPUS SCRIPT ARGUMENT...
    local gpus=$1 script=$2; shift 2
    deepspeed --num_gpus "$gpus" "launch/$script.py" "$@" || echo "failed: $*"
}
common="checkpoint.overwrite=true log.progress=false"

"$PYTHON" -m pytest -q -m gpu tests/multi_gpu
on 2 selftest +recipe=smoke parallel.sp_size=2 seq_len=4096 data.context_length=3000
on 1 train +recipe=step_1b5 $common output_dir="$OUT/sp_1gpu"
on 2 train +recipe=step_1b5 $common parallel.sp_size=2 output_dir="$OUT/sp_2gpus"
on 2 train +recipe=step_1b5 $common parallel.sp_size=2 attention=dense output_dir="$OUT/sp_2gpus_ulysses"
for tokens in 262144 524288; do  # the longest sequence that fits on one GPU, and twice as many tokens on two
    on 1 train +recipe=step_1b5 $common seq_len=$tokens optim.num_steps=3 output_dir="$OUT/long_1gpu_$tokens"
    on 2 train +recipe=step_1b5 $common seq_len=$((2 * tokens)) optim.num_steps=3 parallel.sp_size=2 \
        output_dir="$OUT/long_2gpus_$((2 * tokens))"
done
"$PYTHON" benchmarks/table.py "$OUT"/sp_* "$OUT"/long_*
