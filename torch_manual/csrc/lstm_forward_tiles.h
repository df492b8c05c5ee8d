// What a step of the forward recurrence is covered with: F2 to F8 as the epilogue of the product
// h_{t-1} W_hhᵀ of F1, a tile at a time.
#pragma once

#include "lstm_forward.h"

namespace {

// The input part of F1 and of R1: x Wᵀ and, if given, a bias, written or added to what is there.
template <typename real, bool tangent>
struct Forward<real, tangent>::InputTile {
    static constexpr int max_rows = gate_rows;
    const Forward* self;
    const real *x, *weight, *bias;
    bool add;
    real* pre;

    Lines ahead(int64_t panel) const { return Lines::of_panel(weight, self->I * 4 * L, panel); }

    template <int ROWS>
    NOINLINE void tile(int64_t row, int64_t panel, const Lines& ahead) const {
        const Forward& f = *self;
        vec sum[ROWS][4];
        if (tangent)  // then `pre` is memory not seen for long
            for (int r = 0; r < ROWS; r++)
                for (int g = 0; g < 4; g++)
                    __builtin_prefetch(pre + (row + r) * f.stride_pre + g * f.H + panel * L, 1);
        // A single row is summed as many are: how many stand here together is chance.
        gate_product<false, 1>(sum, x + row * f.I, f.I, weight + panel * f.I * 4 * L, f.I,
                               ahead);
        for (int r = 0; r < ROWS; r++)
            for (int g = 0; g < 4; g++) {
                vec b = bias ? load(bias + (g * f.panels + panel) * L) : vec{};
                real* to = pre + (row + r) * f.stride_pre + g * f.H + panel * L;
                if (add) b += load(to, f.H - panel * L);
                store(to, sum[r][g] + b, f.H - panel * L);
            }
    }
};

// The same, to the bit, where it is fused: x Wᵀ + b of a tile's rows.
template <typename real, bool tangent>
template <int ROWS>
INLINE void Forward<real, tangent>::set_input(vec (&sum)[ROWS][4], const real* x,
                                              const real* ih_panel, int64_t panel) const {
    gate_product<false, 1>(sum, x, I, ih_panel, I);
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
        const vec b = load(bias + (g * panels + panel) * L);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) sum[r][g] += b;
    }
}

template <typename real, bool tangent>
struct Forward<real, tangent>::GateTile {
    static constexpr int max_rows = gate_rows;
    const Forward* self;
    const Step* step;
    const real *ih, *hh;  // the panels from `first` on
    int64_t first;

    Lines ahead(int64_t panel) const {
        return Lines::of_panel(hh, self->P * 4 * L, panel - first);
    }

    template <int ROWS>
    NOINLINE void tile(int64_t row, int64_t panel, const Lines& ahead) const {
        const Forward& f = *self;
        const int64_t u = panel * L, lanes = f.H - u;
        vec sum[ROWS][4];
        for (int r = 0; r < ROWS; r++) f.prefetch(*step, row + r, u);
        const real* h_prev = step->h_prev + row * f.stride_h;
        const real* W_hh = hh + (panel - first) * f.P * 4 * L;
        const real* pre = step->pre + row * f.stride_pre + u;
        // Long sums are closed in parts: only with the input part first does it not matter to the bits
        // whether it is fused.
        const bool input_first = !tangent && (f.fused || f.P > longest_sum);
        if (input_first) {
            if (f.fused)
                f.set_input(sum, step->x + row * f.I, ih + (panel - first) * f.I * 4 * L, panel);
            else
                for (int r = 0; r < ROWS; r++)
                    for (int g = 0; g < 4; g++)
                        sum[r][g] = load(pre + r * f.stride_pre + g * f.H, lanes);
            gate_product<true>(sum, h_prev, f.stride_h, W_hh, f.P, ahead);  // F1
        } else {
            gate_product<false>(sum, h_prev, f.stride_h, W_hh, f.P, ahead);
        }
        if (f.full()) {
            vec peep[ROWS][2];
            clear(peep);
            const real* c_prev = step->c_prev + row * f.stride_c;
            add_product(peep, c_prev, f.stride_c, f.peep_if + panel * f.H * 2 * L, 2 * L, f.H);
            for (int r = 0; r < ROWS; r++)
                for (int g = 0; g < 2; g++) sum[r][g] += peep[r][g];
        }
        vec c[ROWS];
        for (int r = 0; r < ROWS; r++) {
            for (int g = 0; g < 4 && !input_first; g++)
                sum[r][g] += load(pre + r * f.stride_pre + g * f.H, lanes);  // F1, R1
            c[r] = f.new_cell(*step, row + r, u, sum[r]);
        }
        if (tangent || f.full()) return;
        for (int r = 0; r < ROWS; r++)
            f.output(*step, row + r, u, sum[r][3] + f.peep(f.w.weight_co, u, c[r]), c[r]);
    }
};

// F1 from dot products with the rows of the weights, where packing them would not pay.
template <typename real, bool tangent>
struct Forward<real, tangent>::UnpackedTile {
    static constexpr int max_rows = least(4, wide_rows);
    const Forward* self;
    const Step* step;

    Lines ahead(int64_t) const { return {}; }

    template <int ROWS>
    NOINLINE void tile(int64_t row, int64_t panel, const Lines&) const {
        const Forward& f = *self;
        const int64_t first = panel * L;
        real pre[ROWS][4][L] = {};
        for (int64_t u = first; u < least(f.H, first + L); u++) {
            vec sum[ROWS][4];
            clear(sum);
            add_dots(sum, step->x + row * f.I, f.I, f.w.weight_ih + u * f.I, f.H * f.I, f.I);
            add_dots(sum, step->h_prev + row * f.stride_h, f.stride_h, f.w.weight_hh + u * f.P,
                     f.H * f.P, f.P);
            for (int g = 0; g < 2; g++) {
                const real* weight = g ? f.w.weight_cf : f.w.weight_ci;
                if (!f.full() || !weight) continue;
                vec peep[ROWS][1] = {};
                const real* c_prev = step->c_prev + row * f.stride_c;
                add_dots(peep, c_prev, f.stride_c, weight + u * f.H, 0, f.H);
                for (int r = 0; r < ROWS; r++) sum[r][g] += peep[r][0];
            }
            for (int r = 0; r < ROWS; r++)
                for (int g = 0; g < 4; g++) pre[r][g][u - first] = sum_lanes<real>(sum[r][g]);
        }
        for (int r = 0; r < ROWS; r++) {
            vec sum[4];
            for (int g = 0; g < 4; g++)
                sum[g] = load(pre[r][g]) + load(f.bias + (g * f.panels + panel) * L);
            const vec c = f.new_cell(*step, row + r, first, sum);
            if (!f.full())
                f.output(*step, row + r, first, sum[3] + f.peep(f.w.weight_co, first, c), c);
        }
    }
};

// F2 to F5 for units u to u + L of sequence b; returns c. output() goes on in a loop of its own over
// the rows of a tile, so that rows overlap: in each, every term waits for the one before. Full
// peepholes are in `pre` already, but for that of o, which needs all of c: OutputGateTile goes on.
template <typename real, bool tangent>
INLINE auto Forward<real, tangent>::new_cell(const Step& step, int64_t b, int64_t u,
                                             const vec (&pre)[4]) const -> vec {
    if constexpr (tangent) return gate_tangents(step, b, u, pre), vec{};
    const int64_t lanes = H - u;
    const vec c_prev = load(step.c_prev + b * stride_c + u, lanes);
    const Product ig = sigmoid_tanh(pre[0] + peep(w.weight_ci, u, c_prev), pre[2]);  // F2, F4
    const vec f = sigmoid<real>(pre[1] + peep(w.weight_cf, u, c_prev));              // F3
    const vec c = f * c_prev + ig.product;                                           // F5
    store(step.c + b * stride_c + u, c, lanes);
    if (step.gates) {
        real* gates = step.gates + b * 4 * H + u;
        store(gates, ig.sigmoid, lanes), store(gates + H, f, lanes);
        store(gates + 2 * H, ig.tanh, lanes);
        store(step.cells + b * H + u, c, lanes);
    }
    if (full()) store(step.pre + b * stride_pre + 3 * H + u, pre[3], lanes);
    return c;
}

template <typename real, bool tangent>
INLINE auto Forward<real, tangent>::peep(const real* weight, int64_t u, vec c) const -> vec {
    return weight && !full() ? c * load(weight + u, H - u) : vec{};
}

// o and m, from all of o's pre-activation and the new c.
template <typename real, bool tangent>
INLINE void Forward<real, tangent>::output(const Step& step, int64_t b, int64_t u, vec pre_o,
                                           vec c) const {
    if constexpr (tangent) return output_tangent(step, b, u, pre_o, c);
    const int64_t lanes = H - u;
    const Product m_new = sigmoid_tanh(pre_o, c);  // F6, F7
    if (step.gates) store(step.gates + b * 4 * H + 3 * H + u, m_new.sigmoid, lanes);
    if (w.weight_hr) {
        store(m + b * stride_c + u, m_new.product, lanes);
    } else {
        store(step.h + b * stride_h + u, m_new.product, lanes);
        if (step.y) store(step.y + b * args->sizes.D * P + u, m_new.product, lanes);
    }
}

// σ(x) = 1 / d, tanh(z) = e / (e + 2) and their product, with one division. What is 1 is made so: the
// backward pass multiplies 1 - σ and 1 - tanh² with what may be infinite.
template <typename real, bool tangent>
struct Forward<real, tangent>::Product {
    vec sigmoid, tanh, product;
};

template <typename real, bool tangent>
INLINE auto Forward<real, tangent>::sigmoid_tanh(vec x, vec z) -> Product {
    const vec d = one_plus_exp<real>(x), e = expm1_twice<real>(z);
    const vec quotient = (real)1 / (d * (e + (real)2));
    const vec product = quotient * e, one = broadcast<real>((real)1);
    const auto sign = sign_of<real>(z);
    return {d == one ? one : unless_closed<real>(quotient * (e + (real)2), x),
            with_sign<real>(e + (real)2 == e ? one : product * d, sign),
            through_gate<real>(with_sign<real>(product, sign), x)};
}

// Asks for memory not seen for long that the tile will read and write.
template <typename real, bool tangent>
INLINE void Forward<real, tangent>::prefetch(const Step& step, int64_t b, int64_t u) const {
    if constexpr (tangent) return prefetch_of_tangent(step, b, u);
    if (!step.gates) return;
    for (int g = 0; g < 4; g++) __builtin_prefetch(step.gates + b * 4 * H + g * H + u, 1);
    __builtin_prefetch(step.cells + b * H + u, 1);
    if (step.y) __builtin_prefetch(step.y + b * args->sizes.D * P + u, 1);
}

// The rest of a step with full peepholes: pre_o + c W_coᵀ.
template <typename real, bool tangent>
struct Forward<real, tangent>::OutputGateTile {
    static constexpr int max_rows = narrow_rows;
    const Forward* self;
    const Step* step;

    Lines ahead(int64_t) const { return {}; }

    template <int ROWS>
    NOINLINE void tile(int64_t row, int64_t pair, const Lines&) const {
        const Forward& f = *self;
        vec sum[ROWS][2];
        clear(sum);
        const real* c = step->c + row * f.stride_c;
        add_product(sum, c, f.stride_c, f.peep_o + pair * f.H * 2 * L, 2 * L, f.H);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < 2; v++) {
                const int64_t u = (2 * pair + v) * L, lanes = f.H - u;
                if (lanes <= 0) break;
                const real* pre_o = step->pre + (row + r) * f.stride_pre + 3 * f.H + u;
                f.output(*step, row + r, u, load(pre_o, lanes) + sum[r][v],
                         load(c + r * f.stride_c + u, lanes));
            }
    }
};

template <typename real, bool tangent>
struct Forward<real, tangent>::ProjectionTile {
    static constexpr int max_rows = narrow_rows;
    const Forward* self;
    const Step* step;

    Lines ahead(int64_t) const { return {}; }

    template <int ROWS>
    NOINLINE void tile(int64_t row, int64_t panel, const Lines&) const {
        const Forward& f = *self;
        vec sum[ROWS][2];
        clear(sum);
        const real* m = f.m + row * f.stride_c;
        add_product(sum, m, f.stride_c, f.hr + panel * f.H * 2 * L, 2 * L, f.H);  // F8
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < 2; v++) {
                const int64_t p = (2 * panel + v) * L, lanes = f.P - p;
                if (lanes <= 0) break;
                real* y = step->y + (row + r) * f.args->sizes.D * f.P + p;
                if (tangent) sum[r][v] += load(y, lanes);  // R8
                store(step->h + (row + r) * f.stride_h + p, sum[r][v], lanes);
                store(y, sum[r][v], lanes);
            }
    }
};

}  // namespace
