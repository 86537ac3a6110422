#!/usr/bin/env bash
# Check the project on an accelerator: bash scripts/check_accelerator.sh OUT [--tiny] [STEP …]
#
# Every step has its own time limit, and appends its results to OUT/results.jsonl at once. A step
# that fails or takes too long is recorded there too, and the next one begins. A table is printed at
# the end. Steps compile in parallel; while one of them times something, the others are paused.
#   --tiny  everything small enough for a CPU, one step after the other
#   STEP    attention stages sampler quickstart dpo grpo limits attention_speed training decoding
#           iteration packing rollouts plan; by default all of them
# The environment variable PYTHON sets the interpreter, python3 by default.
set -u
case "${1:-}" in
  -h | --help) sed -n '2,/^[^#]/s/^# \?//p' "$0"; exit ;;
esac
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: check_accelerator.sh OUT [--tiny] [STEP …]}"); shift
tiny=
if [ "${1:-}" = --tiny ]; then tiny=--tiny; shift; fi
all="attention stages sampler quickstart dpo grpo limits attention_speed training decoding"
steps=" ${*:-$all iteration packing rollouts plan} "
python=${PYTHON:-python3}
mkdir -p "$out/groups"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5 TF_CPP_MIN_LOG_LEVEL=2
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # as several steps share the device

# run NAME LIMIT COMMAND …: runs a command for at most LIMIT seconds; its output is OUT/NAME.log
run() {
  local name=$1 limit=$2 began=$SECONDS code took group summary; shift 2
  flock --shared "$out/lock" true  # not while another step is timed
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 &
  group=$!  # timeout makes a process group of its own
  touch "$out/groups/$group"
  wait $group
  code=$? took=$((SECONDS - began))
  rm -f "$out/groups/$group"
  # a step that was stopped in the middle of a measurement has left the others paused
  if [ $code -ge 124 ]; then
    for group in "$out"/groups/*; do kill -CONT -- "-${group##*/}" 2> /dev/null; done
  fi
  # the last line with an error, or with the seconds of a finished run
  summary=$(grep -aE '^(rlhf_jax: error|[^ ]*Error|seconds)' "$out/$name.log" | tail -n 1 |
    tr -d '"\\' | cut -c 1-300)
  printf '{"step": "command", "what": "%s", "code": %d, "seconds": %d, "summary": "%s"}\n' \
    "$name" "$code" "$took" "$summary" >> "$out/results.jsonl"
  echo "$name: exit $code after $took s"
  [ $code = 0 ] || tail -n 12 "$out/$name.log"
}
check() { run "$1" "$2" "$python" scripts/check_accelerator.py "${@:3}" --out="$out" $tiny; }
wanted() { case "$steps" in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
# together COMMAND: in the background, on a CPU (--tiny) one after the other
together() { if [ -n "$tiny" ]; then "$@"; else "$@" & fi; }

pipeline() {
  run "$1" 400 "$python" -m rlhf_jax --config="experiments/$1.py:tiny" --workdir="$out/runs/$1"
}
# These steps time nothing, so XLA does not search for fast kernels.
correct() {
  [ -n "$tiny" ] || export XLA_FLAGS="--xla_gpu_autotune_level=0 ${XLA_FLAGS:-}"
  local name
  for name in attention stages sampler; do wanted $name && together check $name 420 $name; done
  for name in quickstart dpo grpo; do wanted $name && together pipeline $name; done
  wait
}
training() {
  wanted limits && check limits 90 limits
  wanted attention_speed && check attention_speed 120 attention_speed
  wanted training || return
  # the larger one first, while the other steps need little memory
  [ -n "$tiny" ] || check training-1.7b 200 training --shape=1.7b
  check training-360m 200 training --shape=360m
}
generating() {
  wanted decoding && check decoding-360m 250 decoding --shape=360m
  if wanted iteration; then
    check iteration-ppo 250 iteration --stage=ppo
    check iteration-grpo 250 iteration --stage=grpo
  fi
  if wanted decoding && [ -z "$tiny" ]; then
    check decoding-1.7b 200 decoding --shape=1.7b --rows 256
  fi
  wanted packing && check packing 250 packing
}
together correct
together training
together generating
wait
if wanted rollouts; then  # alone, as this script does not pause others
  rows=(--model=gpu --rows=1024 --slots=256 --mean=64)
  [ -z "$tiny" ] || rows=(--rows=32 --slots=8 --mean=4 --turns=1)
  run rollouts 150 "$python" scripts/measure_rollouts.py "${rows[@]}"
  cat "$out/rollouts.log"
fi
if wanted plan; then
  card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1)
  check plan 300 plan --card="$card"
fi
"$python" scripts/check_accelerator.py table --out="$out" $tiny
