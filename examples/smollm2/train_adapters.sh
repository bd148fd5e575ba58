#!/usr/bin/env bash
# Train the example's adapters: three QAA ones, and a LoRA of as many trained numbers beside one of them.
#
#     examples/smollm2/train_adapters.sh [NAME...]      json pirate brief brief-lora; all four by default
#
# Needs qaa-serve with its `train` extra, fetch.py's base and make_data.py's data. One CPU thread, one epoch; all else
# but the layers is as `qaa-serve train` does it by itself.
# Environment: QAA_SERVE, the command (default: qaa-serve); a relative path is one from this directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

(($#)) || set -- json pirate brief brief-lora
for name in "$@"; do
  case $name in
    json | pirate | brief) style=$name method=(--method qaa) ;;
    brief-lora) style=brief method=(--method lora --rank 4) ;;
    *) echo "unknown adapter: $name" >&2 && exit 2 ;;
  esac
  "${QAA_SERVE:-qaa-serve}" train --model base --data "data/$style.jsonl" --eval-data "data/${style}_watched.jsonl" \
    --output "adapters/$name" --overwrite "${method[@]}" --target-modules v_proj o_proj --epochs 1 --seed 7 --threads 1
  "${PYTHON:-python}" to_bf16.py "adapters/$name"
done
