// The functions that torch_manual/kernels/cpu*.py call, for one instruction set. They return an Outcome.
#include <unistd.h>

#include "lstm_dual.h"
#include "lstm_gradients.h"
#include "lstm_tangent.h"
#include "peak.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int lstm_forward_float32(const ForwardArguments<float>* a) {
    return run_layer<Forward<float>>(*a);
}
EXPORT int lstm_forward_float64(const ForwardArguments<double>* a) {
    return run_layer<Forward<double>>(*a);
}
EXPORT int lstm_backward_float32(const BackwardArguments<float>* a) {
    return run_layer<Backward<float>>(*a);
}
EXPORT int lstm_backward_float64(const BackwardArguments<double>* a) {
    return run_layer<Backward<double>>(*a);
}
EXPORT int lstm_tangent_float32(const TangentArguments<float>* a) {
    return run_layer<Forward<float, true>>(*a);
}
EXPORT int lstm_tangent_float64(const TangentArguments<double>* a) {
    return run_layer<Forward<double, true>>(*a);
}
EXPORT int lstm_dual_float32(const DualArguments<float>* a) {
    return run_layer<Dual<float>>(*a);
}
EXPORT int lstm_dual_float64(const DualArguments<double>* a) {
    return run_layer<Dual<double>>(*a);
}
EXPORT int lstm_backward_tangent_float32(const BackwardTangentArguments<float>* a) {
    return run_layer<Backward<float, true>>(*a);
}
EXPORT int lstm_backward_tangent_float64(const BackwardTangentArguments<double>* a) {
    return run_layer<Backward<double, true>>(*a);
}
EXPORT int lstm_input_sums_float32(const InputSumsArguments<float>* a) {
    return run_sums<InputSums<float>>(*a);
}
EXPORT int lstm_input_sums_float64(const InputSumsArguments<double>* a) {
    return run_sums<InputSums<double>>(*a);
}
EXPORT int lstm_weight_sums_float32(const WeightSumsArguments<float>* a) {
    return run_sums<WeightSums<float>>(*a);
}
EXPORT int lstm_weight_sums_float64(const WeightSumsArguments<double>* a) {
    return run_sums<WeightSums<double>>(*a);
}
EXPORT int lstm_peephole_sums_float32(const PeepholeSumsArguments<float>* a) {
    return run_peephole_sums(*a);
}
EXPORT int lstm_peephole_sums_float64(const PeepholeSumsArguments<double>* a) {
    return run_peephole_sums(*a);
}
EXPORT int lstm_gradients_float32(const GradientsArguments<float>* a) { return run_gradients(*a); }
EXPORT int lstm_gradients_float64(const GradientsArguments<double>* a) { return run_gradients(*a); }

EXPORT int64_t multiply_add_float32(int64_t threads, int64_t repeats) {
    return multiply_add<float>(threads, repeats);
}
EXPORT int64_t multiply_add_float64(int64_t threads, int64_t repeats) {
    return multiply_add<double>(threads, repeats);
}

// The best of the instruction sets built that this processor has.
EXPORT const char* best_instruction_set() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "baseline";
}

// The size of a core's second-level cache in bytes, or 0 where the system does not tell.
EXPORT int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    return sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    return 0;
#endif
}
