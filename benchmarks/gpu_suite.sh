#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes:
#
#     bash benchmarks/gpu_suite.sh OUT [PYTHON]
#
# Runs from the repository root with what is installed there (no build, no network): the CUDA tests, the kernel tables,
# the scaling plot and the whole update. Peers that are not installed are rows that say so. OUT gets a log per part,
# JSON and Markdown tables; a part that fails or is cut off does not stop the next one, and the exit status says so.
# SUITE_DEVICE=cpu is a dry run of the same parts on toy shapes.
set -u
out=${1:?usage: gpu_suite.sh OUT [PYTHON]}
python=${2:-python3}
device=${SUITE_DEVICE:-cuda}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

part() { # name, seconds, command ...
    local name=$1 limit=$2
    shift 2
    local start=$SECONDS
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    echo "$name: exit $status, $((SECONDS - start)) s"
    tail -n "${TAIL:-15}" "$out/$name.log"
    [ $status -eq 0 ] || failed=1
}

"$python" - <<'EOF' | tee "$out/environment.txt"
import sys
sys.path.insert(0, "benchmarks")
import torch
from timing import environment, header
print(header(environment("cuda" if torch.cuda.is_available() else "cpu")))
EOF

kernel="$python benchmarks/bench_kernel.py --device $device"
if [ "$device" = cuda ]; then
    part tests 100 "$python" -m pytest -m cuda tests/hsd_kernels tests/hsd/policy/tree -q
    part triton_rows 90 "$python" -m pytest tests/hsd_kernels/test_rows_triton.py -q
    part kernel_main 130 $kernel --dtypes bfloat16 --repeats 5 --shapes 8192,4096,151936 1024,2048,151936 \
        --json "$out/kernel_main.json"
    part kernel_peaked 40 $kernel --dtypes bfloat16 --workload peaked --only hsd_kernels --shapes 8192,4096,151936 \
        --json "$out/kernel_peaked.json"
    part kernel_large 80 $kernel --dtypes bfloat16 --repeats 3 --only hsd_kernels TRL naive \
        --shapes 32768,4096,151936 4096,5120,151936 8192,2560,256000 --json "$out/kernel_large.json"
    part update 90 "$python" benchmarks/bench_update.py --device cuda --repeats 3 --models qwen3-0.6b \
        --json "$out/update.json"
    part scaling 60 "$python" benchmarks/bench_scaling.py --device cuda --repeats 2 --json "$out/scaling.json"
else
    part kernel_main 200 $kernel --repeats 1 --shapes 64,64,4096 --json "$out/kernel_main.json"
    part kernel_peaked 60 $kernel --repeats 1 --workload peaked --only hsd_kernels --shapes 64,64,4096 \
        --json "$out/kernel_peaked.json"
    part update 100 "$python" benchmarks/bench_update.py --repeats 1 --models toy --shapes 100,40,40,4 \
        --json "$out/update.json"
    part scaling 200 "$python" benchmarks/bench_scaling.py --device cpu --plan toy --repeats 1 --json "$out/scaling.json"
fi
exit $failed
