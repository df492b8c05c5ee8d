// The gradients that are sums over all steps, as matrix products: B10, and B11 to B13; and
// B15 of diagonal peepholes.
//
// Sums over rows are long: they are closed every `depth` rows, for which dpre and what it is
// multiplied with are packed.
#pragma once

#include "lstm.h"

namespace {

template <typename real>
struct InputSumsArguments {
    int64_t N, I, K, stride_dpre, D, threads;  // K = 4H
    real* dx;                     // (N, I)
    const real* dpre[2];          // (N, K) of each direction, in rows of stride_dpre
    const real* weight_ih[2];     // (K, I)
};

template <typename real>
struct WeightSumsArguments {
    int64_t N, I, P, M, threads;  // M = 4H
    int64_t samples;              // S: each has N rows and sums of its own
    int64_t stride_dpre;          // between the rows of a sample
    const real* dpre;             // (N, S, M)
    const real* x;                // (N, S, I), or null
    const real* h_prev;           // (N, S, P), or null
    real* dweight_ih;             // (S, M, I), or null
    real* dweight_hh;             // (S, M, P), or null
    real* dbias;                  // (S, M), or null
    // h_prev may be what the steps put out instead, h (N, stride_h), with S = 1:
    const real* h0;              // (B, P), or null
    int64_t stride_h, reverse;
    int64_t T, B;
    const int64_t* batch_sizes;  // as in Sizes
};

// The gradients of diagonal peepholes.
template <typename real>
struct PeepholeSumsArguments {
    int64_t N, H, threads;
    const real* dpre;    // (N, 4H)
    const real* c_prev;  // (N, H), every row's c_{t-1}
    const real* c;       // (N, H)
    real* dweight[3];    // (H,) each: into i, f and o
};

template <typename real>
struct InputSums {
    using vec = vec_of<real>;
    static constexpr int L = Vector<real>::lanes;
    static constexpr int64_t chunk_rows = 128;  // of dpre: they stay in the L2 cache

    const InputSumsArguments<real>* args;
    real* packed_weight[2];

    int64_t panels() const { return (args->I + 2 * L - 1) / (2 * L); }
    // Few rows do not pay for packing, but for a panel wider than what is left.
    bool packed(int64_t panel) const {
        return (panel + 1) * 2 * L > args->I || pays_to_pack_columns<real>(args->N, args->K * args->I);
    }

    void plan(Workspace& workspace, const InputSumsArguments<real>& a) {
        args = &a;
        for (int64_t d = 0; d < a.D; d++)
            packed_weight[d] = workspace.take<real>(panels() * a.K * 2 * L);
    }

    void prepare(int64_t thread, int64_t threads) {
        Range mine = share(panels(), thread, threads);
        while (mine.begin < mine.end && !packed(mine.begin)) mine.begin++;
        for (int64_t d = 0; d < args->D; d++)
            pack_columns(packed_weight[d], args->K * 2 * L, args->weight_ih[d], mine.begin, mine.end,
                         args->I, args->K);
    }

    void run(int64_t thread, int64_t threads) const {
        for (int64_t d = 0; d < args->D; d++)
            run_rows(thread, threads, d, args->dpre[d], {0, args->N}, d > 0);
    }

    // Sets dx of some rows, or adds to it, from direction d's dpre of these.
    void run_rows(int64_t thread, int64_t threads, int64_t d, const real* dpre, const Range& rows,
                  bool add) const {
        const Range mine = share(rows.end - rows.begin, thread, threads);
        const Tile tile = {this, d, dpre, args->dx + rows.begin * args->I, add};
        int64_t turn = 0;
        for (int64_t row = mine.begin; row < mine.end; row += chunk_rows) {
            const int64_t n = least(chunk_rows, mine.end - row);
            cover(tile, row, row + n, {0, panels() * tiles_of<Tile>(n)}, turn++);
        }
    }

    struct Tile {
        static constexpr int max_rows = narrow_rows;
        static constexpr int64_t few = 64;  // terms in a row, where registers are left for two sums
        const InputSums* self;
        int64_t d;
        const real* dpre;
        real* dx;
        bool add;

        Lines ahead(int64_t panel) const {
            if (!self->packed(0)) return {};
            return Lines::of_panel(self->packed_weight[d], self->args->K * 2 * L, panel);
        }

        template <int ROWS>
        NOINLINE void tile(int64_t row, int64_t panel, const Lines& ahead) const {
            if (self->args->I - panel * 2 * L > L)
                columns<ROWS, 2>(row, panel, ahead);
            else
                columns<ROWS, 1>(row, panel, Nothing());
        }

        template <int ROWS, int VECS, typename Asked>
        INLINE void columns(int64_t row, int64_t panel, const Asked& asked) const {
            const auto& a = *self->args;
            const bool whole = self->packed(panel);
            const real* weight = whole ? self->packed_weight[d] + panel * a.K * 2 * L
                                       : a.weight_ih[d] + panel * 2 * L;
            const int64_t stride = whole ? 2 * L : a.I;
            const real* from = dpre + row * a.stride_dpre;
            vec sum[ROWS][VECS];
            product<false>(sum, from, a.stride_dpre, weight, stride, VECS == 1 ? least(few, a.K) : a.K,
                           asked);  // B10
            for (int64_t k = few; VECS == 1 && k < a.K; k += few) {
                vec part[ROWS][VECS];
                product<false>(part, from + k, a.stride_dpre, weight + k * stride, stride,
                               least(few, a.K - k));
                for (int r = 0; r < ROWS; r++) sum[r][0] += part[r][0];
            }
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECS; v++) {
                    const int64_t i = (2 * panel + v) * L;
                    real* at = dx + (row + r) * a.I + i;
                    store(at, add ? load(at, a.I - i) + sum[r][v] : sum[r][v], a.I - i);
                }
        }
    };
};

template <typename real>
struct WeightSums {
    using vec = vec_of<real>;
    static constexpr int L = Vector<real>::lanes;
    static constexpr int R = wide_rows, V = 4;  // of a tile: rows of the weight, vectors
    static constexpr int64_t depth = 128;  // terms of a sum, in two halves: longer ones lose accuracy
    static constexpr int64_t most_direct = 2304 * V * VECTOR_BYTES;  // bytes: 576 KB in AVX-512
    static constexpr int64_t tile_size = depth * R + 64 / sizeof(real);

    const WeightSumsArguments<real>* args;
    real *packed_dpre, *packed_columns;

    int64_t tiles() const { return (args->M + R - 1) / R; }

    // Whether the tiles read dpre where it is: if the terms of a sum stay near the core. The wider tiles
    // are, the fewer times they read it.
    bool direct() const {
        return args->M >= R && depth * args->stride_dpre * (int64_t)sizeof(real) <= most_direct;
    }

    void plan(Workspace& workspace, const WeightSumsArguments<real>& a) {
        args = &a;
        packed_dpre = workspace.take<real>(direct() ? 0 : tiles() * tile_size);
        packed_columns = workspace.take<real>(a.threads * depth * V * L);
    }

    void prepare(int64_t, int64_t) {}

    // Sequence b at step t, whose first row is `start`.
    struct Position {
        int64_t t, b, start;
    };

    void run(int64_t thread, int64_t threads) const {
        const auto& a = *args;
        for (int64_t s = 0; s < a.samples; s++)
            run_rows(thread, threads, s, a.dpre + s * a.M, {0, a.N}, {0, 0, 0}, false);
    }

    // Sets the sums over some rows of a sample, or adds them, from dpre of these; `at` is where the
    // first one stands. Every thread makes its share of the rows of both weights.
    void run_rows(int64_t thread, int64_t threads, int64_t sample, const real* dpre,
                  const Range& summed, Position at, bool add) const {
        const auto& a = *args;
        const Range mine = share(tiles(), thread, threads);
        real* columns = packed_columns + thread * depth * V * L;
        const real* rows[depth];
        const int64_t N = summed.end - summed.begin, parts = (N + depth - 1) / depth;
        for (int64_t part = 0; part < parts; part++) {
            const Range of = share(N, part, parts);
            const Terms terms = {sample, summed.begin + of.begin, of.end - of.begin,
                                 add || part > 0};
            const real* of_part = dpre + of.begin * a.stride_dpre;
            if (!direct()) pack(mine, of_part, terms);
            if (a.dbias) add_bias(mine, of_part, terms);
            if (a.dweight_ih) {
                for (int64_t k = 0; k < terms.count; k++) rows[k] = row(a.x, a.I, terms, k);
                add_columns(mine, of_part, columns, rows, a.dweight_ih, a.I, terms);  // B11
            }
            if (a.dweight_hh) {
                for (int64_t k = 0; k < terms.count; k++)
                    rows[k] = a.h0 ? before(at) : row(a.h_prev, a.P, terms, k);
                add_columns(mine, of_part, columns, rows, a.dweight_hh, a.P, terms);  // B12
            }
        }
    }

    int64_t alive(int64_t t) const {
        if (t < 0 || t >= args->T) return 0;
        return args->batch_sizes ? args->batch_sizes[t] : args->B;
    }

    // Where h_{t-1} lies; `at` goes on to the next row.
    const real* before(Position& at) const {
        const auto& a = *args;
        const int64_t size = alive(at.t), b = at.b;
        const int64_t start = at.start + (a.reverse ? size : -alive(at.t - 1));
        const bool first = a.reverse ? b >= alive(at.t + 1) : at.t == 0;
        if (++at.b == size) at = {at.t + 1, 0, at.start + size};
        return first ? a.h0 + b * a.P : a.h_prev + (start + b) * a.stride_h;
    }

    // Rows `first` to `first + count` of a sample, to set the sums or to `add` to them.
    struct Terms {
        int64_t sample, first, count;
        bool add;
    };

    const real* row(const real* of, int64_t width, const Terms& terms, int64_t k) const {
        return of + ((terms.first + k) * args->samples + terms.sample) * width;
    }

    // Share `index` of the sum, over up to `depth` rows of dpre, of dpreᵀ times `rows`.
    void add_product(int64_t index, const real* dpre, const real* const* rows, real* to, int64_t width,
                     const Terms& terms) const {
        const Range mine = share(tiles(), index, args->threads);
        if (!direct()) pack(mine, dpre, terms);
        add_columns(mine, dpre, packed_columns + index * depth * V * L, rows, to, width, terms);
    }

    // Packs dpre: the R numbers of a tile for k = 0, then for k = 1, and so on. They are copied as
    // one vector of W, whose rest the next k overwrites.
    static constexpr int W = R <= 4 ? 4 : 8;
    typedef real Copied
        __attribute__((vector_size(W * sizeof(real)), aligned(sizeof(real)), may_alias));

    void pack(Range mine, const real* dpre, const Terms& terms) const {
        const auto& a = *args;
        const int64_t begin = mine.begin * R, end = least(mine.end * R, a.M);
        for (int64_t k = 0; k < terms.count; k++) {
            const real* from = dpre + k * a.stride_dpre;
            int64_t m = begin;
            real* to = packed_dpre + mine.begin * tile_size + k * R;
            for (; m < end && m + W <= a.M; m += R, to += tile_size)
                *(Copied*)to = *(const Copied*)(from + m);
            for (; m < end; m += R, to += tile_size)
                for (int64_t r = 0; r < R; r++) to[r] = m + r < end ? from[m + r] : 0;
        }
    }

    void add_bias(Range mine, const real* dpre, const Terms& terms) const {
        const auto& a = *args;
        const int64_t begin = mine.begin * R, end = least(mine.end * R, a.M);
        real* dbias = a.dbias + terms.sample * a.M;
        for (int64_t m = begin; m < end; m += L) {
            vec sum[8] = {};
            for (int64_t k = 0; k < terms.count; k += 8)
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++)
                    if (k + j < terms.count) sum[j] += load(dpre + (k + j) * a.stride_dpre + m, end - m);
            vec total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
            if (terms.add) total += load(dbias + m, end - m);
            store(dbias + m, total, end - m);  // B13
        }
    }

    // Adds dpreᵀ times `rows` over the terms to `to`, or for the first terms sets it.
    void add_columns(Range mine, const real* dpre, real* columns, const real* const* rows, real* to,
                     int64_t width, const Terms& terms) const {
        to += terms.sample * args->M * width;
        for (int64_t first = 0; first < width; first += V * L) {
            const int64_t vectors = least(V, (width - first + L - 1) / L);
            for (int64_t k = 0; k < terms.count; k++)
                for (int64_t v = 0; v < vectors; v++) {
                    const int64_t column = first + v * L;
                    store(columns + (k * vectors + v) * L,
                          load(rows[k] + column, width - column));
                }
            for (int64_t t = mine.begin; t < mine.end; t++) {
                const Tile tile = tile_at(t, dpre);
                real* at = to + tile.first * width + first;
                switch (vectors) {
                    case 1: add_tile<1>(tile, columns, at, width, width - first, terms); break;
                    case 2: add_tile<2>(tile, columns, at, width, width - first, terms); break;
                    case 3: add_tile<3>(tile, columns, at, width, width - first, terms); break;
                    default: add_tile<V>(tile, columns, at, width, width - first, terms);
                }
            }
        }
    }

    // R rows of the weight from `first` on: of their sums over dpre, those in `wanted` are added. Their
    // numbers for term k + 1 lie `stride` after those for k.
    struct Tile {
        const real* dpre;
        int64_t stride, first;
        Range wanted;
    };

    Tile tile_at(int64_t t, const real* dpre) const {
        const int64_t M = args->M, first = t * R;
        if (!direct()) return {packed_dpre + t * tile_size, R, first, {0, least(R, M - first)}};
        const int64_t early = least(first, M - R);  // of the last tile: nothing beyond a row is read
        return {dpre + early, args->stride_dpre, early, {first - early, R}};
    }

    template <int VECS>
    static INLINE void sum_terms(vec (&to)[R][VECS], const Tile& tile, const real* columns,
                                 int64_t first, int64_t end) {
        vec sum[R][VECS] = {};
#pragma GCC unroll terms_at_once
        for (int64_t k = first; k < end; k++)
            add_term(sum, tile.dpre + k * tile.stride, columns + k * VECS * L);
        memcpy(to, sum, sizeof(sum));
    }

    // sum[r][v] += a[r] · b[v]. Of the two the fewer stay in registers, beside all sums.
    template <int VECS>
    static INLINE void add_term(vec (&sum)[R][VECS], const real* a, const real* b) {
        if constexpr (R < VECS) {
            vec numbers[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) numbers[r] = broadcast(a[r]);
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++)
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) sum[r][v] += numbers[r] * load(b + v * L);
        } else {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int v = 0; v < VECS; v++) sum[r][v] += a[r] * load(b + v * L);
        }
    }

    template <int VECS>
    NOINLINE void add_tile(const Tile& tile, const real* columns, real* to, int64_t width,
                           int64_t left, const Terms& terms) const {
        for (int64_t r = tile.wanted.begin; r < tile.wanted.end; r++)
            for (int64_t v = 0; v < VECS; v++) __builtin_prefetch(to + r * width + v * L, 1);
        vec half[R][VECS], sum[R][VECS];
        sum_terms<VECS>(half, tile, columns, 0, terms.count / 2);
        __asm__("" : "+m"(half));  // in memory, while the other half needs the registers
        sum_terms<VECS>(sum, tile, columns, terms.count / 2, terms.count);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) {
                if (r < tile.wanted.begin || r >= tile.wanted.end) continue;
                real* at = to + r * width + v * L;
                const vec before = terms.add ? load(at, left - v * L) : vec{};
                store(at, before + (half[r][v] + sum[r][v]), left - v * L);
            }
    }
};

// Sets the gradients of the diagonal peepholes of units [begin, end), or adds to them, over `count`
// rows of dpre (·, stride_dpre), with c_{t-1} and c of every row. A null gradient is not made.
template <typename real>
void add_peepholes(const Range& units, int64_t H, const real* dpre, int64_t stride_dpre,
                   const real* const* c_prev, const real* const* c, int64_t count,
                   real* const (&dweight)[3], bool add) {
    using vec = vec_of<real>;
    constexpr int64_t L = Vector<real>::lanes;
    for (int64_t u = units.begin; u < units.end; u += L)
        for (int64_t g = 0; g < 3; g++) {
            if (!dweight[g]) continue;
            const int64_t lanes = H - u;
            vec sum[4] = {};
            for (int64_t k = 0; k < count; k += 4)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    if (k + j < count)
                        sum[j] += load(dpre + (k + j) * stride_dpre + (g < 2 ? g : 3) * H + u, lanes) *
                                  load((g < 2 ? c_prev : c)[k + j] + u, lanes);
            vec total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            if (add) total += load(dweight[g] + u, lanes);
            store(dweight[g] + u, total, lanes);  // B15
        }
}

// The share of a thread in H units, in whole vectors.
template <typename real>
Range share_units(int64_t H, int64_t thread, int64_t threads) {
    constexpr int64_t L = Vector<real>::lanes;
    const Range mine = share((H + L - 1) / L, thread, threads);
    return {mine.begin * L, least(mine.end * L, H)};
}

template <typename real>
Outcome run_peephole_sums(const PeepholeSumsArguments<real>& a) {
    constexpr int64_t depth = WeightSums<real>::depth;
    run_on(a.threads, [&](int64_t thread, int64_t threads, Barrier&) {
        const Range mine = share_units<real>(a.H, thread, threads);
        const real *c_prev[depth], *c[depth];
        for (int64_t n = 0; n < a.N; n += depth) {
            const int64_t count = least(depth, a.N - n);
            for (int64_t k = 0; k < count; k++)
                c_prev[k] = a.c_prev + (n + k) * a.H, c[k] = a.c + (n + k) * a.H;
            add_peepholes(mine, a.H, a.dpre + n * 4 * a.H, 4 * a.H, c_prev, c, count, a.dweight, n > 0);
        }
    });
    return DONE;
}

template <typename Sums, typename Arguments>
Outcome run_sums(const Arguments& a) {
    Workspace workspace;
    Sums sums;
    sums.plan(workspace, a);
    if (!workspace.allocate()) return NO_MEMORY;
    sums.plan(workspace, a);
    run_on(a.threads, [&](int64_t thread, int64_t threads, Barrier& everyone) {
        sums.prepare(thread, threads);
        everyone.wait();
        sums.run(thread, threads);
    });
    return DONE;
}

}  // namespace
