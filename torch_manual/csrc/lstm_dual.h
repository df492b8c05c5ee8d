// A forward pass and its tangent at once, F1 to F7 and R1 to R7 as the epilogue of the products of
// both: no gates are kept between the two. Without projection and full peepholes.
#pragma once

#include "lstm_forward_tiles.h"

namespace {

template <typename real>
struct Dual : Forward<real> {
    using Base = Forward<real>;
    using typename Base::Chunk, typename Base::Step, typename Base::vec;
    using Base::args, Base::B, Base::bias, Base::c, Base::direction, Base::fused, Base::h, Base::H,
        Base::hh, Base::I, Base::ih, Base::input_part, Base::input_rows, Base::L, Base::P,
        Base::panels, Base::peep, Base::rows, Base::stride_c, Base::stride_h, Base::stride_pre,
        Base::T, Base::w;

    const DualArguments<real>* dual;
    Weights<real> tw;

    // Borrowed memory, as in Forward. The weights' tangents only where they are given.
    real *tih, *thh, *tbias, *th[2], *tc[2];
    real* tinput_part;  // tx W_ihᵀ + x tW_ihᵀ of some steps

    struct DualStep : Step {
        const real *tx, *tpre, *th_prev, *tc_prev;
        real *th, *tc, *ty, *tcells;
    };

    void plan(Workspace& workspace, const DualArguments<real>& a, int64_t d, const Rows& r) {
        Base::plan(workspace, a, d, r, true);
        dual = &a, tw = a.tweights[d];
        tih = workspace.take<real>(tw.weight_ih ? panels * I * 4 * L : 0);
        thh = workspace.take<real>(tw.weight_hh ? panels * P * 4 * L : 0);
        tbias = workspace.take<real>(4 * panels * L);
        for (int k = 0; k < 2; k++) {
            th[k] = workspace.take<real>(B * stride_h);
            tc[k] = workspace.take<real>(B * stride_c);
        }
        const bool used = has_input_part() && !fused;
        const int64_t kept = used ? B + a.sizes.grid.batches * Base::chunk_rows : 0;
        tinput_part = workspace.take<real>(kept * stride_pre);
    }

    bool has_input_part() const { return dual->tx || tw.weight_ih; }

    void prepare(int64_t thread, int64_t threads) {
        Base::prepare(thread, threads);
        const Range mine = share(panels, thread, threads);
        Base::pack_panels(mine, tw, tih + mine.begin * I * 4 * L, thh + mine.begin * P * 4 * L);
        for (int64_t p = mine.begin; p < mine.end; p++) Base::pack_bias(p, tw, tbias);
        const Range sequences = share(B, thread, threads);
        for (int64_t b = sequences.begin; b < sequences.end; b++)
            for (int k = 0; k < 2; k++) {
                set(th[k] + b * stride_h, dual->th0, (direction * B + b) * P, P);
                set(tc[k] + b * stride_c, dual->tc0, (direction * B + b) * H, H);
            }
    }

    static void set(real* to, const real* from, int64_t at, int64_t n) {
        if (from)
            memcpy(to, from + at, n * sizeof(real));
        else
            memset(to, 0, n * sizeof(real));
    }

    void run(const Part& part, int64_t batch) const { Base::run_chunks(*this, part, batch); }

    void project(const Part& part, const Chunk& chunk) const {
        if (fused) return;
        Base::project(part, chunk);
        if (dual->tx)
            Base::project(part, chunk, {this, dual->tx, ih, nullptr, false, nullptr}, tinput_part);
        if (tw.weight_ih)
            Base::project(part, chunk, {this, args->x, tih, nullptr, dual->tx != nullptr, nullptr},
                          tinput_part);
    }

    void run_step(const Part& part, const Chunk& chunk, int64_t t, int64_t s) const {
        DualStep step;
        static_cast<Step&>(step) = Base::step_at(t, s, input_rows(t, chunk, input_part));
        const int64_t start = rows.start(t);
        step.tx = dual->tx ? dual->tx + start * I : nullptr;
        step.tpre = has_input_part() && !fused ? input_rows(t, chunk, tinput_part) : nullptr;
        step.th_prev = th[s & 1], step.th = th[~s & 1];
        step.tc_prev = tc[s & 1], step.tc = tc[~s & 1];
        step.ty = dual->ty + (start * args->sizes.D + direction) * P;
        if (step.cells) step.tcells = dual->tcells + (direction * rows.start(T) + start) * H;
        part.cover(DualTile{this, &step}, 0, rows.alive(t), panels);
        part.barrier_wait();
    }

    void finish(const Range& mine) const {
        Base::finish(mine);
        Base::finish(mine, th, tc, dual->th_n, dual->tc_n);
    }

    struct DualTile {
        static constexpr int max_rows = gate_rows;
        const Dual* self;
        const DualStep* step;

        Lines ahead(int64_t) const { return {}; }

        template <int ROWS>
        NOINLINE void tile(int64_t row, int64_t panel, const Lines&) const {
            const Dual& f = *self;
            const int64_t u = panel * L, lanes = f.H - u;
            const real* const h_prev = step->h_prev + row * f.stride_h;
            const real *const hh = f.hh + panel * f.P * 4 * L, *const thh = f.thh + panel * f.P * 4 * L;
            vec sum[ROWS][4], tsum[ROWS][4];
            clear(sum), clear(tsum);
            if (f.fused) {
                const real *const x = step->x + row * f.I, *const ih = f.ih + panel * f.I * 4 * L;
                f.set_input(sum, x, ih, panel);
                if (step->tx) f.template gate_product<true>(tsum, step->tx + row * f.I, f.I, ih, f.I);
                if (f.tw.weight_ih)
                    f.template gate_product<true>(tsum, x, f.I, f.tih + panel * f.I * 4 * L, f.I);
            }
            f.template gate_product<true>(sum, h_prev, f.stride_h, hh, f.P);
            f.template gate_product<true>(tsum, step->th_prev + row * f.stride_h, f.stride_h, hh, f.P);
            if (f.tw.weight_hh) f.template gate_product<true>(tsum, h_prev, f.stride_h, thh, f.P);
            DualCell cell[ROWS];
            for (int r = 0; r < ROWS; r++) {
                const int64_t at = (row + r) * f.stride_pre + u;
                for (int g = 0; g < 4; g++) {
                    if (!f.fused) sum[r][g] += load(step->pre + at + g * f.H, lanes);  // F1
                    tsum[r][g] += load(f.tbias + (g * f.panels + panel) * L);  // R1
                    if (step->tpre) tsum[r][g] += load(step->tpre + at + g * f.H, lanes);
                }
                cell[r] = f.new_cells(*step, row + r, u, sum[r], tsum[r]);
            }
            for (int r = 0; r < ROWS; r++)
                f.outputs(*step, row + r, u, sum[r][3], tsum[r][3], cell[r]);
        }
    };

    struct DualCell {
        vec c, tc;
    };

    // F2 to F5 and R2 to R5 for units u to u + L of sequence b. As in Forward, outputs() goes on in a
    // loop of its own.
    INLINE DualCell new_cells(const DualStep& step, int64_t b, int64_t u, const vec (&pre)[4],
                              const vec (&tpre)[4]) const {
        const int64_t lanes = H - u;
        const vec c_prev = load(step.c_prev + b * stride_c + u, lanes);
        const vec tc_prev = load(step.tc_prev + b * stride_c + u, lanes);
        const auto [i, g, ig] =
            Base::sigmoid_tanh(pre[0] + peep(w.weight_ci, u, c_prev), pre[2]);  // F2, F4
        const vec f = sigmoid<real>(pre[1] + peep(w.weight_cf, u, c_prev));     // F3
        const vec c = f * c_prev + ig;                                          // F5
        const vec tpre_i = tpre[0] + peep(w.weight_ci, u, tc_prev) + peep(tw.weight_ci, u, c_prev);
        const vec tpre_f = tpre[1] + peep(w.weight_cf, u, tc_prev) + peep(tw.weight_cf, u, c_prev);
        const vec ti = i * ((real)1 - i) * tpre_i;                   // R2
        const vec tf = f * ((real)1 - f) * tpre_f;                   // R3
        const vec tg = ((real)1 - g * g) * tpre[2];                  // R4
        const vec tc = tf * c_prev + f * tc_prev + ti * g + i * tg;  // R5
        store(step.c + b * stride_c + u, c, lanes);
        store(step.tc + b * stride_c + u, tc, lanes);
        if (step.cells) {
            store(step.cells + b * H + u, c, lanes);
            store(step.tcells + b * H + u, tc, lanes);
        }
        return {c, tc};
    }

    // F6, F7, R6 and R7.
    INLINE void outputs(const DualStep& step, int64_t b, int64_t u, vec pre_o, vec tpre_o,
                        const DualCell& cell) const {
        const int64_t lanes = H - u, output = b * args->sizes.D * P + u;
        tpre_o += peep(w.weight_co, u, cell.tc) + peep(tw.weight_co, u, cell.c);
        const auto [o, tanh_c, m] =
            Base::sigmoid_tanh(pre_o + peep(w.weight_co, u, cell.c), cell.c);    // F6, F7
        const vec to = o * ((real)1 - o) * tpre_o;                               // R6
        const vec tm = to * tanh_c + o * ((real)1 - tanh_c * tanh_c) * cell.tc;  // R7
        store(step.h + b * stride_h + u, m, lanes), store(step.y + output, m, lanes);
        store(step.th + b * stride_h + u, tm, lanes), store(step.ty + output, tm, lanes);
    }
};

}  // namespace
