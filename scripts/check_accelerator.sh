#!/usr/bin/env bash
# Check the project on an accelerator: bash scripts/check_accelerator.sh OUT [--tiny] [STEP …]
#
# Every step has its own time limit, and appends its results to OUT/results.jsonl at once. A step
# that fails or takes too long is recorded there too, and the next one begins. A table is printed at
# the end.
#   --tiny  everything small enough for a CPU
#   STEP    attention stages sampler quickstart dpo grpo (in parallel), then limits attention_speed
#           training decoding iteration plan (one after the other); by default all of them
# The environment variable PYTHON sets the interpreter, python3 by default.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: check_accelerator.sh OUT [--tiny] [STEP …]}"); shift
tiny=
if [ "${1:-}" = --tiny ]; then tiny=--tiny; shift; fi
all="attention stages sampler quickstart dpo grpo limits attention_speed training decoding"
steps=" ${*:-$all iteration plan} "
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5 TF_CPP_MIN_LOG_LEVEL=2

# run NAME LIMIT COMMAND …: runs a command for at most LIMIT seconds; its output is OUT/NAME.log
run() {
  local name=$1 limit=$2 began=$SECONDS code took; shift 2
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1
  code=$? took=$((SECONDS - began))
  XLA_FLAGS='' JAX_PLATFORMS=cpu "$python" scripts/check_accelerator.py note --out="$out" $tiny \
    --what="$name" --code=$code --took=$took
  echo "$name: exit $code after $took s"
  [ $code = 0 ] || tail -n 12 "$out/$name.log"
}
check() { run "$1" "$2" "$python" scripts/check_accelerator.py "${@:3}" --out="$out" $tiny; }
wanted() { case "$steps" in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# These steps time nothing, so they run in parallel, and XLA does not search for fast kernels.
correct() {
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
  [ -n "$tiny" ] || export XLA_FLAGS="--xla_gpu_autotune_level=0 ${XLA_FLAGS:-}"
  local name
  for name in attention stages sampler; do
    wanted $name && { check $name 300 $name & if [ -n "$tiny" ]; then wait; fi; }
  done
  for name in quickstart dpo grpo; do
    wanted $name && {
      run $name 400 "$python" -m rlhf_jax --config="experiments/$name.py:tiny" \
        --workdir="$out/runs/$name" &
      if [ -n "$tiny" ]; then wait; fi
    }
  done
  wait
}
(correct)

export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
wanted limits && check limits 90 limits
wanted attention_speed && check attention_speed 120 attention_speed
if wanted training; then
  check training-360m 150 training --shape=360m
  [ -n "$tiny" ] || check training-360m-plain 150 training --shape=360m --attention=plain
  [ -n "$tiny" ] || check training-1.7b 150 training --shape=1.7b
fi
if wanted decoding; then
  check decoding-360m 200 decoding --shape=360m
  [ -n "$tiny" ] || check decoding-1.7b 150 decoding --shape=1.7b --rows 64
fi
if wanted iteration; then
  check iteration-ppo 200 iteration --stage=ppo
  check iteration-grpo 200 iteration --stage=grpo
fi
if wanted plan; then
  card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1)
  check plan 300 plan --card="$card"
fi
"$python" scripts/check_accelerator.py table --out="$out" $tiny
