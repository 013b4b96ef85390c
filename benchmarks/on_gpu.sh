#!/usr/bin/env bash
# Measure on a GPU: what a step and gamma-hat cost, on JAX and torch, and whether the tests pass.
#
#     bash benchmarks/on_gpu.sh FOLDER
#
# writes reports, pictures and logs into FOLDER, in under eight minutes; what takes longer than its
# share of them is stopped. Needs the package's `test` extra (TensorFlow may be missing), JAX with
# CUDA, and torch. A report moved to benchmarks/results/ enters the docs by `--docs`, see there.
set -uo pipefail
cd "$(dirname "$0")/.."
output=$1
mkdir -p "$output"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} MPLBACKEND=Agg PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false

within() { # SECONDS COMMAND...
  local start=$SECONDS
  timeout -s INT -k 10 "$@"
  echo "--- $? after $((SECONDS - start)) s: ${*:2}"
}

networks="resnet-20 wrn-28-2"
steps=(plain sub_batches full_batch)
for backend in torch jax; do
  export KERAS_BACKEND=$backend
  within 120 python benchmarks/step_cost.py --networks $networks --batch-sizes 128 \
    --num-sub-batches 8 --steps "${steps[@]}" --output "$output"
  within 50 python benchmarks/gamma_hat.py --networks $networks --num-examples 100 \
    --output "$output"
done 2>&1 | tee "$output/benchmarks.log"

# Both side by side. TensorFloat-32 is off, so that the tolerances of CPUs hold.
export JAX_DEFAULT_MATMUL_PRECISION=highest NVIDIA_TF32_OVERRIDE=0
for backend in torch jax; do
  KERAS_BACKEND=$backend within 140 python -m pytest -v -n 8 --tb=line -W ignore::DeprecationWarning \
    -p no:benchmark --ignore tests/examples >"$output/tests_$backend.log" 2>&1 &
done
wait
grep -hE "FAILED|ERROR| passed" "$output"/tests_*.log
