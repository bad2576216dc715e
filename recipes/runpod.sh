#!/usr/bin/env bash
# Train on a rented pod of RunPod, and stop the pod when the run has ended.
#
# Rent a pod with a PyTorch image, SSH, and a network volume (mounted at /workspace), which outlives the pod. Then, on
# your machine, from your clone, with the pod's address and port:
#
#     rsync -az --exclude /.venv --exclude /demo -e 'ssh -p PORT' ./ root@HOST:/workspace/yeonma/
#     ssh -p PORT root@HOST
#     apt-get update && apt-get install -y tmux make python3-venv
#     cd /workspace/yeonma && tmux new -s train recipes/runpod.sh     start; tmux attach -t train brings it back
#     tail -f /workspace/title-generator/log.txt                      the steps
#
# If the pod goes away, rent another one with the same volume and start the same again: the run goes on from its last
# checkpoint. HF_TOKEN in the pod's environment, or `hf auth login`, is only for gated models.
set -euo pipefail

cd "$(dirname "$0")/.."
export HF_HOME="${HF_HOME:-/workspace/hf}"
[ -x .venv/bin/yeonma ] || make setup
. .venv/bin/activate
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600

status=0
torchrun --standalone --nproc_per_node "${PROCESSES:-gpu}" -m yeonma sft \
    --base_model "${BASE_MODEL:-beomi/llama-2-ko-7b}" \
    --data_path "${DATA_PATH:-daekeun-ml/naver-news-summarization-ko}" \
    --output_dir "${OUTPUT_DIR:-/workspace/title-generator}" \
    --batch_size 8 --micro_batch_size 1 --num_epochs 3 --learning_rate 1e-5 --cutoff_len 2048 --val_set_size 0 \
    --lora_r 16 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules '[gate_proj, down_proj, up_proj]' \
    --train_on_inputs false --add_eos_token true --group_by_length false --lr_scheduler linear --warmup_steps 100 \
    --save_steps 200 "$@" || status=$?

# A pod costs money until it is stopped, also one whose run has failed. KEEP_POD=1 leaves it running.
if [ -z "${KEEP_POD:-}" ] && [ -n "${RUNPOD_POD_ID:-}" ]; then
    runpodctl stop pod "$RUNPOD_POD_ID"
fi
exit "$status"
