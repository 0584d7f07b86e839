#!/usr/bin/env bash
# Measure on a GPU what the tables need, in at most 9 minutes, the most important first. One JSON file each.
#
#     bash benchmarks/gpu.sh results/gpu
#     DEVICE=cpu RUN=tiny.yaml PRECISION=fp32 bash benchmarks/gpu.sh gpu-trial    # try the script without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."

output=${1:?usage: gpu.sh FOLDER}
device=${DEVICE:-cuda}
run=${RUN:-llama_368m}
precision=${PRECISION:-bf16}
python=${PYTHON:-python}
deadline=$((SECONDS + 540))
mkdir -p "$output"

measure() {  # NAME SECONDS COMMAND...: reports a failure or a timeout and continues
  local name=$1 limit=$2 left=$((deadline - SECONDS))
  shift 2
  if ((left < 10)); then
    echo "== $name: no time left"
    return
  fi
  echo "== $name"
  timeout "$((left < limit ? left : limit))" "$@" --output "$output/$name.json" >"$output/$name.log" 2>&1
  local status=$?
  tail -n 3 "$output/$name.log"
  case $status in
    0) ;;
    124) echo "$name: stopped after $limit s" ;;
    *) echo "$name: failed ($status), see $output/$name.log" ;;
  esac
}

if [ "$device" = cuda ]; then
  measure memory 150 "$python" benchmarks/gpu_memory.py --minutes 2 \
    --cases "368m vanilla" "368m Muon" "368m SCALE" "368m host" "368m corrections" "368m"
fi
measure host 120 "$python" benchmarks/host.py --run "$run" --device "$device" --precision "$precision" \
  --micro-batches 1 8 64
measure update_cost 60 "$python" benchmarks/update_cost.py --run "$run" --device "$device" --precision "$precision"
measure step 150 "$python" benchmarks/gpu_step.py --runs "$run" --compile --device "$device"
measure peers 90 "$python" benchmarks/peers.py --run "$run" --device "$device" \
  --precisions "$precision" --rounds 2
measure adapters 60 "$python" benchmarks/adapters.py --run "$run" --device "$device" --precision "$precision" \
  --batch-size 8 --rounds 20
