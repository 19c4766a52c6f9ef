#!/usr/bin/env bash
# Prefilling and decoding on one GPU against the dense cache; each part takes less than ten minutes:
#     benchmarks/inference.sh [tests] [decoding] [compiled] [short] [long] [parts]
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-outputs/benchmarks}
mkdir -p "$OUT"
measure() { "$PYTHON" launch/benchmark.py generation --model "${MODEL:-1.5b}" --csv "$OUT/inference.csv" ${LIGER:+--liger} "$@"; }
decode() { "$PYTHON" launch/benchmark.py decoding --model "${MODEL:-1.5b}" --csv "$OUT/decoding.csv" ${LIGER:+--liger} "$@"; }

part() {
    case $1 in
        tests) "$PYTHON" -m pytest -q -m gpu tests/gpu/test_cache.py tests/gpu/test_decoding.py ;;
        decoding) decode --num-tokens ${DECODED:-8192 131072} --streams 1 8 --retention 0.125 ;;
        compiled) decode --num-tokens ${DECODED:-8192 131072} --streams 1 8 --retention 0.125 --compile ;;
        short) measure --num-tokens ${SHORT:-8192 32768} --retention 0.25 0.125 ;;
        long) measure --num-tokens ${LONG:-131072} --retention 0.25 0.125 ;;
        parts)  # memory against speed, and passes of one chunk
            for most in ${PARTS:-4096 65536}; do
                measure --num-tokens ${LONG:-131072} --retention 0.125 --max-tokens-at-once "$most"
            done
            measure --num-tokens ${LONG:-131072} --retention 0.125 --chunks-at-once 1 ;;
        *) echo "unknown part: $1 (tests, decoding, compiled, short, long, parts)" >&2; exit 2 ;;
    esac
}

for name in ${@:-tests decoding compiled short long parts}; do
    echo "== $name"
    part "$name" || exit 1
done
