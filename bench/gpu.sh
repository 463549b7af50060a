#!/usr/bin/env bash
# All that is measured on a GPU, in under ten minutes; JSON goes to bench/results/gpu. See docs/gpu.md.
#
#   bash bench/gpu.sh [--wheels DIR] [--output DIR] [--only PART]... [--seconds N] [--dry-run]
#
# Nothing is fetched: what Python lacks comes from the wheels in DIR, or the environment variable WHEELS.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-}
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=$2 && shift 2 ;;
        *) arguments+=("$1") && shift ;;
    esac
done

# A folder in which this repository is the package `pdengine`, so that nothing needs to be installed.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$PWD" "$site/pdengine"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
fi
"$python" -m pdengine.bench.gpu ${arguments[@]+"${arguments[@]}"}
