// What a step of the backward recurrence is covered with: B1 to B8 as the epilogue of the product
// dpre_{t+1} W_hh of B9, a tile at a time.
#pragma once

#include "lstm_backward.h"

namespace {

// B9, dpre W_hh, for 2L outputs or the last L.
template <typename real, bool tangent>
template <int ROWS, typename Asked>
INLINE void Backward<real, tangent>::recurrent(vec (&sum)[ROWS][2], const real* from, int64_t row,
                                               int64_t panel, const Asked& asked) const {
    const bool whole = packed(panel);
    const real* weight = whole ? hh + panel * 4 * H * 2 * L : w.weight_hh + panel * 2 * L;
    const int64_t step = whole ? 2 * L : P;
    from += row * stride_dpre;
    if (P - panel * 2 * L > L)
        return product<false>(sum, from, stride_dpre, weight, step, 4 * H, asked);  // B9, R17
    asked.ask();
    vec first[ROWS][1] = {};
    add_product(first, from, stride_dpre, weight, step, 4 * H);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) sum[r][0] = first[r][0];
}

// B1 for outputs p to p + L of sequence b; `sent` is what the next step sent back.
template <typename real, bool tangent>
INLINE auto Backward<real, tangent>::dh_at(const Step& step, int64_t b, int64_t p,
                                           vec sent) const -> vec {
    const int64_t lanes = P - p;
    vec dh_b = sent;
    if (step.dy) dh_b += load(step.dy + b * args->stride_dy + p, lanes);  // B1, R9
    if (b >= step.going_on && args->dh_n)
        dh_b += load(args->dh_n + (direction * B + b) * P + p, lanes);
    return dh_b;
}

template <typename real, bool tangent>
struct Backward<real, tangent>::OutputTile {
    static constexpr int max_rows = narrow_rows;
    const Backward* self;
    const Step* step;

    Lines ahead(int64_t) const { return {}; }

    template <int ROWS>
    NOINLINE void tile(int64_t row, int64_t panel, const Lines&) const {
        const Backward& f = *self;
        vec sum[ROWS][2];
        if (step->product)
            f.recurrent(sum, step->dpre_next, row, panel);
        else
            clear(sum);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < 2; v++) {
                const int64_t p = (2 * panel + v) * L, lanes = f.P - p;
                if (lanes <= 0) break;
                const vec dh_b = f.dh_at(*step, row + r, p, sum[r][v]);
                store(f.dh + (row + r) * f.stride_dh + p, dh_b, lanes);
                store(step->dh + (row + r) * f.P + p, dh_b, lanes);
            }
    }
};

template <typename real, bool tangent>
struct Backward<real, tangent>::CellTile {
    static constexpr int max_rows = narrow_rows;
    const Backward* self;
    const Step* step;

    Lines ahead(int64_t pair) const {
        if (self->w.weight_hr || !self->packed(0)) return {};
        return Lines::of_panel(self->hh, 4 * self->H * 2 * L, pair);
    }

    template <int ROWS>
    NOINLINE void tile(int64_t row, int64_t pair, const Lines& ahead) const {
        const Backward& f = *self;
        vec sum[ROWS][2];
        Wanted<ROWS * most_wanted> wanted;
        for (int r = 0; r < ROWS; r++) f.want(wanted, *step, row + r, pair * 2 * L);
        wanted.ahead = ahead;
        if (!f.w.weight_hr && step->product) {
            f.recurrent(sum, step->dpre_next, row, pair, wanted);
        } else {
            wanted.ask();
            clear(sum);
            if (f.w.weight_hr)  // B2
                add_product(sum, f.dh + row * f.stride_dh, f.stride_dh,
                            f.hr + pair * f.P * 2 * L, 2 * L, f.P);
        }
        vec tanh_c[ROWS][2];  // before the rest, whose every term waits for it
        for (int r = 0; r < ROWS && !tangent; r++)
            for (int v = 0; v < 2; v++) {
                const int64_t u = (2 * pair + v) * L;
                if (u >= f.H) break;
                tanh_c[r][v] = ::tanh<real>(load(step->cells + (row + r) * f.H + u, f.H - u));
            }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < 2; v++) {
                const int64_t u = (2 * pair + v) * L;
                if (u >= f.H) break;
                vec dm = f.w.weight_hr ? sum[r][v] : f.dh_at(*step, row + r, u, sum[r][v]);
                if constexpr (tangent) {
                    f.cell_tangents(*step, row + r, u, dm);
                    continue;
                }
                if (step->dh && !f.w.weight_hr) store(step->dh + (row + r) * f.P + u, dm, f.H - u);
                f.cell(*step, row + r, u, dm, tanh_c[r][v]);
            }
    }
};

template <typename real, bool tangent>
template <int MOST>
INLINE void Backward<real, tangent>::want(Wanted<MOST>& wanted, const Step& step, int64_t b,
                                          int64_t u) const {
#pragma GCC unroll 2
    for (int k = 0; k < lines; k++) want_line(wanted, step, b, u + k * line);
    if (H % line) want_line(wanted, step, b, u + 2 * L - 1);  // a row that begins within a line
}

template <typename real, bool tangent>
template <int MOST>
INLINE void Backward<real, tangent>::want_line(Wanted<MOST>& wanted, const Step& step, int64_t b,
                                               int64_t u) const {
#pragma GCC unroll 4
    for (int64_t g = 0; g < 4; g++) {
        wanted.add_to_read(step.gates + b * 4 * H + g * H + u);
        wanted.add_to_write(step.dpre + b * stride_to + g * H + u);
    }
    wanted.add_to_read(step.cells + b * H + u);
    if (b < step.has_prev) wanted.add_to_read(step.cells_prev + b * H + u);
    if constexpr (tangent) {
        const int64_t row = step.row + b;
        for (int64_t g = 0; g < 4; g++) wanted.add_to_read(args->tgates + (row * 4 + g) * H + u);
        wanted.add_to_read(args->tcells + row * H + u);
        wanted.add_to_read(args->dm + row * H + u);
    }
    if (step.dy && !w.weight_hr) wanted.add_to_read(step.dy + b * args->stride_dy + u);
}

// B3 and B4 for units u to u + L of sequence b, and B5 to B8 unless the peepholes are full:
// then PeepholeTile goes on, when all of dpre_o is known.
template <typename real, bool tangent>
INLINE void Backward<real, tangent>::cell(const Step& step, int64_t b, int64_t u, vec dm,
                                          vec tanh_c) const {
    const int64_t lanes = H - u;
    const real* gates = step.gates + b * 4 * H + u;
    const vec o = load(gates + 3 * H, lanes);
    const vec dpre_o = dm * tanh_c * o * ((real)1 - o);  // B3
    real* dc_carry = args->dc0 + (direction * B + b) * H + u;
    vec dc = load(dc_carry, lanes) + dm * o * ((real)1 - tanh_c * tanh_c);  // B4
    if (step.dcells) dc += load(step.dcells + b * H + u, lanes);
    keep(step, b, 3 * H + u, dpre_o, lanes);
    if (full()) return store(dc_carry, dc, lanes);
    if (w.weight_co) dc += dpre_o * load(w.weight_co + u, lanes);
    gates_back(step, b, u, dc);
}

template <typename real, bool tangent>
INLINE void Backward<real, tangent>::gates_back(const Step& step, int64_t b, int64_t u,
                                                vec dc) const {
    const int64_t lanes = H - u;
    const real* gates = step.gates + b * 4 * H + u;
    const vec i = load(gates, lanes), f = load(gates + H, lanes), g = load(gates + 2 * H, lanes);
    const vec c_prev = load(b < step.has_prev ? step.cells_prev + b * H + u
                                              : args->c0 + (direction * B + b) * H + u, lanes);
    const vec dpre_i = dc * g * i * ((real)1 - i);       // B5
    const vec dpre_f = dc * c_prev * f * ((real)1 - f);  // B6
    const vec dpre_g = dc * i * ((real)1 - g * g);       // B7
    vec dc_prev = dc * f;                                // B8
    if (!full() && w.weight_ci) dc_prev += dpre_i * load(w.weight_ci + u, lanes);
    if (!full() && w.weight_cf) dc_prev += dpre_f * load(w.weight_cf + u, lanes);
    store(args->dc0 + (direction * B + b) * H + u, dc_prev, lanes);
    keep(step, b, u, dpre_i, lanes), keep(step, b, H + u, dpre_f, lanes);
    keep(step, b, 2 * H + u, dpre_g, lanes);
}

// Writes dpre of sequence b from number `at` of 4H on, for the sums and for the step before.
template <typename real, bool tangent>
INLINE void Backward<real, tangent>::keep(const Step& step, int64_t b, int64_t at, vec dpre,
                                          int64_t lanes) const {
    store(step.dpre + b * stride_to + at, dpre, lanes);
    if (!reread) store(step.dpre_kept + b * stride_dpre + at, dpre, lanes);
}

// With full peepholes, the rest of B4, what dpre_o sends to c; B5 to B8 follow.
template <typename real, bool tangent>
struct Backward<real, tangent>::PeepholeTile {
    static constexpr int max_rows = narrow_rows;
    const Backward* self;
    const Step* step;

    Lines ahead(int64_t) const { return {}; }

    template <int ROWS>
    NOINLINE void tile(int64_t row, int64_t pair, const Lines&) const {
        const Backward& f = *self;
        vec sum[ROWS][2];
        clear(sum);
        const real* dpre_o = step->dpre_kept + row * f.stride_dpre + 3 * f.H;
        add_product(sum, dpre_o, f.stride_dpre, f.peep_o + pair * f.H * 2 * L, 2 * L, f.H);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < 2; v++) {
                const int64_t u = (2 * pair + v) * L;
                if (u >= f.H) break;
                const real* dc = f.args->dc0 + (f.direction * f.B + row + r) * f.H + u;
                if constexpr (tangent)
                    f.gate_tangents_back(*step, row + r, u, load(dc, f.H - u) + sum[r][v]);
                else
                    f.gates_back(*step, row + r, u, load(dc, f.H - u) + sum[r][v]);
            }
    }
};

// With full peepholes, the rest of B8: what dpre_i and dpre_f send to c of the step before, in dc0. It
// is added at this step, not taken along to the next: then a pass in segments gives the same bits.
template <typename real, bool tangent>
struct Backward<real, tangent>::CarryTile {
    static constexpr int max_rows = narrow_rows;
    const Backward* self;
    const Step* step;

    Lines ahead(int64_t) const { return {}; }

    template <int ROWS>
    NOINLINE void tile(int64_t row, int64_t pair, const Lines&) const {
        const Backward& f = *self;
        vec sum[ROWS][2];
        clear(sum);
        const real* dpre = step->dpre_kept + row * f.stride_dpre;
        add_product(sum, dpre, f.stride_dpre, f.peep_if + pair * 2 * f.H * 2 * L, 2 * L, 2 * f.H);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < 2; v++) {
                const int64_t u = (2 * pair + v) * L, lanes = f.H - u;
                if (lanes <= 0) break;
                real* dc = f.args->dc0 + (f.direction * f.B + row + r) * f.H + u;
                store(dc, load(dc, lanes) + sum[r][v], lanes);
            }
    }
};

// dh0: what the first step of a sequence sends to the initial h.
template <typename real, bool tangent>
struct Backward<real, tangent>::InitialTile {
    static constexpr int max_rows = narrow_rows;
    const Backward* self;
    const Step* step;

    Lines ahead(int64_t) const { return {}; }

    template <int ROWS>
    NOINLINE void tile(int64_t row, int64_t panel, const Lines&) const {
        const Backward& f = *self;
        vec sum[ROWS][2];
        f.recurrent(sum, step->dpre_kept, row, panel);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < 2; v++) {
                const int64_t p = (2 * panel + v) * L, lanes = f.P - p;
                if (lanes <= 0) break;
                store(f.args->dh0 + (f.direction * f.B + row + r) * f.P + p, sum[r][v], lanes);
            }
    }
};

}  // namespace
