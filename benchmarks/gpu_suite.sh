#!/usr/bin/env bash
# Everything that needs a GPU, in three parts of under 8 minutes each:
#
#     bash benchmarks/gpu_suite.sh PART OUT [PYTHON]
#
# PART: a, correctness, the products that decide the design and the row kernels against fp64; b, the kernel table with
# peers and floor and the sweep of pinned configurations; c, the whole update, sizes, small problems, error on real
# states. "abc" runs them in turn. Runs from the repository root with what is installed there: no build, no network.
# Peers that are not installed are rows that say so.
#
# OUT gets rows.jsonl, a line as each row is made, and suite.tgz: rows, tables and logs. A row that hangs or breaks the
# device ends its process; the next one goes on after it.
#
# SUITE_DEVICE=cpu is a dry run at toy size, in which nothing finds the packages that a plain CUDA image lacks
# (SUITE_HIDE); SUITE_WHEELS a folder of wheels for the path; SUITE_SECONDS a part's limit; SUITE_ONLY names of tables,
# to make only those; SUITE_STATES a file of smollm2_states.py. The exit status is 1 if a row failed for another reason
# than a package, a file or a GPU that is not there.
set -u
parts=${1:?usage: gpu_suite.sh PART OUT [PYTHON]}
out=${2:?usage: gpu_suite.sh PART OUT [PYTHON]}
python=${3:-python3}
limit=${SUITE_SECONDS:-420}
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
: >"$out/rows.jsonl"
ln -sf "$(cd "$out" && pwd)/rows.jsonl" "$work/rows.jsonl"
if [ "${SUITE_DEVICE:-cuda}" = cpu ]; then
    export SUITE_HIDE=${SUITE_HIDE-datasets trl liger_kernel fla math_verify} OMP_NUM_THREADS=1
fi
if [ -n "${SUITE_HIDE:-}" ]; then # as if these were not installed, in every process
    mkdir "$work/hide"
    cat >"$work/hide/sitecustomize.py" <<'EOF'
import os, sys
from importlib.machinery import PathFinder

HIDDEN = set(os.environ["SUITE_HIDE"].split())

class Rest(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[:] = [Rest if finder is PathFinder else finder for finder in sys.meta_path]
EOF
    here_path=$work/hide:$here
fi
export PYTHONPATH=${here_path:-$here}${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
failed=0

for part in $(grep -o . <<<"$parts"); do
    start=$SECONDS
    export SUITE_DEADLINE=$(($(date +%s) + limit - 40))
    for attempt in 1 2 3 4 5 6; do
        timeout $((limit - SECONDS + start)) "$python" "$here/benchmarks/gpu_suite.py" "$part" "$work" 2>"$work/$part$attempt.log"
        status=$?
        [ $status -eq 0 ] && break
        echo "part $part, attempt $attempt: exit $status"
        tail -n 4 "$work/$part$attempt.log" | cut -c -300
        [ $status -eq 75 ] || [ $status -gt 128 ] || break # else the process did not end in a row
        [ $((SECONDS - start)) -lt $((limit - 15)) ] || break
    done
    echo "part $part: exit $status, $((SECONDS - start)) s"
    [ $status -eq 0 ] || failed=1
    tar -C "$work" -chzf "$out/suite.tgz" .
done
exit $failed
