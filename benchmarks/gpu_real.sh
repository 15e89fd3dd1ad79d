#!/usr/bin/env bash
# The two real models on a GPU that may reach no network, healed on 20 and 50 times the tokens of their recipes.
#
#   benchmarks/gpu_real.sh pack runs/parts smollm2-135m-instruct     # here: wheels and models, in parts
#   benchmarks/gpu_real.sh unpack runs/parts                         # there: when the parts have arrived
#   benchmarks/gpu_real.sh run smollm2-135m-instruct runs/results    # there: run it again to resume
#
# `pack` without names packs the wheels alone, which benchmarks/gpu.py needs. Settings: PYTHON_VERSION and PLATFORMS of
# the machine there, PART_MIB, WHEELS; for `run` the STEPS, ROWS (of 256 tokens) and RATE of a healing, ON_POLICY steps,
# METHODS (the whole table by default) and AT_ONCE, see recipes/real_model.sh. With a network there, `run` alone does.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
site=runs/site

pack() {
  parts=$1; shift
  rm -rf runs/wheels  # two versions of one package could not be installed together
  mkdir -p runs/wheels
  platforms=()
  for platform in ${PLATFORMS:-manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64}; do
    platforms+=(--platform "$platform")
  done
  # shellcheck disable=SC2086
  $python -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" -c constraints.txt -d runs/wheels \
    ${WHEELS:-trl datasets evaluate gguf dill multiprocess liger-kernel}
  $python -m pip wheel --quiet --no-deps -w runs/wheels .
  files=(runs/wheels)
  for name in "$@"; do
    $python recipes/get_model.py "$name" runs/models >/dev/null
    files+=("runs/models/$name.gguf")
  done
  $python benchmarks/carry.py split "${files[@]}" --output "$parts" --part_mib "${PART_MIB:-36}"
}

unpack() {
  [ -d runs/carried ] || $python benchmarks/carry.py join "$1" --output runs/carried
  $python -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" runs/carried/wheels/*.whl
  for gguf in runs/carried/*.gguf; do
    [ -f "$gguf" ] || continue
    name=$(basename "$gguf" .gguf)
    mkdir -p "runs/$name"
    ln -f "$gguf" "runs/$name/$name.gguf"  # where recipes/get_model.py looks before it downloads
  done
  echo "export PYTHONPATH=$PWD:$PWD/$site"
}

run() {
  [ -d "$site" ] && export PYTHONPATH="$PWD:$PWD/$site"
  export PYTHON=$python BASELINES=1 RESULTS=$2 OUT=runs/$1 DRAWS=${DRAWS:-8} ON_POLICY=${ON_POLICY:-100}
  export AT_ONCE=${AT_ONCE-1} BATCH=${BATCH:-448}
  export METHODS=${METHODS-"ours block_influence on_policy paper kl shortgpt tail merge parallel lora"}
  export HEALING="--max_steps ${STEPS:-500} --per_device_train_batch_size ${ROWS:-16} --warmup_steps 16 \
    --save_strategy no ${RATE:+--learning_rate $RATE}"
  mkdir -p "$2"
  recipes/real_model.sh "$1"
}

verb=${1:-}
case $verb in
  pack | unpack) [ $# -ge 2 ] || { echo "$verb needs the folder of the parts" >&2; exit 2; } ;;
  run) [ $# -eq 3 ] || { echo "run needs a model and a folder for results" >&2; exit 2; } ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
shift
"$verb" "$@"
