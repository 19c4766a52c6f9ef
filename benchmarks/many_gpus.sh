#!/usr/bin/env bash
# An 8B shape on all GPUs of a host (four or eight): parity, step time and traffic against dense attention, scaling from
# one GPU up, a million tokens, the longest sequence. Pass names of parts to run some of them:
#     benchmarks/many_gpus.sh [parity] [steps] [scaling] [million] [longest]
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/benchmarks}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
mkdir -p "$OUT"
on() {  # on NUMBER_OF_GPUS SCRIPT ARGUMENT...
    local gpus=$1 script=$2; shift 2
    deepspeed --num_gpus "$gpus" "launch/$script.py" "$@" || echo "failed: $*"
}
steps() {  # steps NUMBER_OF_GPUS CSV OPTION... -- OVERRIDE...
    local gpus=$1 csv=$2; shift 2
    on "$gpus" benchmark_steps --csv "$OUT/$csv.csv" "$@" +recipe=step_8b parallel.sp_size="$gpus"
}

part() {
    case $1 in
        parity)
            for size in 2 "$GPUS"; do
                on "$GPUS" selftest +recipe=smoke seq_len=8192 data.context_length=7000 attention.retention=0.125 \
                    parallel.sp_size="$size" model.random.num_attention_heads=8 model.dtype=fp32
            done ;;
        steps) steps "$GPUS" steps --num-tokens 131072 --retention 1 0.25 0.125 --steps 3 -- ;;
        scaling)
            for ((gpus = 1; gpus <= GPUS; gpus *= 2)); do
                steps "$gpus" scaling --num-tokens 131072 --steps 2 -- zero=stage3_offload
            done ;;
        million) steps "$GPUS" million --num-tokens 1048576 --steps 1 -- ;;
        longest) steps "$GPUS" longest --num-tokens 2097152 3145728 4194304 --steps 1 -- zero=stage3_offload ;;
        *) echo "unknown part: $1 (parity, steps, scaling, million, longest)" >&2; exit 2 ;;
    esac
}

for name in ${@:-parity steps scaling million longest}; do
    echo "== $name"
    part "$name" 2>&1 | tee "$OUT/$name.log"
done
