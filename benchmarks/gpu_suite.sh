#!/usr/bin/env bash
# Unattended tests and benchmarks for a GPU machine: benchmarks/gpu_suite.sh [part ...]   (default: all, in this order)
#
#   setup    install this checkout and the wheels in .whl/ into the machine's own Python, without dependencies
#   correct  GPU tests; every Triton kernel against float64 on the hardware; compute-sanitizer on one case
#   loss     the contrastive loss by batch size, compared with open_clip's and a matrix product in the same run
#   step     the ViT-H/14 train step on one GPU by setting, compared with open_clip's; needs deepspeed and open_clip in .whl/
#   decode   JPEGs to crops on the GPU with DALI and nvJPEG, and on the CPU cores; needs simplejpeg and DALI in .whl/
#   kernels  the ahead-of-time table, and Nsight Compute on the loss kernels
#
# A finished part leaves a marker in $OUT and is not run again; a failed part does not stop the next.
# Results: $OUT/<date>_<gpu>_<part>.json, to be committed under benchmarks/results/.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
SITE=${SITE:-/tmp/mc2_site}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
GPU=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr 'A-Z ' 'a-z_' | sed 's/nvidia_//')
STEM="$OUT/$(date +%F)_${GPU:-cpu}"

setup() {
    # Wheels too large for one transfer arrive in parts: NAME.whl.aa NAME.whl.ab ... (split -b 55m).
    for first in .whl/*.whl.aa; do
        [ -e "$first" ] && cat "${first%.aa}".?? >"${first%.aa}" && rm "${first%.aa}".??
    done
    if compgen -G '.whl/*.whl' >/dev/null; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" .whl/*.whl
    fi
    "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e .
    "$PYTHON" -m mc2_hpc.cli doctor --full
}

correct() {
    timeout 150 "$PYTHON" -m pytest -q -m gpu tests/kernels || return 1
    if command -v compute-sanitizer >/dev/null; then
        timeout 60 compute-sanitizer --error-exitcode 1 \
            "$PYTHON" -m pytest -q -m gpu tests/kernels/test_triton_kernels.py -k launch_parameters
    fi
}

loss() {
    timeout 170 "$PYTHON" -m benchmarks.bench_contrastive --json "${STEM}_loss.json" || return 1
    timeout 120 "$PYTHON" -m benchmarks.bench_distillation --json "${STEM}_distillation.json"
}

step() {
    timeout 290 "$PYTHON" -m benchmarks.bench_step --json "${STEM}_step.json"
}

decode() {
    timeout 170 "$PYTHON" -m benchmarks.bench_decode --json "${STEM}_decode.json"
}

kernels() {
    timeout 120 "$PYTHON" -m benchmarks.bench_kernels --json "${STEM}_kernels.json" || return 1
    if command -v ncu >/dev/null; then
        local metrics=sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active
        metrics+=,dram__bytes.sum,sm__warps_active.avg.pct_of_peak_sustained_active
        timeout 60 ncu --clock-control none -k 'regex:statistics_kernel|gradient_kernel' -c 8 --metrics "$metrics" \
            --csv --log-file "${STEM}_ncu.csv" "$PYTHON" -m benchmarks.bench_contrastive --quick
    fi
}

failed=0
for part in "${@:-setup correct loss step decode kernels}"; do
    for name in $part; do
        marker="$OUT/.done_$name"
        if [ -e "$marker" ]; then
            echo "== $name: already done"
        elif ! declare -F "$name" >/dev/null; then
            echo "== $name: no such part" >&2
            failed=1
        else
            echo "== $name"
            if "$name"; then touch "$marker"; else echo "== $name FAILED" >&2; failed=1; fi
        fi
    done
done
exit "$failed"
