// The forward recurrence, step after step: F1 to F8. Its tangent takes the same path with h, c and m for
// th, tc and tm, and lstm_tangent.h's gate mathematics.
#pragma once

#include <type_traits>

#include "lstm.h"

namespace {

template <typename real, bool tangent = false>
struct Forward {
    using Arguments = std::conditional_t<tangent, TangentArguments<real>, ForwardArguments<real>>;
    using vec = vec_of<real>;
    static constexpr int L = Vector<real>::lanes;
    static constexpr int64_t most_fused = 2 << 20;  // bytes of weights a thread reads at a step
    static constexpr int64_t chunk_rows = 96;  // the input projection is made for about so many rows

    const Arguments* args;
    Rows rows;
    Weights<real> w;
    int64_t T, B, I, H, P, direction, reverse;
    int64_t panels, pairs, panels_p;  // of L units, of 2L units, of 2L outputs
    bool fused;  // the input part is not made beforehand, but in registers at its step
    bool panel_by_panel;  // of a single step: each panel is packed just before its tiles read it
    Segments segments;
    real *gates, *cells;  // of this direction, from row `first_row` on, or null
    int64_t first_row;

    // Borrowed memory. Panels: of L units, with G = gates_at_once, ih (4 / G, I, G, L) and hh
    // (4 / G, P, G, L); peepholes into i and f (H, 2, L); of 2L units or outputs: the peephole into
    // o, and hr, (H, 2L).
    real *ih, *hh, *peep_if, *peep_o, *hr;
    uint64_t *digests;  // (2, panels), of what the panels of W_ih and W_hh were made of, or null
    real *bias;         // (4, panels · L), bias_ih + bias_hh
    real *h[2], *c[2];  // (B, stride_h), (B, stride_c): a step reads one and writes the other
    real *m;            // (B, stride_c), with weight_hr
    real *input_part;   // x W_ihᵀ + b of some steps, where it is not kept in `gates`
    int64_t stride_h, stride_c, stride_pre;

    // One step as its tiles see it; row b of each is sequence b.
    struct Step {
        real* pre;  // (·, stride_pre): x W_ihᵀ + b
        const real *x, *h_prev, *c_prev;
        real *h, *c, *y, *gates, *cells;
        const real *of_gates, *of_cells, *of_cells_prev;  // of the pass whose tangent this is
        int64_t has_prev;  // sequences from this one on had c0 before this step
    };

    // The tiles that a step is covered with, and their gate mathematics: lstm_forward_tiles.h.
    struct InputTile;
    struct GateTile;
    struct UnpackedTile;
    struct OutputGateTile;
    struct ProjectionTile;
    struct Product;
    template <int ROWS>
    void set_input(vec (&sum)[ROWS][4], const real* x, const real* ih_panel, int64_t panel) const;
    vec new_cell(const Step&, int64_t b, int64_t u, const vec (&pre)[4]) const;
    vec peep(const real* weight, int64_t u, vec c) const;
    void output(const Step&, int64_t b, int64_t u, vec pre_o, vec c) const;
    static Product sigmoid_tanh(vec x, vec z);
    void prefetch(const Step&, int64_t b, int64_t u) const;

    // The same of the tangent, R2 to R7: lstm_tangent.h.
    void prefetch_of_tangent(const Step&, int64_t b, int64_t u) const;
    void gate_tangents(const Step&, int64_t b, int64_t u, const vec (&tpre)[4]) const;
    void output_tangent(const Step&, int64_t b, int64_t u, vec tpre_o, vec tc) const;

    bool full() const { return args->sizes.full_peepholes; }
    bool packed() const { return !args->unpacked; }

    void plan(Workspace& workspace, const Arguments& a, int64_t d, const Rows& r, bool dual = false) {
        args = &a, rows = r, w = a.weights[d];
        direction = d, reverse = d ^ a.sizes.reverse;
        const Sizes& s = a.sizes;
        T = s.T, B = s.B, I = s.I, H = s.H, P = s.P;
        if (a.recompute) segments.plan(workspace, rows, T, a.recompute, a.chunk_rows);
        panels = (H + L - 1) / L, pairs = (H + 2 * L - 1) / (2 * L);
        panels_p = (P + 2 * L - 1) / (2 * L);
        stride_h = row_stride<real>(P), stride_c = row_stride<real>(H);
        panel_by_panel = T == 1 && packed() && !a.packed_before && !full() && !tangent && !dual &&
                         s.grid.batches == 1;
        if (a.packed_before)
            plan_packed(a.packed_before);
        else
            plan_packed(workspace);
        peep_if = workspace.take<real>(full() && packed() ? panels * H * 2 * L : 0);
        peep_o = workspace.take<real>(full() ? pairs * H * 2 * L : 0);
        hr = workspace.take<real>(w.weight_hr ? panels_p * H * 2 * L : 0);
        bias = workspace.take<real>(4 * panels * L);
        for (int k = 0; k < 2; k++) {
            h[k] = workspace.take<real>(B * stride_h);
            c[k] = workspace.take<real>(B * stride_c);
        }
        m = workspace.take<real>(w.weight_hr ? B * stride_c : 0);
        stride_pre = tangent ? 4 * H : row_stride<real>(4 * H);
        fused = panel_by_panel || (!tangent && packed() && !full() && pays_to_fuse(s));
        const bool unused = tangent || fused || (!packed() && !full());
        const int64_t kept = unused ? 0 : B + s.grid.batches * chunk_rows;
        input_part = workspace.take<real>(kept * stride_pre);
    }

    void plan_packed(Workspace& workspace) {
        const int64_t n = panel_by_panel ? args->sizes.grid.units : packed() ? panels : 0;
        ih = workspace.take<real>(n * I * 4 * L);
        hh = workspace.take<real>(n * P * 4 * L);
        digests = nullptr;
    }

    // Of each direction: W_ih and W_hh as they were packed by the call before, then `digests`.
    // kernels/packed.py has made the memory, with no digest in it at first.
    void plan_packed(char* at) {
        const int64_t numbers = panels * (I + P) * 4 * L;
        at += direction * (numbers * (int64_t)sizeof(real) + 2 * panels * (int64_t)sizeof(uint64_t));
        ih = (real*)at, hh = ih + panels * I * 4 * L;
        digests = (uint64_t*)(ih + numbers);
    }

    // What a plan cannot know while `starts` is not filled.
    void start() {
        const int64_t row = direction * rows.start(T);
        gates = args->gates ? args->gates + row * 4 * H : nullptr;
        cells = args->cells ? args->cells + row * H : nullptr;
        first_row = 0;
    }

    // Where a step has the rows for a tile, W_ih is read at every step for little. Packed batches
    // go on with fewer rows.
    static bool pays_to_fuse(const Sizes& s) {
        const int64_t bytes = 4 * s.H * (s.I + s.P) * (int64_t)sizeof(real) / s.grid.units;
        return bytes <= most_fused && s.B / s.grid.batches >= 4 && !s.batch_sizes;
    }

    // Packs the weights and sets the first states.
    void prepare(int64_t thread, int64_t threads) {
        const Range mine = share(panels, thread, threads);
        if (packed() && !panel_by_panel)
            pack_panels(mine, w, ih + mine.begin * I * 4 * L, hh + mine.begin * P * 4 * L, digests);
        for (int64_t p = mine.begin; p < mine.end; p++) {
            pack_bias(p, w, bias);
            if (full() && packed())
                for (int v = 0; v < 2; v++)
                    pack_peephole(peep_if + p * H * 2 * L + v * L, v ? w.weight_cf : w.weight_ci, p);
        }
        const Range of_pairs = share(pairs, thread, threads);
        if (full())
            for (int64_t p = 2 * of_pairs.begin; p < 2 * of_pairs.end; p++)
                pack_peephole(peep_o + p / 2 * H * 2 * L + p % 2 * L, w.weight_co, p);
        const Range of_outputs = share(panels_p, thread, threads);
        if (w.weight_hr)
            for (int64_t p = 2 * of_outputs.begin; p < 2 * of_outputs.end; p++)
                pack_transposed(hr + p / 2 * H * 2 * L + p % 2 * L, 2 * L, w.weight_hr, p * L, P, H);
        const Range sequences = share(B, thread, threads);
        for (int64_t b = sequences.begin; b < sequences.end; b++)
            for (int k = 0; k < 2; k++) {
                memcpy(h[k] + b * stride_h, args->h0 + (direction * B + b) * P, P * sizeof(real));
                memcpy(c[k] + b * stride_c, args->c0 + (direction * B + b) * H, H * sizeof(real));
            }
    }

    // Panels `of` the weights that are given; `ih` and `hh` are those of the first one. Where there are
    // `digests` of all, a panel whose weights have not changed is as it was packed before.
    void pack_panels(const Range& of, const Weights<real>& from, real* ih, real* hh,
                     uint64_t* digests = nullptr) const {
        uint64_t* const of_hh = digests ? digests + panels : nullptr;
        if (from.weight_ih) pack_gates(ih, from.weight_ih, of, H, I, digests);
        if (from.weight_hh) pack_gates(hh, from.weight_hh, of, H, P, of_hh);
    }

    void pack_bias(int64_t p, const Weights<real>& from, real* bias) const {
        for (int g = 0; g < 4; g++) {
            vec b = {};
            if (from.bias_ih) b += load(from.bias_ih + g * H + p * L, H - p * L);
            if (from.bias_hh) b += load(from.bias_hh + g * H + p * L, H - p * L);
            store(bias + (g * panels + p) * L, b);
        }
    }

    // sum[r][g] = or, with `add`, += Σ_k a[r][k] · panel[k][g]: so many gates at a time that their sums
    // stay in registers.
    template <bool add, int MOST_SETS = 4, int ROWS, typename Asked = Nothing>
    static INLINE void gate_product(vec (&sum)[ROWS][4], const real* a, int64_t stride_a,
                                    const real* panel, int64_t K, const Asked& asked = {}) {
        constexpr int G = gates_at_once;
        if constexpr (G == 4) return product<add, MOST_SETS>(sum, a, stride_a, panel, 4 * L, K, asked);
#pragma GCC unroll 1
        for (int first = 0; first < 4; first += G, panel += K * G * L) {
            vec part[ROWS][G];
#pragma GCC unroll 12
            for (int r = 0; r < ROWS && add; r++)
#pragma GCC unroll 4
                for (int g = 0; g < G; g++) part[r][g] = sum[r][first + g];
            product<add, MOST_SETS>(part, a, stride_a, panel, G * L, K, asked.part(first / G, 4 / G));
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int g = 0; g < G; g++) sum[r][first + g] = part[r][g];
        }
    }

    void pack_peephole(real* to, const real* weight, int64_t panel) const {
        if (weight) return pack_transposed(to, 2 * L, weight, panel * L, H, H);
        for (int64_t k = 0; k < H; k++) store(to + k * 2 * L, vec{});
    }

    // Steps [low, high) of time, whose input parts are made at once: of all sequences, or of `mine`
    // alone. They lie from row `at` of a buffer on, where they are not kept.
    struct Chunk {
        int64_t low, high, at, turn;
        bool whole;
        Range mine;
    };

    void run(const Part& part, int64_t batch) const { run_chunks(*this, part, batch); }

    // `Pass` has project(), a chunk's input parts, run_step() and finish().
    template <typename Pass>
    void run_chunks(const Pass& pass, const Part& part, int64_t batch) const {
        if (args->recompute) return run_segments(part, batch);
        run_steps(pass, part, batch, 0, T);
        if (part.unit == 0) pass.finish(part.sequences);
    }

    // Steps [first, last) in order of execution.
    template <typename Pass>
    void run_steps(const Pass& pass, const Part& part, int64_t batch, int64_t first,
                   int64_t last) const {
        const Range& mine = part.sequences;
        const bool whole = mine.end - mine.begin == B;
        for (int64_t s = first, end, turn = 0; s < last; s = end, turn++) {
            end = chunk_end(s, last, mine, whole);
            const int64_t low = reverse ? T - end : s, high = reverse ? T - s : end;
            const Chunk chunk = {low, high, mine.begin + batch * chunk_rows, turn, whole, mine};
            pass.project(part, chunk);
            if (!fused) part.barrier_wait();
            for (int64_t k = s; k < end; k++)
                pass.run_step(part, chunk, reverse ? T - 1 - k : k, k);
        }
    }

    // All steps, keeping c before every segment.
    void run_segments(const Part& part, int64_t batch) const {
        const Range& mine = part.sequences;
        for (int64_t k = 0; k < segments.n; k++) {
            const int64_t segment = reverse ? segments.n - 1 - k : k;
            const Range steps = in_order(segments.start(segment), segments.start(segment + 1));
            real* kept = args->c_kept + (segment * args->sizes.D + direction) * B * H;
            for (int64_t b = mine.begin; b < mine.end && part.unit == 0; b++)
                memcpy(kept + b * H, c[steps.begin & 1] + b * stride_c, H * sizeof(real));
            run_steps(*this, part, batch, steps.begin, steps.end);
        }
        if (part.unit == 0) finish(mine);
    }

    // Runs the steps [low, high) again, from c_entry (B, H) and the h of the step before, in y.
    void run_again(const Part& part, int64_t batch, int64_t low, int64_t high, const real* y,
                   const real* c_entry) const {
        const int64_t prev = reverse ? high : low - 1, going_on = rows.alive(prev);
        const Range& mine = part.sequences;
        for (int64_t b = mine.begin; b < mine.end && part.unit == 0; b++) {
            const real* h_b = args->h0 + (direction * B + b) * P;
            if (b < going_on) h_b = y + ((rows.start(prev) + b) * args->sizes.D + direction) * P;
            for (int k = 0; k < 2; k++) {
                memcpy(h[k] + b * stride_h, h_b, P * sizeof(real));
                memcpy(c[k] + b * stride_c, c_entry + b * H, H * sizeof(real));
            }
        }
        part.barrier_wait();
        const Range steps = in_order(low, high);
        run_steps(*this, part, batch, steps.begin, steps.end);
    }

    // The steps [low, high) of time in order of execution.
    Range in_order(int64_t low, int64_t high) const {
        return reverse ? Range{T - high, T - low} : Range{low, high};
    }

    // The step, in order of execution, before which the chunk that begins at `s` ends.
    int64_t chunk_end(int64_t s, int64_t last, const Range& mine, bool whole) const {
        if (!whole) {
            const int64_t steps = chunk_rows / (mine.end - mine.begin + !(mine.end - mine.begin));
            return least(last, s + (steps > 1 ? steps : 1));
        }
        int64_t end = s;
        for (int64_t n = 0; end < last; end++) {
            n += rows.alive(reverse ? T - 1 - end : end);
            if (n > chunk_rows && end > s) break;
        }
        return end;
    }

    // Where the input part of step t lies (as if of sequence 0).
    real* input_rows(int64_t t, const Chunk& chunk, real* buffer) const {
        if (tangent) return args->gates + (direction * rows.start(T) + rows.start(t)) * 4 * H;
        buffer += chunk.at * stride_pre;
        if (chunk.whole) return buffer + (rows.start(t) - rows.start(chunk.low)) * stride_pre;
        const Range& mine = chunk.mine;
        return buffer + ((t - chunk.low) * (mine.end - mine.begin) - mine.begin) * stride_pre;
    }

    void project(const Part& part, const Chunk& chunk) const {
        if (fused || !packed() || (tangent && I == 0)) return;
        bool known = false;
        if constexpr (tangent) known = args->known;
        project(part, chunk, {this, args->x, ih, bias, known, nullptr}, input_part);
    }

    // Makes `of` for all rows of the chunk.
    void project(const Part& part, const Chunk& chunk, InputTile of, real* buffer) const {
        const real* const x = of.x;
        for (int64_t t = chunk.low; t < chunk.high; t++) {
            of.x = x + rows.start(t) * I, of.pre = input_rows(t, chunk, buffer);
            if (!chunk.whole) {
                part.cover(of, 0, rows.alive(t), panels);
                continue;
            }
            const int64_t n = rows.start(chunk.high) - rows.start(t);
            cover(of, 0, n, part.share_tiles<InputTile>(n, panels), chunk.turn);
            return;
        }
    }

    Step step_at(int64_t t, int64_t s, real* pre) const {
        const int64_t start = rows.start(t);
        Step step;
        step.pre = pre;
        step.x = args->x + start * I;
        step.h_prev = h[s & 1], step.h = h[~s & 1];
        step.c_prev = c[s & 1], step.c = c[~s & 1];
        step.y = args->y ? args->y + (start * args->sizes.D + direction) * P : nullptr;
        step.gates = gates ? gates + (start - first_row) * 4 * H : nullptr;
        step.cells = cells ? cells + (start - first_row) * H : nullptr;
        if constexpr (tangent) {
            const int64_t prev = reverse ? t + 1 : t - 1, row = direction * rows.start(T) + start;
            step.has_prev = rows.alive(prev);
            step.of_gates = args->of_gates + row * 4 * H;
            step.of_cells = args->of_cells + row * H;
            if (step.has_prev)
                step.of_cells_prev = step.of_cells + (rows.start(prev) - start) * H;
        }
        return step;
    }

    void run_step(const Part& part, const Chunk& chunk, int64_t t, int64_t s) const {
        const Step step = step_at(t, s, input_rows(t, chunk, input_part));
        const int64_t alive = rows.alive(t);
        if constexpr (tangent)
            part.cover(GateTile{this, &step, ih, hh, 0}, 0, alive, panels, s);
        else if (panel_by_panel)
            pack_and_cover(part, step, alive);
        else if (packed())
            part.cover(GateTile{this, &step, ih, hh, 0}, 0, alive, panels, s);
        else
            part.cover(UnpackedTile{this, &step}, 0, alive, panels);
        part.barrier_wait();
        if (full()) {
            part.cover(OutputGateTile{this, &step}, 0, alive, pairs);
            part.barrier_wait();
        }
        if (w.weight_hr) {
            part.cover(ProjectionTile{this, &step}, 0, alive, panels_p);
            part.barrier_wait();
        }
    }

    // The only step: every panel is packed into one place, and stays near while its tiles read it.
    void pack_and_cover(const Part& part, const Step& step, int64_t alive) const {
        const Range mine = share(panels, part.unit, part.units);
        real *const my_ih = ih + part.unit * I * 4 * L, *const my_hh = hh + part.unit * P * 4 * L;
        for (int64_t p = mine.begin; p < mine.end; p++) {
            pack_panels({p, p + 1}, w, my_ih, my_hh);
            const GateTile tile = {this, &step, my_ih, my_hh, p};
            const int64_t tiles = tiles_of<GateTile>(alive);
            cover(tile, 0, alive, {p * tiles, (p + 1) * tiles});
        }
    }

    // h_n and c_n: what every sequence's last step has written.
    void finish(const Range& mine) const { finish(mine, h, c, args->h_n, args->c_n); }

    void finish(const Range& mine, real* const (&h)[2], real* const (&c)[2], real* h_n,
                real* c_n) const {
        int64_t length = T;
        for (int64_t b = mine.begin; b < mine.end; b++) {
            length = reverse ? T : rows.length(b, length);
            const int last = length & 1;
            memcpy(h_n + (direction * B + b) * P, h[last] + b * stride_h, P * sizeof(real));
            memcpy(c_n + (direction * B + b) * H, c[last] + b * stride_c, H * sizeof(real));
        }
    }
};

}  // namespace
