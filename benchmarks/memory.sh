#!/usr/bin/env bash
# Costs and savings of the settings in docs/memory.md, and the longest sequences. Each part ends within ten minutes, writes
# a CSV file, and leaves a mark when it is done: the same command runs the missing parts. Names select parts:
#     benchmarks/memory.sh [none] [offload] [tiled] [long] [host] [half] [million] [lora] [lora_128k] \
#         [qlora_128k] [full] [two_8bit] [two] [yarn] [plain]
# One GPU of 80 GB and 128 GiB of host memory are enough for most; `lora` and `full` need 256 GiB, `two_8bit` and `two`
# two GPUs, `yarn` and `plain` the small model of `make setup` (MODEL: another folder that has it). On several GPUs, parts
# run at once with a CUDA_VISIBLE_DEVICES and a MASTER_PORT each. TINY=1 runs all on a CPU, with a tiny model.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-outputs/benchmarks/memory}
MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
TINY=${TINY:-}
mkdir -p "$OUT"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
K=1024
SMALL=(+recipe=step_1b5 model.liger_kernel=true data.context_length=4096)
LARGE=(+recipe=step_8b model.liger_kernel=true data.context_length=4096 parallel.sp_size=1)
HOST=(zero=stage3_offload)
AUTO=(memory=auto)
RUN=(+recipe=qa_smollm2_32k "model.name=$MODEL")
SHORT_DENSE=32768
if [ -n "$TINY" ]; then
    K=12
    SMALL=(+recipe=smoke memory.tile_size=200)
    LARGE=("${SMALL[@]}")
    HOST=(zero=stage3)  # DeepSpeed's CPUAdam takes a minute to compile
    AUTO=(memory=long)  # memory=auto needs a GPU
    RUN=(+recipe=smoke optim.num_steps=2 "+model.rope={rope_type: yarn, factor: 4.0}")
    SHORT_DENSE=1536
fi

steps() {  # steps NAME GPUS NUM_TOKENS NUM_STEPS "RETENTIONS" KEY=VALUE...: a CSV file with a row for each retention
    local mark=$OUT/$1.done csv=$OUT/$1.csv gpus=$2 options=(--num-tokens $(($3 * K)) --steps "$4" --retention)
    [ -e "$mark" ] && return
    # shellcheck disable=SC2206
    options+=($5 --dense-warm-up-tokens "$SHORT_DENSE" --csv "$csv")
    shift 5
    rm -f "$csv"
    local command=("$PYTHON")
    [ "$gpus" -gt 1 ] && command=(deepspeed --num_gpus "$gpus")
    [ "$gpus" -gt 1 ] && [ -n "$TINY" ] && command=(deepspeed --num_accelerators "$gpus")
    if "${command[@]}" launch/benchmark_steps.py "${options[@]}" -- "$@"; then touch "$mark"; else echo "failed: $*"; fi
}

run() {  # run NAME KEY=VALUE...: a training run with its evaluations
    local mark=$OUT/$1.done name=$1
    [ -e "$mark" ] && return
    shift
    if "$PYTHON" launch/train.py "${RUN[@]}" run_name="$name" output_dir="$OUT/$name" checkpoint.export=false \
        log.wandb=disabled "$@"; then touch "$mark"; else echo "failed: $*"; fi
}

part() {
    case $1 in
        # 131,072 tokens of 1.5B: without settings, each alone, both, and both with the optimizer on the host
        none) steps none 1 128 5 0.125 "${SMALL[@]}" ;;
        offload) steps offload 1 128 5 0.125 "${SMALL[@]}" memory.offload_checkpoints=true ;;
        tiled) steps tiled 1 128 5 0.125 "${SMALL[@]}" memory.tiled_mlp=true ;;
        long) steps long 1 128 5 0.125 "${SMALL[@]}" memory=long ;;
        host) steps host 1 128 5 0.125 "${SMALL[@]}" memory=long "${HOST[@]}" ;;
        half) steps half 1 512 1 "0.125 1" "${SMALL[@]}" memory=long ;;
        million) steps million 1 1024 1 0.125 "${SMALL[@]}" "${AUTO[@]}" ;;
        lora) steps lora 1 512 1 0.125 "${LARGE[@]}" memory=long model.lora.rank=16 ;;
        # 131,072 tokens of 8B with adapters on a base in bf16 and in 4 bits
        lora_128k) steps lora_128k 1 128 3 0.125 "${LARGE[@]}" memory.offload_checkpoints=true model.lora.rank=16 ;;
        qlora_128k) steps qlora_128k 1 128 3 0.125 "${LARGE[@]}" memory.offload_checkpoints=true model.lora.rank=16 \
            model.quantize=nf4 ;;
        full) steps full 1 384 1 0.125 "${LARGE[@]}" memory=long "${HOST[@]}" ;;
        two_8bit) steps two_8bit 2 128 3 0.125 "${LARGE[@]}" parallel.sp_size=2 optim=adamw_8bit ;;
        two) steps two 2 128 3 0.125 "${LARGE[@]}" parallel.sp_size=2 "${HOST[@]}" ;;
        # 32,768 tokens of the small model, four times its positions, with YaRN and without (factor 1)
        yarn) run yarn ;;
        plain) run plain model.rope.factor=1.0 ;;
        *) echo "unknown part: $1; the head of this file lists them" >&2; exit 2 ;;
    esac
}

for name in ${@:-none offload tiled long host half million lora lora_128k qlora_128k full two_8bit two yarn plain}; do
    echo "== $name"
    part "$name" 2>&1 | tee -a "$OUT/$name.log"
done
