#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests on the device, compute-sanitizer, benchmarks.
#   bash bench/on_gpu.sh [NAME]                   results in bench/results/NAME (the GPU's name), logs beside the JSON
#   STEPS="build tests-cuda" bash bench/on_gpu.sh some of the steps, in their order below: where time comes in pieces
#   BUDGET=570 bash bench/on_gpu.sh               ends within so many seconds: steps get what is left, or are left out
#   RESULTS=folder bash bench/on_gpu.sh           results and logs there instead
#   ARCHIVE=file.tgz bash bench/on_gpu.sh         packs them after each step, so that what was measured outlives a kill;
#                                                 not within the folder of the results
#   WHEELS=folder bash bench/on_gpu.sh            installs the wheels in it first, whatever STEPS says: where there is
#                                                 no network, rsl-rl-lib, tensordict, pyvers, GitPython, gitdb, smmap;
#                                                 with pytest-xdist tests run side by side
# Paths are seen from the checkout. Runs on where a step fails, and says at the end which did, or was left out. torch,
# triton, pytest and hypothesis must be there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || exit 1
results=${RESULTS:-bench/results/${1:-$gpu}}
mkdir -p "$results"
results=$(cd "$results" && pwd)  # the benchmarks take it for a name only where it is relative
grace=20  # seconds from the interrupt of a step to its kill
spare=5   # seconds for packing
least=20  # seconds: a step that gets fewer has hardly loaded torch by then
failed=()
step() {  # name, seconds at most, command
  local name=$1 limit=$2
  shift 2
  [[ -z "${STEPS:-}" || " $STEPS " == *" $name "* ]] || return 0
  if [ -n "${BUDGET:-}" ]; then
    local left=$((BUDGET - SECONDS - grace - spare))
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt "$least" ]; then
      failed+=("$name (left out: no time left)")
      return 0
    fi
  fi
  printf '\n=== %s (%d s)\n' "$name" "$SECONDS"
  # interrupted as by Ctrl-C: what was measured until then is written
  timeout -s INT -k "$grace" "$limit" "$@" 2>&1 | tee "$results/$name.log" | tail -n 40
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed+=("$name (exit $status)")
  [ -z "${ARCHIVE:-}" ] || { tar -czf "$ARCHIVE.new" -C "$results" . && mv "$ARCHIVE.new" "$ARCHIVE"; }
}

export PYTHONUNBUFFERED=1  # the logs of what is killed
export TRITON_DEFAULT_FP_FUSION=1 PYFAST_PPO_CUDA=on PYFAST_PPO_CUDA_ARCHS=${PYFAST_PPO_CUDA_ARCHS:-native}
export GIT_PYTHON_REFRESH=quiet  # rsl_rl imports GitPython, which else wants a git program
[ -z "${WHEELS:-}" ] || STEPS='' step wheels 120 python3 -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
step build 300 python3 -m pip install -q --no-build-isolation --no-deps .
if ! python3 -c 'from pyfast_ppo.backends import unavailable_reason as why; raise SystemExit(why("cuda"))'; then
  echo "the CUDA kernels cannot be used, and nothing is measured without them; does STEPS have build?"
  exit 1
fi
# the checkout's modules, whose commit goes into the results, with the extension just built
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# one thread for torch's compiler: each process of xdist would start as many as there are cores
tests=(env TORCHINDUCTOR_COMPILE_THREADS=1 python3 -m pytest -q --durations=20)
! python3 -c 'import xdist' 2>/dev/null || tests+=(-n 8)

step doctor 60 python3 -m pyfast_ppo doctor
# early: it says, too, whether the profiler has the names by which launches are counted below
step launch 120 python3 bench/bench_launch.py --device cuda --save "$results"
step update-tests 300 "${tests[@]}" tests/rsl_rl/test_no_host_sync.py tests/rsl_rl/test_captured.py \
  tests/rsl_rl/test_mlp.py tests/rsl_rl/test_parity.py::test_on_a_gpu
# apart, because Triton compiles for minutes; tests/triton_kernels/test_compiled.py looks at machine code, without a GPU
step tests-cuda 300 "${tests[@]}" --maxfail=20 tests/ops -k "cuda and not triton"
step tests-triton 580 "${tests[@]}" --maxfail=20 tests/ops tests/triton_kernels/test_math.py -k triton
step kernels 200 python3 bench/kernels_once.py  # fills Triton's cache for what follows, too
for tool in memcheck racecheck initcheck; do
  # without torch's cache of memory, in which neighbours hide what goes astray
  step "sanitizer-$tool" 300 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 9 --report-api-errors no python3 bench/kernels_once.py
done
step loss 420 python3 bench/bench_loss.py --device cuda --seconds 3 --save "$results"
step gae 180 python3 bench/bench_gae.py --device cuda --seconds 3 --save "$results"
step kl 180 python3 bench/bench_kl.py --device cuda --seconds 3 --save "$results"
step timeline 60 python3 bench/bench_timeline.py --device cuda --save "$results"
step update 580 python3 bench/bench_update.py --device cuda --save "$results"
step profile 200 python3 bench/bench_profile.py --device cuda --save "$results"

printf '\n=== done (%d s): %s\n' "$SECONDS" "$results"
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
