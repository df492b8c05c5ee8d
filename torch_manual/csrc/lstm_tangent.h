// The gate mathematics of the tangents: R2 to R7 after tpre, R10 to R16 after tdm.
#pragma once

#include "lstm_backward_tiles.h"
#include "lstm_forward_tiles.h"

namespace {

template <typename real, bool tangent>
INLINE void Forward<real, tangent>::prefetch_of_tangent(const Step& step, int64_t b, int64_t u) const {
    for (int64_t k = 0; k < 4; k++) {
        __builtin_prefetch(step.of_gates + b * 4 * H + k * H + u);
        __builtin_prefetch(step.gates + b * 4 * H + k * H + u, 1);
    }
    __builtin_prefetch(step.of_cells + b * H + u);
    __builtin_prefetch(step.cells + b * H + u, 1);
    if (b < step.has_prev) __builtin_prefetch(step.of_cells_prev + b * H + u);
}

// What the tangents of peepholes add is in `tpre` already.
template <typename real, bool tangent>
NOINLINE void Forward<real, tangent>::gate_tangents(const Step& step, int64_t b, int64_t u,
                                                  const vec (&tpre)[4]) const {
    const int64_t lanes = H - u;
    const real* of = step.of_gates + b * 4 * H + u;
    const vec i = load(of, lanes), f = load(of + H, lanes), g = load(of + 2 * H, lanes);
    const vec c_prev = load(b < step.has_prev ? step.of_cells_prev + b * H + u
                                              : args->of_c0 + (direction * B + b) * H + u, lanes);
    const vec tc_prev = load(step.c_prev + b * stride_c + u, lanes);
    const vec ti = i * ((real)1 - i) * (tpre[0] + peep(w.weight_ci, u, tc_prev));  // R2
    const vec tf = f * ((real)1 - f) * (tpre[1] + peep(w.weight_cf, u, tc_prev));  // R3
    const vec tg = ((real)1 - g * g) * tpre[2];                                 // R4
    const vec tc = tf * c_prev + f * tc_prev + ti * g + i * tg;                 // R5
    store(step.c + b * stride_c + u, tc, lanes);
    store(step.cells + b * H + u, tc, lanes);
    real* tgates = step.gates + b * 4 * H + u;
    store(tgates, ti, lanes), store(tgates + H, tf, lanes), store(tgates + 2 * H, tg, lanes);
    if (full())
        store(tgates + 3 * H, tpre[3], lanes);
    else
        output_tangent(step, b, u, tpre[3] + peep(w.weight_co, u, tc), tc);
}

template <typename real, bool tangent>
INLINE void Forward<real, tangent>::output_tangent(const Step& step, int64_t b, int64_t u,
                                                   vec tpre_o, vec tc) const {
    const int64_t lanes = H - u;
    const vec o = load(step.of_gates + b * 4 * H + 3 * H + u, lanes);
    const vec tanh_c = ::tanh<real>(load(step.of_cells + b * H + u, lanes));
    const vec to = o * ((real)1 - o) * tpre_o;                                   // R6
    const vec tm = to * tanh_c + o * ((real)1 - tanh_c * tanh_c) * tc;           // R7
    store(step.gates + b * 4 * H + 3 * H + u, to, lanes);
    if (w.weight_hr) {
        store(m + b * stride_c + u, tm, lanes);
    } else {
        store(step.h + b * stride_h + u, tm, lanes);
        store(step.y + b * args->sizes.D * P + u, tm, lanes);
    }
}

// `tdm` comes with R9 and, with weight_hr, the first product of R10.
template <typename real, bool tangent>
NOINLINE void Backward<real, tangent>::cell_tangents(const Step& step, int64_t b, int64_t u,
                                                   vec tdm) const {
    const int64_t lanes = H - u, row = (step.row + b) * H + u, state = (direction * B + b) * H + u;
    const int64_t row_o = (step.row + b) * 4 * H + 3 * H + u;
    const vec o = load(args->gates + row_o, lanes), to = load(args->tgates + row_o, lanes);
    const vec tanh_c = ::tanh<real>(load(args->cells + row, lanes));
    const vec slope = (real)1 - tanh_c * tanh_c;
    const vec tc = load(args->tcells + row, lanes), dm = load(args->dm + row, lanes);
    if (args->tdm) tdm += load(args->tdm + row, lanes);  // R10
    const vec tdpre_o = (tdm * tanh_c + dm * slope * tc) * o * ((real)1 - o) +
                        dm * tanh_c * ((real)1 - (real)2 * o) * to;  // R11
    vec tdc = load(args->dc0 + state, lanes) +
              (tdm * o + dm * to - (real)2 * dm * o * tanh_c * tc) * slope;  // R12
    if (step.dcells) tdc += load(step.dcells + b * H + u, lanes);
    vec dc = load(args->dc_next + state, lanes) + dm * o * slope;
    if (args->dc_given) dc += load(args->dc_given + row, lanes);
    store(args->dc_next + state, dc, lanes);
    keep(step, b, 3 * H + u, tdpre_o, lanes);
    if (full()) return store(args->dc0 + state, tdc, lanes);
    if (w.weight_co) tdc += tdpre_o * load(w.weight_co + u, lanes);
    gate_tangents_back(step, b, u, tdc);
}

template <typename real, bool tangent>
NOINLINE void Backward<real, tangent>::gate_tangents_back(const Step& step, int64_t b, int64_t u,
                                                        vec tdc) const {
    const int64_t lanes = H - u, state = (direction * B + b) * H + u;
    const int64_t row = (step.row + b) * 4 * H + u, prev = (step.row_prev + b) * H + u;
    const real *gates = args->gates + row, *tgates = args->tgates + row;
    const vec i = load(gates, lanes), f = load(gates + H, lanes), g = load(gates + 2 * H, lanes);
    const vec ti = load(tgates, lanes), tf = load(tgates + H, lanes),
              tg = load(tgates + 2 * H, lanes);
    const bool inside = b < step.has_prev;
    const vec c_prev = load(inside ? args->cells + prev : args->c0 + state, lanes);
    const vec tc_prev = load(inside ? args->tcells + prev : args->tc0 + state, lanes);
    const vec dc = load(args->dc_next + state, lanes);
    const vec tdpre_i = (tdc * g + dc * tg) * i * ((real)1 - i) +
                        dc * g * ((real)1 - (real)2 * i) * ti;  // R13
    const vec tdpre_f = (tdc * c_prev + dc * tc_prev) * f * ((real)1 - f) +
                        dc * c_prev * ((real)1 - (real)2 * f) * tf;  // R14
    const vec tdpre_g = (tdc * i + dc * ti) * ((real)1 - g * g) - (real)2 * dc * i * g * tg;  // R15
    vec tdc_prev = tdc * f + dc * tf;  // R16
    if (!full() && w.weight_ci) tdc_prev += tdpre_i * load(w.weight_ci + u, lanes);
    if (!full() && w.weight_cf) tdc_prev += tdpre_f * load(w.weight_cf + u, lanes);
    store(args->dc0 + state, tdc_prev, lanes);
    store(args->dc_next + state, dc * f, lanes);
    keep(step, b, u, tdpre_i, lanes), keep(step, b, H + u, tdpre_f, lanes);
    keep(step, b, 2 * H + u, tdpre_g, lanes);
}

}  // namespace
