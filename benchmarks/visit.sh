#!/usr/bin/env bash
# One visit to a GPU machine that reaches no package index: install, numerics first, then the grid.
#
#   OUT=results WHEELS='peers wheels' benchmarks/visit.sh --budget 400 'st-fa2,burnish ModernBERT-base full 512 32 fixed'
#
# Its arguments are those of grid.py, but for --out; without any there is no grid. Set by the environment:
#   OUT        where logs and lines are left (needed)
#   WHEELS     folders of wheels to unpack, such as peers.py fills
#   PREPARE    a command to run once all is unpacked, where the visit was begun, with SITE the folder of packages
#   TESTS      the tests that must pass first, "" for none (default: tests/gpu); TEST_SECONDS ends them (default: 200);
#              PYTEST_ADDOPTS is pytest's own, as in "-n 6"
#   THEN       a command to run after the grid, where it ran, with OUT: other benchmarks, for example
#   KEEP_GOING set to anything, timing goes on after tests that failed
#   PYTHON     the machine's Python, with torch, transformers and Sentence Transformers (default: python3)
# Exit codes: 1 if tests fail, else grid.py's own, else that of THEN.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
start=$PWD
python=${PYTHON:-python3}
mkdir -p "${OUT:?say where results go: OUT=FOLDER}"
OUT=$(cd "$OUT" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export SITE=$work/site
mkdir -p "$SITE" "$work/source" "$work/here"

export BURNISH_COMMIT=${BURNISH_COMMIT:-$(git -C "$root" rev-parse --short=12 HEAD 2>/dev/null || true)}
# Built from a copy: pip leaves its own folders in what it builds.
tar -C "$root" --exclude='./.*' --exclude=./site --exclude=./build --exclude=__pycache__ -cf - . | tar -C "$work/source" -xf -
"$python" -m pip install -q --no-deps --no-build-isolation --target "$SITE" "$work/source"
for folder in ${WHEELS:-}; do
    for wheel in "$folder"/*.whl "$folder"/*.zip; do
        [[ ! -f $wheel ]] || "$python" -m zipfile -e "$wheel" "$SITE"
    done
done
cp -r "$work/source/"{tests,benchmarks,pyproject.toml} "$work/here/"
[[ -z ${PREPARE:-} ]] || (cd "$start" && bash -c "$PREPARE")

# Not the checkout: there `kernels` and `core` would be found in place of packages of those names.
cd "$work/here"
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no NVIDIA GPU"
if [[ -n ${TESTS-tests/gpu} ]]; then
    status=0
    # shellcheck disable=SC2086  # several files may be named
    timeout "${TEST_SECONDS:-200}" "$python" -m pytest -m gpu -q -p no:cacheprovider ${TESTS-tests/gpu} \
        >"$OUT/tests.log" 2>&1 || status=$?
    tail -n 3 "$OUT/tests.log"
    if [[ $status -ne 0 && -z ${KEEP_GOING:-} ]]; then
        echo "numerics failed (exit code $status): nothing is timed; see tests.log"
        exit 1
    fi
fi
status=0
if [[ $# -gt 0 ]]; then
    "$python" benchmarks/grid.py --out "$OUT/grid.jsonl" "$@" 2>&1 | tee "$OUT/grid.log" || status=$?
fi
if [[ -n ${THEN:-} ]]; then
    export OUT
    bash -c "$THEN" 2>&1 | tee "$OUT/then.log" || status=$((status ? status : $?))
fi
exit "$status"
