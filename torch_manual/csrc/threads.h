// How the work of one call is shared among threads, and the memory it borrows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <sched.h>
#include <time.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

inline int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

// A barrier among few threads that meet very often. A thread spins for some microseconds, then
// leaves its core to whoever else wants it.
class Barrier {
  public:
    explicit Barrier(int n) : n_threads(n) {}

    // Nanoseconds of the waits in which a thread left its core, as a mean over those that can wait.
    int64_t lost() const { return lost_by_all / (n_threads > 1 ? n_threads - 1 : 1); }

    void wait() {
        if (n_threads == 1) return;
        const int64_t turn = __atomic_load_n(&turns, __ATOMIC_RELAXED);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == n_threads) {
            __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&turns, turn + 1, __ATOMIC_RELEASE);
            return;
        }
        int64_t spins = 0, since = 0;
        for (; __atomic_load_n(&turns, __ATOMIC_ACQUIRE) == turn; spins++) {
            if (spins == usual_spins) since = nanoseconds();
            if (spins < most_spins)
                pause();
            else
                sched_yield();
        }
        if (spins > most_spins)
            __atomic_add_fetch(&lost_by_all, nanoseconds() - since, __ATOMIC_RELAXED);
    }

  private:
    static constexpr int64_t usual_spins = 250;  // a usual wait is over before the clock is read
    static constexpr int64_t most_spins = 4000;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }

    alignas(128) int n_threads;
    alignas(128) int arrived = 0;
    alignas(128) int64_t turns = 0;
    alignas(128) int64_t lost_by_all = 0;
};

// Share number `index` of [0, n), divided into `parts`.
struct Range {
    int64_t begin, end;
};

inline Range share(int64_t n, int64_t index, int64_t parts) {
    return {n * index / parts, n * (index + 1) / parts};
}

// The places of a call stand in a grid: directions × batch parts × unit parts. Threads at places that
// differ only in their units work on the same rows, and meet at a barrier; the others never wait.
struct Grid {
    int64_t directions, batches, units;
    int64_t threads;  // 0: one for each place; or, where units is 1, fewer

    int64_t size() const { return directions * batches * units; }
    int64_t wanted() const { return threads ? threads : size(); }

    // The grid for so many threads: where there are fewer than places, none shares units.
    Grid among(int64_t n) const { return n < size() ? Grid{directions, batches, 1, n} : *this; }

    // The places that a thread of `n` goes to, one after the other.
    Range places(int64_t thread, int64_t n) const {
        if (n < size()) return share(size(), thread, n);
        return thread < size() ? Range{thread, thread + 1} : Range{0, 0};
    }
};

struct Place {
    int64_t direction, batch, unit;
};

inline Place place_in(const Grid& grid, int64_t place) {
    return {place / (grid.batches * grid.units), place / grid.units % grid.batches,
            place % grid.units};
}

// While it lives, its thread takes numbers too small for a whole mantissa as zeros. Gradients decay to
// such numbers over a few hundred steps, and on Intel's processors each takes some 150 cycles to multiply.
class NoDenormals {
  public:
#if defined(__x86_64__)
    NoDenormals() : before(_mm_getcsr()) { _mm_setcsr(before | flush_results | zero_operands); }
    ~NoDenormals() { _mm_setcsr(before); }

  private:
    static constexpr unsigned flush_results = 1 << 15, zero_operands = 1 << 6;
    const unsigned before;
#else
    NoDenormals() {}
#endif
};

// Calls work(thread, threads, everyone) on so many threads, where everyone.wait() is a barrier among
// all of them. One thread does it all where OpenMP grants fewer than asked for. Returns for how many
// nanoseconds they waited for one another, as a mean over those that can wait: at everyone.wait(), in
// waits so long that they left their cores, and in the end.
template <typename Work>
int64_t run_on(int64_t threads, const Work& work) {
    const auto run = [&](int64_t thread, int64_t granted, Barrier& everyone) {
        const NoDenormals here;
        work(thread, granted, everyone);
    };
#if defined(_OPENMP)
    if (threads > 1) {
        bool granted = true;
        int64_t sum = 0, last = 0;
        const int64_t begun = nanoseconds();
        Barrier everyone((int)threads);
#pragma omp parallel num_threads((int)threads) reduction(+ : sum) reduction(max : last)
        {
            if (omp_get_num_threads() == threads) {
                run(omp_get_thread_num(), threads, everyone);
                sum = last = nanoseconds() - begun;
            } else
#pragma omp single
                granted = false;
        }
        if (granted) return everyone.lost() + (threads * last - sum) / (threads - 1);
    }
#endif
    Barrier alone(1);
    run(0, 1, alone);
    return 0;
}

// Memory borrowed for one call. The same sequence of take() runs twice: first to add up the sizes,
// then, after allocate(), to hand out the pieces. One block is kept for the next call, because the
// first touch of fresh memory costs as much as packing weights into it.
class Workspace {
  public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    ~Workspace() {
        if (block && block->bytes <= most_kept) block = __atomic_exchange_n(&kept, block, __ATOMIC_ACQ_REL);
        free(block);
    }

    // Gives what is kept back to the system.
    static void drop() { free(__atomic_exchange_n(&kept, nullptr, __ATOMIC_ACQ_REL)); }

    template <typename T>
    T* take(int64_t count) {
        char* piece = block ? (char*)block + used : nullptr;
        used += (count * (int64_t)sizeof(T) + 127) / 128 * 128;
        return (T*)piece;
    }

    bool allocate() {
        const int64_t bytes = used;
        used = 128;
        block = __atomic_exchange_n(&kept, nullptr, __ATOMIC_ACQ_REL);
        if (block && block->bytes >= bytes) return true;
        free(block);
        const int64_t huge_page = 2 << 20;
        void* p = nullptr;
        if (posix_memalign(&p, bytes >= 2 * huge_page ? huge_page : 128, bytes) != 0) p = nullptr;
        block = (Block*)p;
        if (!block) return false;
#if defined(__linux__)
        if (bytes >= 2 * huge_page) madvise(p, bytes, MADV_HUGEPAGE);
#endif
        block->bytes = bytes;
        return true;
    }

  private:
    struct Block {
        int64_t bytes;  // then, 128 bytes from here, the first piece
    };
    static constexpr int64_t most_kept = 256 << 20;
    static inline Block* kept = nullptr;

    Block* block = nullptr;
    int64_t used = 128;
};

}  // namespace
