#!/bin/sh
# The kernel's tests on a build with -fsanitize=address,undefined: sh tests/sanitize.sh [python [baseline]]
# With `baseline` that instruction set alone, a reduced set for every change. The instrumented objects go to a folder of their own; the installed ones are left alone.
set -eu
python=${1:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

flags="-std=c++17 -O1 -g -fopenmp -fvisibility=hidden -fno-exceptions -fno-rtti -ffp-contract=fast"
flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
flags="$flags -Wno-ignored-attributes -Wno-psabi -shared -fPIC"
compile() { ${CXX:-g++} $flags "$root/torch_manual/csrc/lstm.cpp" -o "$folder/lstm_$1.so" $2; }
compile baseline ""
case ${2:-$(uname -m)} in
    baseline) export TORCH_MANUAL_INSTRUCTION_SET=baseline ;;
    x86_64) compile avx2 "-mavx2 -mfma"; compile avx512 "-mavx2 -mfma -mavx512f -mavx512dq" ;;
esac

# Leaks are Python's own at exit; growth over many calls is a test of its own.
cd "$root"
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 TORCH_MANUAL_KERNEL_FOLDER="$folder" \
    "$python" -m pytest tests/test_cpu_kernel.py tests/test_cpu_sums.py tests/test_cpu_tangent.py tests/test_cpu_dual.py \
    tests/test_cpu_gradients.py tests/test_packed.py \
    -p no:cacheprovider -k "(agrees or sums or missing or layout or empty or at_once or recomputed or chunks) and not says_why"
