#!/usr/bin/env bash
# Everything that needs a GPU, in one call: builds, tests, memory and race checks, benchmarks.
#
#   bash scripts/gpu_check.sh [--quick] [--output FOLDER] [--skip-benchmarks]
#
# PYTHON names the interpreter that has torch with CUDA (default python3). Nothing is downloaded.
# A step that fails does not stop the others; the exit code tells whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUTPUT=benchmarks/results
QUICK=()
BENCHMARKS=yes

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0"; }

while [ $# -gt 0 ]; do
  case $1 in
    --quick) QUICK=(--quick) ;;
    --output)
      [ $# -ge 2 ] || { echo "gpu_check.sh: --output needs a folder" >&2; exit 2; }
      OUTPUT=$2
      shift
      ;;
    --skip-benchmarks) BENCHMARKS=no ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu_check.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done

FAILED=()
SKIPPED=()
step() { # step NAME COMMAND...
  local name=$1
  shift
  printf '\n=== %s ===\n' "$name"
  if ! "$@"; then
    FAILED+=("$name")
    printf '=== %s FAILED ===\n' "$name"
  fi
}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check.sh: $PYTHON finds no torch with a CUDA device; nothing was checked" >&2
  exit 77
fi

# The library beside the package, for this machine's GPUs alone: a build of a minute.
CAPABILITIES=$("$PYTHON" -c '
import torch
found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
print(";".join(f"{major}.{minor}" for major, minor in sorted(found)))')
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export LPIPS_FAST_REQUIRE_CUDA=1

build() {
  LPIPS_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=$CAPABILITIES "$PYTHON" setup.py --quiet build_ext --inplace
}

# What compute-sanitizer runs: every kernel once, on layers small enough for a slow machine.
small_case() {
  cat <<'PYTHON_CODE'
import itertools
import torch
from lpips_fast import functional

orders = (torch.channels_last, torch.contiguous_format)
dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
for dtype, order in itertools.product(dtypes, orders):
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    # Vector loads, single elements, more channels than registers hold, several blocks an image.
    for shape in ((2, 64, 8, 8), (1, 33, 5, 7), (1, 1200, 2, 3), (1, 64, 48, 48)):
        a, b = (
            torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=order)
            for _ in range(2)
        )
        w = torch.rand(shape[1], device="cuda", dtype=accumulator, requires_grad=True)
        for weights in (w.detach(), w):
            leaves = [x.detach().requires_grad_() for x in (a, b)]
            functional.distance(leaves[:1], leaves[1:], [weights]).sum().backward()
            functional.distance_map(leaves[:1], leaves[1:], [weights])[0].sum().backward()

operators = torch.ops.lpips_fast
shift, scale = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
for dtype, order, result in itertools.product(dtypes, orders, dtypes):
    for shape in ((2, 3, 8, 16), (1, 3, 5, 7)):
        image = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=order)
        operators.scale_images([image], shift, scale, True, result)
        operators.scale_images([image[:, :, 1:, 1:]] * 2, shift, scale, False, result)
for dtype, channels, (kernel, ceil_mode) in itertools.product(
    dtypes, (64, 33), ((2, False), (3, True), (4, False))
):
    x = torch.randn(2, channels, 13, 11, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = operators.max_pool2d(x, kernel, 2, ceil_mode)
    y.sum().backward()
    operators.bias_relu_(x.detach(), torch.zeros(channels, device="cuda", dtype=dtype))
torch.cuda.synchronize()
print("every kernel ran")
PYTHON_CODE
}

sanitizer() {
  local tool option help filter=()
  help=$("$SANITIZER" --help 2>&1)
  # Our kernels alone, where this version can choose: torch's own are many, and not ours to judge.
  for option in --kernel-regex --kernel-name; do
    if [ ${#filter[@]} -eq 0 ] && [[ $help == *"$option"* ]]; then
      filter=("$option" kns=lpips_fast)
    fi
  done
  for tool in memcheck racecheck; do
    echo "--- $tool"
    # Without torch's caching allocator, so that a step outside a tensor is outside an allocation.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 900 "$SANITIZER" --tool "$tool" --error-exitcode 1 \
      ${filter[@]+"${filter[@]}"} "$PYTHON" -c "$(small_case)" || return 1
  done
}

kernel_benchmarks() {
  "$PYTHON" benchmarks/bench_cuda_kernels.py ${QUICK[@]+"${QUICK[@]}"} --output "$OUTPUT"
}

"$PYTHON" -c '
import torch
for i in range(torch.cuda.device_count()):
    print(f"GPU {i}: {torch.cuda.get_device_name(i)}, torch {torch.__version__}")'

step "build for $CAPABILITIES" build
step "every kernel once" "$PYTHON" -c "$(small_case)"
step "CUDA tests" "$PYTHON" -m pytest tests/kernels/test_cuda.py -q -p no:cacheprovider
step "all other tests" "$PYTHON" -m pytest tests -q -p no:cacheprovider --ignore tests/kernels/test_cuda.py

SANITIZER=$(command -v compute-sanitizer || true)
for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
  if [ -z "$SANITIZER" ] && [ -n "$home" ] && [ -x "$home/bin/compute-sanitizer" ]; then
    SANITIZER=$home/bin/compute-sanitizer
  fi
done
if [ -n "$SANITIZER" ]; then
  step "compute-sanitizer" sanitizer
else
  SKIPPED+=("compute-sanitizer: not installed")
fi

if [ "$BENCHMARKS" = yes ]; then
  step "kernel benchmarks, launches of the whole distance" kernel_benchmarks
else
  SKIPPED+=("kernel benchmarks: --skip-benchmarks")
fi

printf '\n'
for line in ${SKIPPED[@]+"${SKIPPED[@]}"}; do echo "skipped: $line"; done
if [ ${#FAILED[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${FAILED[@]}"
  exit 1
fi
echo "GPU check passed"
