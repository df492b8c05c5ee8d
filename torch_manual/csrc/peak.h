// How many operations a second the processor could do at most: what benchmarks measure beside a row.
#pragma once

#include "threads.h"
#include "vector.h"

namespace {

// Floating-point operations that so many `threads` do, or those that there are, a multiplication and
// an addition each time, with nothing but registers: `repeats` times on more sums than the additions
// take cycles.
template <typename real>
int64_t multiply_add(int64_t threads, int64_t repeats) {
#if defined(__AVX512F__) || defined(__aarch64__)
    constexpr int sums = 24;
#else
    constexpr int sums = 12;
#endif
    int64_t granted = 1;
    run_on(threads, [&](int64_t thread, int64_t n, Barrier& everyone) {
        if (thread == 0) granted = n;
        volatile real unknown = 0;  // else the compiler sees that all sums are one
        vec_of<real> sum[sums], half = broadcast<real>((real)0.5);
        for (int s = 0; s < sums; s++) sum[s] = broadcast<real>(unknown);
        everyone.wait();
        for (int64_t k = 0; k < repeats; k++)
#pragma GCC unroll 24
            for (int s = 0; s < sums; s++) sum[s] = sum[s] * half + half;
        for (int s = 0; s < sums; s++) __asm__ volatile("" : : "m"(sum[s]));
    });
    return 2 * sums * Vector<real>::lanes * granted * repeats;
}

}  // namespace
