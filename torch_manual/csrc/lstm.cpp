// The functions that torch_manual/kernels/cpu*.py call, for one instruction set. They return an Outcome.
#include <unistd.h>

#include "lstm_dual.h"
#include "lstm_gradients.h"
#include "lstm_tangent.h"
#include "peak.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// `name`_float32 and `name`_float64: `run` of such a structure, if the caller has it of the same size.
#define SERVE(name, Arguments, ...)                                               \
    EXPORT int name##_float32(const Arguments<float>* a, int bytes) {         \
        using real = float;                                                       \
        return bytes == (int)sizeof(*a) ? __VA_ARGS__(*a) : OUTDATED;         \
    }                                                                             \
    EXPORT int name##_float64(const Arguments<double>* a, int bytes) {        \
        using real = double;                                                      \
        return bytes == (int)sizeof(*a) ? __VA_ARGS__(*a) : OUTDATED;         \
    }

SERVE(lstm_forward, ForwardArguments, run_layer<Forward<real>>)
SERVE(lstm_backward, BackwardArguments, run_layer<Backward<real>>)
SERVE(lstm_tangent, TangentArguments, run_layer<Forward<real, true>>)
SERVE(lstm_dual, DualArguments, run_layer<Dual<real>>)
SERVE(lstm_backward_tangent, BackwardTangentArguments, run_layer<Backward<real, true>>)
SERVE(lstm_input_sums, InputSumsArguments, run_sums<InputSums<real>>)
SERVE(lstm_weight_sums, WeightSumsArguments, run_sums<WeightSums<real>>)
SERVE(lstm_peephole_sums, PeepholeSumsArguments, run_peephole_sums<real>)
SERVE(lstm_gradients, GradientsArguments, run_gradients<real>)

EXPORT int64_t multiply_add_float32(int64_t threads, int64_t repeats) {
    return multiply_add<float>(threads, repeats);
}
EXPORT int64_t multiply_add_float64(int64_t threads, int64_t repeats) {
    return multiply_add<double>(threads, repeats);
}

// Gives back the memory that the last call has left for the next one.
EXPORT void drop_workspace() { Workspace::drop(); }

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
