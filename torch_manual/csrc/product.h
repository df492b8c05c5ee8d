// Small matrix products whose sums stay in registers. A tile is what one panel of a packed weight
// (packing.h) makes of a few rows.
#pragma once

#include <type_traits>

#include "threads.h"
#include "vector.h"

namespace {

// Tiles as large as the registers hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int wide_rows = 6;    // × 4 vectors
constexpr int narrow_rows = 8;  // × 2 vectors
constexpr int gates_at_once = 4;
constexpr int terms_at_once = 1;
#else
constexpr int wide_rows = 3;
constexpr int narrow_rows = 6;
constexpr int gates_at_once = 2;
constexpr int terms_at_once = 2;  // in a turn of a loop: counting is a sixth of the instructions of one
#endif
constexpr int gate_rows = 6;  // × a vector of each of `gates_at_once`

// A float accumulator adds up no more terms than this: longer sums lose accuracy.
constexpr int64_t longest_sum = 256;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename vec, int ROWS, int VECS>
INLINE void clear(vec (&sum)[ROWS][VECS]) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) sum[r][v] = vec{};
}

// Cache lines in a row, of 64 bytes, to prefetch one at a time while a product is computed: all at
// once would be more than can be on its way. Those that the product has no time for are left out.
struct Lines {
    static constexpr int64_t near = 1 << 14;  // so many stay in caches near the core

    const char* first = nullptr;
    int64_t n = 0;

    // Those of one of `panels`, of `size` numbers each.
    template <typename real>
    static Lines of_panel(const real* panels, int64_t size, int64_t panel) {
        return {(const char*)(panels + panel * size), size * (int64_t)sizeof(real) / 64};
    }
    Lines part(int64_t index, int64_t of) const {
        if (n == 0) return {};
        const int64_t begin = n * index / of, end = n * (index + 1) / of;
        return {first + begin * 64, end - begin};
    }
    Lines lines() const { return *this; }
};

struct Nothing {
    Nothing part(int64_t, int64_t) const { return {}; }
    void ask() const {}
};

// Addresses to prefetch in the same way, all of them, and lines after them. Those to write come first:
// another core may have read them since, and a store would wait until it has given them up.
template <int MOST>
struct Wanted {
    const void *to_write[MOST], *to_read[MOST];
    int64_t n_to_write = 0, n_to_read = 0;
    Lines ahead;

    INLINE void add_to_write(const void* p) { to_write[n_to_write++] = p; }
    INLINE void add_to_read(const void* p) { to_read[n_to_read++] = p; }
    int64_t size() const { return n_to_write + n_to_read; }
    Lines lines() const { return ahead; }
    void ask() const { ask(0, size()); }
    INLINE void ask(int64_t begin, int64_t end) const {
        for (; begin < least(end, n_to_write); begin++) __builtin_prefetch(to_write[begin], 1);
        for (; begin < end; begin++) __builtin_prefetch(to_read[begin - n_to_write]);
    }
};

template <typename Asked>
constexpr bool has_addresses = !std::is_same_v<Asked, Lines> && !std::is_same_v<Asked, Nothing>;

// sum[r][v] = or, with `add`, += Σ_k a[r][k] · panel[k][v], the panel's vectors for k + 1 lying
// `step` after those for k. Few rows are summed in several sets, so that additions need not wait for
// one another.
template <bool add, int MOST_SETS = 4, typename real, int ROWS, int VECS, typename Asked = Nothing>
INLINE void product(vec_of<real> (&sum)[ROWS][VECS], const real* a, int64_t stride_a,
                    const real* panel, int64_t step, int64_t K, const Asked& asked = {}) {
    constexpr int L = Vector<real>::lanes;
    constexpr int FEW = ROWS * VECS >= 8 ? 1 : ROWS * VECS >= 4 ? 2 : 4;
    constexpr int SETS = FEW < MOST_SETS ? FEW : MOST_SETS;
    if (!add && K <= 0) clear(sum);
    int64_t next = 0, next_line = 0;
    if constexpr (has_addresses<Asked>) {  // maybe too many for so few terms
        next = asked.size() - least(asked.size(), K / (2 * SETS));
        asked.ask(0, next);
    }
    for (int64_t start = 0; start < K; start += longest_sum) {
        const int64_t end = least(K, start + longest_sum);
        // Keeps `sum` in memory meanwhile: with it the compiler would run out of registers.
        if (add || start > 0) __asm__("" : "+m"(sum));
        vec_of<real> part[SETS][ROWS][VECS] = {};
        int64_t k = start;
        auto add_terms = [&]() ALWAYS_INLINE {
#pragma GCC unroll 4
            for (int s = 0; s < SETS; s++) {
                vec_of<real> b[VECS];
#pragma GCC unroll 4
                for (int v = 0; v < VECS; v++) {
                    b[v] = load(panel + (k + s) * step + v * L);
                    if constexpr (ROWS > 1) hold(b[v]);
                }
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                    for (int v = 0; v < VECS; v++) part[s][r][v] += a[r * stride_a + k + s] * b[v];
            }
        };
        [[maybe_unused]] const auto add_twice = [&]() ALWAYS_INLINE {
            add_terms(), k += SETS;
            add_terms(), k += SETS;
        };
        if constexpr (has_addresses<Asked>) {
            for (; next < asked.n_to_write && k + 2 * SETS <= end; next++) {
                __builtin_prefetch(asked.to_write[next], 1);
                add_twice();
            }
            for (; next < asked.size() && k + 2 * SETS <= end; next++) {
                __builtin_prefetch(asked.to_read[next - asked.n_to_write]);
                add_twice();
            }
        }
        if constexpr (!std::is_same_v<Asked, Nothing> && FEW == 1)  // else much code for little
            for (; next_line < asked.lines().n && k + 2 * SETS <= end; next_line++) {
                __builtin_prefetch(asked.lines().first + next_line * 64);
                add_twice();
            }
#pragma GCC unroll terms_at_once
        for (; k + SETS <= end; k += SETS) add_terms();
        for (; k < end; k++)
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int v = 0; v < VECS; v++)
                    part[0][r][v] += a[r * stride_a + k] * load(panel + k * step + v * L);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) {
#pragma GCC unroll 4
                for (int s = 1; s < SETS; s++) part[0][r][v] += part[s][r][v];
                sum[r][v] = add || start > 0 ? sum[r][v] + part[0][r][v] : part[0][r][v];
            }
    }
}

template <typename real, int ROWS, int VECS>
INLINE void add_product(vec_of<real> (&sum)[ROWS][VECS], const real* a, int64_t stride_a,
                        const real* panel, int64_t step, int64_t K) {
    product<true>(sum, a, stride_a, panel, step, K);
}

// sum[r][g] += Σ_k a[r][k] · w_g[k], over the lanes of `sum`: for weights too rarely used to pack.
template <typename real, int ROWS, int GATES>
INLINE void add_dots(vec_of<real> (&sum)[ROWS][GATES], const real* a, int64_t stride_a,
                     const real* w, int64_t gate, int64_t K) {
    constexpr int L = Vector<real>::lanes;
    const int64_t tail = K % L;
    for (int64_t k = 0; k < K - tail; k += L) {
        vec_of<real> from[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            from[r] = load(a + r * stride_a + k);
            hold(from[r]);
        }
#pragma GCC unroll 4
        for (int g = 0; g < GATES; g++) {
            vec_of<real> b = load(w + g * gate + k);
            if constexpr (ROWS > 1) hold(b);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) sum[r][g] += from[r] * b;
        }
    }
    if (tail == 0) return;
    for (int r = 0; r < ROWS; r++)
        for (int g = 0; g < GATES; g++)
            sum[r][g] += load(a + r * stride_a + K - tail, tail) * load(w + g * gate + K - tail, tail);
}

// Calls stage.tile<ROWS>(row, panel, ahead) with the number of rows as a constant.
template <int ROWS, typename Stage>
INLINE void call_tile(const Stage& stage, int64_t n_rows, int64_t row, int64_t panel,
                      const Lines& ahead) {
    if constexpr (ROWS > 1)
        if (n_rows != ROWS) return call_tile<ROWS - 1>(stage, n_rows, row, panel, ahead);
    stage.template tile<ROWS>(row, panel, ahead);
}

// How many tiles cover so many rows of one panel.
template <typename Stage>
int64_t tiles_of(int64_t rows) {
    return (rows + Stage::max_rows - 1) / Stage::max_rows;
}

// Covers rows [first, end) with tiles of at most Stage::max_rows rows. `tiles` are numbered panel after
// panel. At every other turn the last panel is the first: the one covered last is still near. Meanwhile
// they prefetch the next panel, stage.ahead(), if there are too many to stay near.
template <typename Stage>
void cover(const Stage& stage, int64_t first, int64_t end, const Range& tiles, int64_t turn = 0) {
    const int64_t n = end - first, blocks = tiles_of<Stage>(n);
    if (tiles.begin == tiles.end) return;
    const int64_t first_panel = tiles.begin / blocks, last_panel = (tiles.end - 1) / blocks;
    for (int64_t p = first_panel; p <= last_panel; p++) {
        const int64_t panel = turn & 1 ? first_panel + last_panel - p : p;
        const int64_t begin = tiles.begin - panel * blocks, left = tiles.end - panel * blocks;
        const Range mine = {begin > 0 ? begin : 0, least(blocks, left)};
        Lines ahead = {};
        if (p < last_panel) ahead = stage.ahead(turn & 1 ? panel - 1 : panel + 1);
        if (ahead.n * (last_panel - first_panel + 1) <= Lines::near) ahead = {};
        for (int64_t k = mine.begin; k < mine.end; k++) {
            const int64_t row = first + n * k / blocks, rows = first + n * (k + 1) / blocks - row;
            call_tile<Stage::max_rows>(stage, rows, row, panel,
                                       ahead.part(k - mine.begin, mine.end - mine.begin));
        }
    }
}

}  // namespace
