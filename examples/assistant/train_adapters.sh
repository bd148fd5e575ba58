#!/usr/bin/env bash
# Train the example's adapters: three QAA ones, and the LoRA twin of one of them.
#
#     examples/assistant/train_adapters.sh [NAME...]      json pirate brief brief-lora; all four by default
#
# Needs qaa-serve with its `train` extra, examples/assistant/base and the data of make_data.py. One CPU thread.
# Environment: QAA_SERVE, the command (default: qaa-serve); a relative path is one from this directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

train() { # name, data, further options
  "${QAA_SERVE:-qaa-serve}" train --model base --data "data/$2.jsonl" --output "adapters/$1" --overwrite \
    --target-modules q_proj k_proj v_proj o_proj --alpha 16 --batch-size 32 --seed 7 --threads 1 "${@:3}"
}

qaa=(--method qaa --ansatz ryrz_ring_ry --layers 2 --epochs 3 --lr 0.02)
lora=(--method lora --rank 8 --epochs 3 --lr 0.002)

(($#)) || set -- json pirate brief brief-lora
for name in "$@"; do
  case $name in
    json | pirate | brief) train "$name" "$name" "${qaa[@]}" ;;
    brief-lora) train "$name" brief "${lora[@]}" ;;
    *) echo "unknown adapter: $name" >&2 && exit 2 ;;
  esac
done
