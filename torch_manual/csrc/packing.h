// The packing of weights into panels: the columns of one panel for k = 0, then for k = 1, and so on, so
// that a product reads memory in order.
#pragma once

#include "digest.h"
#include "product.h"

namespace {

// Whether `rows` pay for packing the columns of a weight, which could be read where they are. They
// lie far apart, and those of a large weight leave the caches between two tiles.
template <typename real>
bool pays_to_pack_columns(int64_t rows, int64_t numbers) {
    const bool large = numbers * (int64_t)sizeof(real) > 2 << 20;
    return rows > (large ? 2 : 8) * narrow_rows;
}

// Packs rows `first` to `first + lanes` of W (·, K), transposed: to[k · step + lane] = W[first + lane][k].
// Rows from `n_rows` on are zeros.
template <typename real>
void pack_transposed(real* to, int64_t step, const real* W, int64_t first, int64_t n_rows,
                     int64_t K) {
    constexpr int L = Vector<real>::lanes;
    for (int64_t k = 0; k < K; k += L) {
        vec_of<real> square[L];
        for (int lane = 0; lane < L; lane++)
            square[lane] = first + lane < n_rows ? load(W + (first + lane) * K + k, K - k)
                                                 : vec_of<real>{};
        transpose<real>(square);
        for (int64_t j = 0; j < least(L, K - k); j++) store(to + (k + j) * step, square[j]);
    }
}

// Packs panels [begin, end), of 2 lanes' columns each, of the K rows of W (K, n_columns), zeros after
// the last column: panel p from `to + p · size` on. Rows are read along, a few at a time.
template <typename real>
void pack_columns(real* to, int64_t size, const real* W, int64_t begin, int64_t end,
                  int64_t n_columns, int64_t K) {
    constexpr int64_t L = Vector<real>::lanes, rows = 8;
    for (int64_t first = 0; first < K; first += rows)
        for (int64_t p = begin; p < end; p++)
            for (int64_t k = first; k < least(K, first + rows); k++)
                for (int v = 0; v < 2; v++) {
                    const int64_t column = (2 * p + v) * L, left = n_columns - column;
                    store(to + p * size + (k * 2 + v) * L,
                          left > 0 ? load(W + k * n_columns + column, left) : vec_of<real>{});
                }
}

constexpr int64_t large_weight = 1 << 20;  // bytes: the panels of one do not stay near

// The digest of the rows of a weight (4H, K) that are packed into `panel`.
template <typename real>
uint64_t digest_of_gates(const real* weight, int64_t panel, int64_t H, int64_t K) {
    constexpr int64_t L = Vector<real>::lanes;
    const int64_t rows = least(L, H - panel * L);
    Digest digest;
    for (int64_t g = 0; g < 4; g++)
        digest.add(weight + (g * H + panel * L) * K, rows * K * (int64_t)sizeof(real));
    return digest.value();
}

// Packs panels `of` a weight (4H, K), each of the L units' four gates, G = gates_at_once of them side
// by side: (4 / G, K, G, L), from `to` on. Where there are `digests` of all panels, one whose rows have
// not changed is as it was packed before.
//
// Memory out of the caches is written much faster in order than a line here and a line there. So where
// the weight is large, gates are packed into the last panel's place, which stays near, one after
// another, and lined up from there; those of the last panel come into their places at once.
template <typename real>
NOINLINE void pack_gates(real* to, const real* weight, const Range& of, int64_t H, int64_t K,
                         uint64_t* digests) {
    constexpr int64_t L = Vector<real>::lanes, G = gates_at_once;
    const bool large = 4 * H * K * (int64_t)sizeof(real) > large_weight;
    real* const last = to + (of.end - 1 - of.begin) * 4 * K * L;
    bool last_is_used = false;
    for (int64_t p = of.begin; p < of.end; p++, to += 4 * K * L) {
        const bool in_turn = large && to != last;
        if (digests) {
            const uint64_t before = digests[p];
            digests[p] = digest_of_gates(weight, p, H, K);
            if (digests[p] == before && !(to == last && last_is_used)) continue;
        }
        last_is_used = last_is_used || in_turn;
        for (int64_t g = 0; g < 4; g++) {
            real* const gate = in_turn ? last + g * K * L : to + (g / G * K * G + g % G) * L;
            pack_transposed(gate, in_turn ? L : G * L, weight + g * H * K, p * L, H, K);
        }
        for (int64_t first = 0; in_turn && first < 4; first += G)
            for (int64_t k = 0; k < K; k++)
                for (int64_t g = 0; g < G; g++)
                    store(to + (first * K + k * G + g) * L, load(last + ((first + g) * K + k) * L));
        // Somebody may have written to the weight meanwhile, and this digest be of what was there before.
        if (digests && digest_of_gates(weight, p, H, K) != digests[p]) digests[p] = 0;
    }
}

}  // namespace
