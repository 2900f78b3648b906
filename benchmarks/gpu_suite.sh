#!/usr/bin/env bash
# Unattended tests and benchmarks for a GPU machine: benchmarks/gpu_suite.sh [part ...]   (default: all, in this order)
#
#   setup    install this checkout and the wheels in .whl/ into the machine's own Python, without dependencies
#   correct  every Triton kernel against float64 on the hardware; compute-sanitizer on one case
#   ship     what ships: auto, the engine at every ZeRO stage, the trainer, GradCache, checkpoints, DALI; needs deepspeed,
#            open_clip, simplejpeg and sentencepiece in .whl/
#   loss     the contrastive losses by batch size, compared with open_clip's and a matrix product in the same run, and with
#            Inf-CL, memeff and siglip-kernel where they are in .whl/
#   step     the ViT-H/14 train step on one GPU by setting, compared with open_clip's; needs deepspeed and open_clip in .whl/;
#            with apex's layer norm and FusedAdam, and DeepSpeed's, where they are built
#   decode   JPEGs to crops on the GPU with DALI and nvJPEG, and on the CPU cores; needs simplejpeg and DALI in .whl/
#   kernels  the ahead-of-time table of bf16 training, and Nsight Compute on the loss kernels
#
# One call takes less than LIMIT seconds (default 570): a part that would pass it is left for the next call, and exit code 75
# says that there is one. A finished part is listed in $OUT/done and not run again; a failed part does not stop the next.
# Results: $OUT/<date>_<gpu>_<part>.json, to be committed under benchmarks/results/: rows are in them as soon as they are
# measured. With $OUT/done, a log of `ship` and Nsight Compute's table there are at most 8 files.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
SITE=${SITE:-/tmp/mc2_site}
LIMIT=${LIMIT:-570}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
GPU=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr 'A-Z ' 'a-z_' | sed 's/nvidia_//')
STEM="$OUT/$(date +%F)_${GPU:-cpu}"

# at_most SECONDS COMMAND...: stop the command after that long, or when the call's time is over.
at_most() {
    local left=$((LIMIT - SECONDS)) seconds=$1
    shift
    timeout "$((left < seconds ? left : seconds))" "$@"
}

# The longest that a part may take.
declare -A LONGEST=([setup]=120 [correct]=280 [ship]=420 [loss]=290 [step]=300 [decode]=170 [kernels]=300)

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
    at_most 200 "$PYTHON" -m pytest -q -m gpu tests/kernels || return 1
    if command -v compute-sanitizer >/dev/null; then
        at_most 60 compute-sanitizer --error-exitcode 1 \
            "$PYTHON" -m pytest -q -m gpu tests/kernels/test_triton_kernels.py -k launch_parameters
    fi
}

ship() {
    at_most 420 "$PYTHON" -m pytest -q -m gpu -x tests/training tests/data | tee "${STEM}_ship.log"
    return "${PIPESTATUS[0]}"
}

loss() {
    at_most 170 "$PYTHON" -m benchmarks.bench_contrastive --json "${STEM}_loss.json" || return 1
    at_most 120 "$PYTHON" -m benchmarks.bench_distillation --json "${STEM}_distillation.json"
}

step() {
    at_most 300 "$PYTHON" -m benchmarks.bench_step --json "${STEM}_step.json"
}

decode() {
    at_most 170 "$PYTHON" -m benchmarks.bench_decode --json "${STEM}_decode.json"
}

kernels() {
    at_most 240 "$PYTHON" -m benchmarks.bench_kernels --quick --json "${STEM}_kernels.json" || return 1
    if command -v ncu >/dev/null; then
        local metrics=sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active
        metrics+=,dram__bytes.sum,sm__warps_active.avg.pct_of_peak_sustained_active
        at_most 60 ncu --clock-control none -k 'regex:statistics_kernel|gradient_kernel' -c 8 --metrics "$metrics" \
            --csv --log-file "${STEM}_ncu.csv" "$PYTHON" -m benchmarks.bench_contrastive --quick
    fi
}

failed=0 left=0
for name in ${@:-setup correct ship loss step decode kernels}; do
    if ! declare -F "$name" >/dev/null || [ -z "${LONGEST[$name]:-}" ]; then
        echo "== $name: no such part" >&2
        failed=1
    elif grep -qsx "$name" "$OUT/done"; then
        echo "== $name: already done"
    elif [ "$name" != setup ] && ((SECONDS + ${LONGEST[$name]} > LIMIT)); then
        echo "== $name: not enough time left in this call"
        left=1
    else
        echo "== $name"
        if "$name"; then echo "$name" >>"$OUT/done"; else echo "== $name FAILED" >&2; failed=1; fi
    fi
done
[ "$failed" = 1 ] && exit 1
[ "$left" = 1 ] && exit 75
exit 0
