#!/usr/bin/env bash
# Costs and savings of the settings in docs/memory.md, and the longest sequences. Each part ends within ten minutes and
# leaves a mark when it is done: the same command runs the missing parts. Names select parts:
#     benchmarks/memory.sh [levers] [half] [dense] [million] [lora] [full] [two]
# `levers`, `half`, `dense` and `million` need one GPU of 80 GB and 128 GiB of host memory, `lora` and `full` 256 GiB,
# `two` two GPUs. TINY=1 runs all of it on a CPU, with a tiny model, to see that it runs.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-outputs/benchmarks/memory}
TINY=${TINY:-}
mkdir -p "$OUT"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
K=1024
SMALL=(+recipe=step_1b5 model.liger_kernel=true data.context_length=4096)
LARGE=(+recipe=step_8b model.liger_kernel=true data.context_length=4096)
HOST=(zero=stage3_offload)
if [ -n "$TINY" ]; then
    K=16
    SMALL=(+recipe=smoke memory.tile_size=200)
    LARGE=("${SMALL[@]}")
    HOST=(zero=stage3)  # DeepSpeed's CPUAdam takes a minute to compile
fi

steps() {  # steps MARK GPUS NUM_TOKENS NUM_STEPS RETENTION KEY=VALUE...: one row of the CSV file
    local mark=$OUT/$1.done gpus=$2 options=(--num-tokens $(($3 * K)) --steps "$4" --retention "$5" --csv "$OUT/steps.csv")
    [ -e "$mark" ] && return
    shift 5
    local command=("$PYTHON")
    [ "$gpus" -gt 1 ] && command=(deepspeed --num_gpus "$gpus")
    [ "$gpus" -gt 1 ] && [ -n "$TINY" ] && command=(deepspeed --num_accelerators "$gpus")
    if "${command[@]}" launch/benchmark_steps.py "${options[@]}" -- "$@"; then touch "$mark"; else echo "failed: $*"; fi
}

part() {
    case $1 in
        levers)  # 131,072 tokens of 1.5B: each lever alone, both, and both with the optimizer on the host
            steps none 1 128 5 0.125 "${SMALL[@]}"
            steps offload 1 128 5 0.125 "${SMALL[@]}" memory.offload_checkpoints=true
            steps tiled 1 128 5 0.125 "${SMALL[@]}" memory.tiled_mlp=true
            steps long 1 128 5 0.125 "${SMALL[@]}" memory=long
            steps host 1 128 5 0.125 "${SMALL[@]}" memory=long "${HOST[@]}" ;;
        half) steps half 1 512 2 0.125 "${SMALL[@]}" memory=long "${HOST[@]}" ;;
        dense) steps dense 1 512 1 1 "${SMALL[@]}" memory=long "${HOST[@]}" ;;
        million) steps million 1 1024 2 0.125 "${SMALL[@]}" memory=long "${HOST[@]}" ;;
        lora) steps lora 1 512 1 0.125 "${LARGE[@]}" parallel.sp_size=1 memory=long model.lora.rank=16 ;;
        full)
            for tokens in 128 256 384 512; do
                steps full_$tokens 1 $tokens 1 0.125 "${LARGE[@]}" parallel.sp_size=1 memory=long "${HOST[@]}"
            done ;;
        two) steps two 2 128 3 0.125 "${LARGE[@]}" parallel.sp_size=2 memory.offload_checkpoints=true "${HOST[@]}" ;;
        *) echo "unknown part: $1 (levers, half, dense, million, lora, full, two)" >&2; exit 2 ;;
    esac
}

for name in ${@:-levers half dense million lora full two}; do
    echo "== $name"
    part "$name" 2>&1 | tee -a "$OUT/$name.log"
done
