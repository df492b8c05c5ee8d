// The backward recurrence: B1 to B8 as the epilogue of dpre_{t+1} W_hh (B9), a tile at a time. Its
// tangent takes the same path with dh, dc, dpre for tdh, tdc, tdpre, and lstm_tangent.h's mathematics.
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
            finish(part, step, step.has_prev, rows.alive(t));
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
            cover_step<PeepholeTile>(part, step, alive, pairs);
            part.barrier_wait();
        }
    }

    // dh0, if asked for, and dc0 with full peepholes, of the sequences [first, end) whose first step
    // this was.
    void finish(const Part& part, const Step& step, int64_t first, int64_t end) const {
        if (args->dh0) part.cover(InitialTile{this, &step, 0}, first, end, panels_p);
        if (full()) part.cover(InitialTile{this, &step, 1}, first, end, pairs);
    }

    // B9, dpre W_hh, for 2L outputs or the last L.
    template <int ROWS, typename Asked = Nothing>
    INLINE void recurrent(vec (&sum)[ROWS][2], const real* from, int64_t row, int64_t panel,
                          const Asked& asked = {}) const {
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

    template <int ROWS>
    INLINE void add_peepholes_if(vec (&sum)[ROWS][2], const real* from, int64_t row,
                                 int64_t pair) const {
        const real* weight = peep_if + pair * 2 * H * 2 * L;
        add_product(sum, from + row * stride_dpre, stride_dpre, weight, 2 * L, 2 * H);
    }

    // B1 for outputs p to p + L of sequence b; `sent` is what the next step sent back.
    INLINE vec dh_at(const Step& step, int64_t b, int64_t p, vec sent) const {
        const int64_t lanes = P - p;
        vec dh_b = sent;
        if (step.dy) dh_b += load(step.dy + b * args->stride_dy + p, lanes);  // B1, R9
        if (b >= step.going_on && args->dh_n)
            dh_b += load(args->dh_n + (direction * B + b) * P + p, lanes);
        return dh_b;
    }

    struct OutputTile {
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

    struct CellTile {
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

    // What cell() will read and write for 2L units of a sequence: an address for every cache line.
    static constexpr int lines = 2 * VECTOR_BYTES / 64, line = 64 / sizeof(real);
    static constexpr int most_wanted = (lines + 1) * (tangent ? 17 : 11);

    template <int MOST>
    INLINE void want(Wanted<MOST>& wanted, const Step& step, int64_t b, int64_t u) const {
#pragma GCC unroll 2
        for (int k = 0; k < lines; k++) want_line(wanted, step, b, u + k * line);
        if (H % line) want_line(wanted, step, b, u + 2 * L - 1);  // a row that begins within a line
    }

    template <int MOST>
    INLINE void want_line(Wanted<MOST>& wanted, const Step& step, int64_t b, int64_t u) const {
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
    INLINE void cell(const Step& step, int64_t b, int64_t u, vec dm, vec tanh_c) const {
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

    INLINE void gates_back(const Step& step, int64_t b, int64_t u, vec dc) const {
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
    INLINE void keep(const Step& step, int64_t b, int64_t at, vec dpre, int64_t lanes) const {
        store(step.dpre + b * stride_to + at, dpre, lanes);
        if (!reread) store(step.dpre_kept + b * stride_dpre + at, dpre, lanes);
    }

    // The same of the tangent, R10 to R16.
    void cell_tangents(const Step&, int64_t b, int64_t u, vec tdm) const;
    void gate_tangents_back(const Step&, int64_t b, int64_t u, vec tdc) const;

    // The rest of a step with full peepholes: what the gates sent back to c, of B4 by this step's
    // dpre_o and of B8 by the next one's dpre_i and dpre_f.
    struct PeepholeTile {
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
            if (step->product) f.add_peepholes_if(sum, step->dpre_next, row, pair);
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

    // What the first step sends to the initial states: dh0, or what full peepholes add to dc0.
    struct InitialTile {
        static constexpr int max_rows = narrow_rows;
        const Backward* self;
        const Step* step;
        bool cell;

        Lines ahead(int64_t) const { return {}; }

        template <int ROWS>
        NOINLINE void tile(int64_t row, int64_t panel, const Lines&) const {
            const Backward& f = *self;
            const int64_t n = cell ? f.H : f.P;
            vec sum[ROWS][2] = {};
            if (cell)
                f.add_peepholes_if(sum, step->dpre_kept, row, panel);
            else
                f.recurrent(sum, step->dpre_kept, row, panel);
            real* to = (cell ? f.args->dc0 : f.args->dh0) + (f.direction * f.B + row) * n;
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < 2; v++) {
                    const int64_t u = (2 * panel + v) * L;
                    if (u >= n) break;
                    vec sent = cell ? load(to + r * n + u, n - u) + sum[r][v] : sum[r][v];
                    store(to + r * n + u, sent, n - u);
                }
        }
    };
};

}  // namespace
