// The backward recurrence, step after step: B1 to B9. Its tangent takes the same path with dh, dc, dpre
// for tdh, tdc, tdpre, and lstm_tangent.h's gate mathematics.
#pragma once

#include <type_traits>

#include "lstm.h"

namespace {

template <typename real, bool tangent = false>
struct Backward {
    using Arguments =
        std::conditional_t<tangent, BackwardTangentArguments<real>, BackwardArguments<real>>;
    using vec = vec_of<real>;
    static constexpr int L = Vector<real>::lanes;

    const Arguments* args;
    Rows rows;
    Weights<real> w;
    int64_t T, B, H, P, direction, reverse;
    int64_t pairs, panels_p;  // of 2L units, of 2L outputs

    // What the forward pass kept of this direction's steps [low, high), from row `first_row` on, and
    // c before them, (B, H); dpre of this direction from row `first_dpre` on, in rows of `stride_to`, and
    // that of the step before a run of steps, where it lies elsewhere.
    const real *gates, *cells, *c_entry, *dpre_entry;
    real* to_dpre;
    int64_t low, high, first_row, first_dpre, stride_to;

    // Borrowed memory. Panels of 2L outputs: hh (4H, 2L). Of 2L units: hr (P, 2L), and the full
    // peepholes out of i and f, (2H, 2L), and out of o, (H, 2L).
    real *hh, *hr, *peep_if, *peep_o;
    real* dpre[2];  // (B, stride_dpre), unless `reread`: a step reads one and writes the other
    real* dh;       // (B, stride_dh), with weight_hr
    int64_t stride_dpre, stride_dh;
    bool reread;  // a step reads the next one's dpre where it was written

    // One step as its tiles see it; row b of each is sequence b.
    struct Step {
        const real *dpre_next, *dy, *gates, *cells, *cells_prev, *dcells;
        real *dpre_kept, *dpre, *dh;
        int64_t going_on;   // sequences from this one on begin (backwards) at this step, at dh_n
        int64_t has_prev;   // sequences from this one on had c0 before this step
        int64_t row, row_prev;  // the first row of this step and of the previous one, with direction
        int64_t turn;       // the number of the step, in order of execution
        bool product;       // whether the tile's rows are sent anything by dpre_next
    };

    // The tiles that a step is covered with, and their gate mathematics: lstm_backward_tiles.h.
    struct OutputTile;
    struct CellTile;
    struct PeepholeTile;
    struct CarryTile;
    struct InitialTile;
    template <int ROWS, typename Asked = Nothing>
    void recurrent(vec (&sum)[ROWS][2], const real* from, int64_t row, int64_t panel,
                   const Asked& asked = {}) const;
    vec dh_at(const Step&, int64_t b, int64_t p, vec sent) const;
    void cell(const Step&, int64_t b, int64_t u, vec dm, vec tanh_c) const;
    void gates_back(const Step&, int64_t b, int64_t u, vec dc) const;
    void keep(const Step&, int64_t b, int64_t at, vec dpre, int64_t lanes) const;

    // What cell() will read and write for 2L units of a sequence: an address for every cache line.
    static constexpr int lines = 2 * VECTOR_BYTES / 64, line = 64 / sizeof(real);
    static constexpr int most_wanted = (lines + 1) * (tangent ? 17 : 11);
    template <int MOST>
    void want(Wanted<MOST>& wanted, const Step&, int64_t b, int64_t u) const;
    template <int MOST>
    void want_line(Wanted<MOST>& wanted, const Step&, int64_t b, int64_t u) const;

    // The same of the tangent, R10 to R16: lstm_tangent.h.
    void cell_tangents(const Step&, int64_t b, int64_t u, vec tdm) const;
    void gate_tangents_back(const Step&, int64_t b, int64_t u, vec tdc) const;

    bool full() const { return args->sizes.full_peepholes; }

    void plan(Workspace& workspace, const Arguments& a, int64_t d, const Rows& r) {
        args = &a, rows = r, w = a.weights[d];
        direction = d, reverse = d ^ a.sizes.reverse;
        const Sizes& s = a.sizes;
        T = s.T, B = s.B, H = s.H, P = s.P;
        pairs = (H + 2 * L - 1) / (2 * L), panels_p = (P + 2 * L - 1) / (2 * L);
        stride_to = stride_of(args->dpre, H);
        reread = spreads<real>(stride_to);
        stride_dpre = reread ? stride_to : row_stride<real>(4 * H), stride_dh = row_stride<real>(P);
        hh = workspace.take<real>(panels_p * 4 * H * 2 * L);
        hr = workspace.take<real>(w.weight_hr ? pairs * P * 2 * L : 0);
        peep_if = workspace.take<real>(full() ? pairs * 2 * H * 2 * L : 0);
        peep_o = workspace.take<real>(full() ? pairs * H * 2 * L : 0);
        for (int k = 0; k < 2; k++) dpre[k] = workspace.take<real>(reread ? 0 : B * stride_dpre);
        dh = workspace.take<real>(w.weight_hr ? B * stride_dh : 0);
    }

    // The stride of the rows of dpre: dense in what is handed out, else padded.
    static int64_t stride_of(const real* dpre, int64_t H) {
        return dpre ? 4 * H : row_stride<real>(4 * H);
    }

    // What a plan cannot know while `starts` is not filled.
    void start() {
        const int64_t row = direction * rows.start(T);
        gates = args->gates ? args->gates + row * 4 * H : nullptr;
        cells = args->cells ? args->cells + row * H : nullptr;
        c_entry = dpre_entry = nullptr;
        to_dpre = args->dpre ? args->dpre + row * 4 * H : nullptr;
        low = 0, high = T, first_row = first_dpre = 0;
    }

    // Packs the weights and sets dc_next before the last step.
    void prepare(int64_t thread, int64_t threads) {
        Range of_outputs = share(panels_p, thread, threads);
        while (of_outputs.begin < of_outputs.end && !packed(of_outputs.begin)) of_outputs.begin++;
        pack_columns(hh, 4 * H * 2 * L, w.weight_hh, of_outputs.begin, of_outputs.end, P, 4 * H);
        const Range of_units = share(pairs, thread, threads);
        if (w.weight_hr)
            pack_columns(hr, P * 2 * L, w.weight_hr, of_units.begin, of_units.end, H, P);
        if (full()) {
            pack_peephole(peep_if, 2 * H * 2 * L, w.weight_ci, of_units);
            pack_peephole(peep_if + H * 2 * L, 2 * H * 2 * L, w.weight_cf, of_units);
            pack_peephole(peep_o, H * 2 * L, w.weight_co, of_units);
        }
        const Range sequences = share(B, thread, threads);
        real* dc = args->dc0 + (direction * B + sequences.begin) * H;
        const int64_t n = (sequences.end - sequences.begin) * H;
        if (args->dc_n)
            memcpy(dc, args->dc_n + (direction * B + sequences.begin) * H, n * sizeof(real));
        else
            memset(dc, 0, n * sizeof(real));
    }

    void pack_peephole(real* to, int64_t size, const real* weight, const Range& of) const {
        if (weight) return pack_columns(to, size, weight, of.begin, of.end, H, H);
        for (int64_t p = of.begin; p < of.end; p++)
            memset(to + p * size, 0, H * 2 * L * sizeof(real));
    }

    // A single step needs W_hh for dh0 alone, and where it has few sequences reads it where it is, but
    // for a panel wider than what is left.
    bool packed(int64_t panel) const {
        if (T > 1) return true;
        return args->dh0 && ((panel + 1) * 2 * L > P || pays_to_pack_columns<real>(B, 4 * H * P));
    }

    void run(const Part& part, int64_t) const { run_steps(part, 0, T); }

    // The steps [begin, end) of time.
    void run_steps(const Part& part, int64_t begin, int64_t end) const {
        for (int64_t k = 0; k < end - begin; k++) {
            const int64_t t = reverse ? begin + k : end - 1 - k, s = reverse ? T - 1 - t : t;
            const int64_t next = reverse ? t - 1 : t + 1, prev = reverse ? t + 1 : t - 1;
            Step step = step_at(t, s, prev);
            step.going_on = rows.alive(next), step.has_prev = rows.alive(prev);
            if (reread) step.dpre_next = k == 0 && dpre_entry ? dpre_entry : dpre_of(next);
            run_step(part, step, rows.alive(t));
            if (args->dh0)
                part.cover(InitialTile{this, &step}, step.has_prev, rows.alive(t), panels_p);
        }
    }

    Step step_at(int64_t t, int64_t s, int64_t prev) const {
        const int64_t N = rows.start(T), start = rows.start(t), row = direction * N + start;
        Step step = {};
        step.turn = s;
        step.row = row, step.row_prev = rows.alive(prev) ? direction * N + rows.start(prev) : 0;
        step.dpre = dpre_of(t);
        step.dpre_next = dpre[~s & 1], step.dpre_kept = reread ? step.dpre : dpre[s & 1];
        if (args->dy) step.dy = args->dy + start * args->stride_dy + direction * P;
        step.gates = gates + (start - first_row) * 4 * H;
        step.cells = cells + (start - first_row) * H;
        step.cells_prev = rows.alive(prev) ? cells_of(prev) : nullptr;
        if (args->dcells) step.dcells = args->dcells + row * H;
        if (args->dh) step.dh = args->dh + row * P;
        return step;
    }

    // Where dpre of step t lies, or null if there is no such step.
    real* dpre_of(int64_t t) const {
        return rows.alive(t) ? to_dpre + (rows.start(t) - first_dpre) * stride_to : nullptr;
    }

    // c of step t, or of the one before [low, high).
    const real* cells_of(int64_t t) const {
        return t >= low && t < high ? cells + (rows.start(t) - first_row) * H : c_entry;
    }

    // Covers the sequences that go on with tiles that have a product, and the others without.
    template <typename Tile>
    void cover_step(const Part& part, Step step, int64_t alive, int64_t n_panels) const {
        step.product = true;
        part.cover(Tile{this, &step}, 0, least(step.going_on, alive), n_panels, step.turn);
        step.product = false;
        part.cover(Tile{this, &step}, step.going_on, alive, n_panels);
    }

    void run_step(const Part& part, const Step& step, int64_t alive) const {
        if (w.weight_hr) {
            cover_step<OutputTile>(part, step, alive, panels_p);
            part.barrier_wait();
        }
        cover_step<CellTile>(part, step, alive, pairs);
        part.barrier_wait();
        if (full()) {
            part.cover(PeepholeTile{this, &step}, 0, alive, pairs);
            part.barrier_wait();
            part.cover(CarryTile{this, &step}, 0, alive, pairs);
            part.barrier_wait();
        }
    }
};

}  // namespace
