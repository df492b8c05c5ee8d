// A whole backward pass in one go, B1 to B13 and B15: the recurrence, a chunk of steps at a time, and
// the sums over these while their dpre is in the cache. Without projections.
#pragma once

#include "lstm_backward_tiles.h"
#include "lstm_forward_tiles.h"
#include "lstm_sums.h"

namespace {

template <typename real>
struct GradientsArguments {
    Sizes sizes;          // the grid is that of the backward recurrence
    Grid forward_grid;    // of the forward pass, with `recompute`
    int64_t N, threads;   // of the sums
    int64_t spared;       // threads to leave out: others take on their shares, for the same bits
    int64_t unpacked;     // as in ForwardArguments
    int64_t recompute;    // K: the forward pass kept `c_kept`, and is run again; 0: gates and cells
    int64_t chunk_rows;   // of Segments
    const real* x;        // (N, I)
    const real* h0;       // (D, B, H)
    const real* c0;       // (D, B, H)
    const real* y;        // (N, D·H)
    const real* gates;    // (D, N, 4H) or null
    const real* cells;    // (D, N, H) or null
    const real* c_kept;   // (segments, D, B, H) or null
    const real* dy;       // (N, D·H) or null
    int64_t stride_dy;    // as in BackwardArguments
    const real* dh_n;     // (D, B, H) or null
    const real* dc_n;     // (D, B, H) or null
    const real* dcells;   // (D, N, H) or null
    real* dpre;           // (D, N, 4H), or null if nobody asks
    real* dh;             // (D, N, H), likewise
    real* dh0;            // (D, B, H) or null
    real* dc0;            // (D, B, H)
    real* dx;             // (N, I) or null
    Weights<real> weights[2];
    real* dweights[2][8];  // in the order of Weights, each null if nobody asks
};

template <typename real>
struct Gradients {
    enum { IH, HH, BIAS_IH, BIAS_HH, HR, CI, CF, CO };

    const GradientsArguments<real>& args;
    const Sizes& sizes;
    const Grid again;                  // of the forward pass, if it is run again
    const int64_t T, B, H, D, shares;  // of the sums
    BackwardArguments<real> backward_args;
    ForwardArguments<real> forward_args;
    InputSumsArguments<real> input_args;
    WeightSumsArguments<real> weight_args[2], peephole_args;

    Rows rows;
    Segments segments;
    Backward<real> backward[2];
    Forward<real> forward[2];
    InputSums<real> input;
    WeightSums<real> weight[2], peephole;  // of a full peephole: each direction's in turn
    Barrier *of_backward, *of_forward;  // of the threads that share the units of a direction
    real* dpre[2][2];  // of a chunk, one being summed while the next one is made
    real *gates[2], *cells[2];  // of a segment, with `recompute`

    Gradients(const GradientsArguments<real>& a)
        : args(a), sizes(a.sizes), again(a.recompute ? a.forward_grid : sizes.grid), T(sizes.T),
          B(sizes.B), H(sizes.H), D(sizes.D),
          shares(most(a.threads, most(sizes.grid.size(), a.forward_grid.size()))) {
        backward_args = {sizes,  a.dy, a.stride_dy, a.dh_n, a.dc_n,  a.dcells, a.c0, a.gates,
                         a.cells, a.dpre, a.dh,  a.dh0,  a.dc0, {a.weights[0], a.weights[1]}};
        Sizes forward_sizes = sizes;
        forward_sizes.grid = a.forward_grid;
        forward_args = {forward_sizes, a.unpacked, 0,       0,       a.x,     a.h0,    a.c0,
                        nullptr, nullptr,    nullptr, nullptr, nullptr, nullptr, nullptr,
                        {a.weights[0], a.weights[1]}};
        const int64_t stride_dpre = Backward<real>::stride_of(a.dpre, H);
        input_args = {a.N, sizes.I, 4 * H, stride_dpre, D, shares, a.dx, {nullptr, nullptr},
                      {a.weights[0].weight_ih, a.weights[1].weight_ih}};
        for (int64_t d = 0; d < D; d++) {
            real* const* to = a.dweights[d];
            real* dbias = to[BIAS_IH] ? to[BIAS_IH] : to[BIAS_HH];
            weight_args[d] = {a.N, sizes.I, H, 4 * H, shares, 1, stride_dpre, nullptr, a.x,
                              a.y + d * H, to[IH], to[HH], dbias, a.h0 + d * B * H, D * H, d,
                              T, B, sizes.batch_sizes};
        }
        peephole_args = {};
        peephole_args.M = H, peephole_args.threads = shares, peephole_args.samples = 1;
        peephole_args.stride_dpre = stride_dpre;
    }

    int64_t threads() const {
        return most(shares - args.spared, most(sizes.grid.wanted(), again.wanted()));
    }

    // Whether all threads have about as much to do before they meet.
    bool comparable() const {
        const int64_t n = threads();
        return shares % n == 0 && alike(sizes, sizes.grid, n) && alike(sizes, again, n);
    }

    void plan(Workspace& workspace) {
        rows.plan(workspace, sizes);
        segments.plan(workspace, rows, T, args.recompute, args.chunk_rows);
        of_backward = workspace.take<Barrier>(sizes.grid.directions * sizes.grid.batches);
        of_forward = workspace.take<Barrier>(args.forward_grid.directions * args.forward_grid.batches);
        if (args.dx) input.plan(workspace, input_args);
        if (sizes.full_peepholes) peephole.plan(workspace, peephole_args);
        const int64_t chunk = least(args.N, B > args.chunk_rows ? B : args.chunk_rows);
        for (int64_t d = 0; d < D; d++) {
            backward[d].plan(workspace, backward_args, d, rows);
            weight[d].plan(workspace, weight_args[d]);
            const int64_t made = args.dpre ? 0 : chunk * backward[d].stride_to;
            dpre[d][0] = workspace.take<real>(made);
            dpre[d][1] = workspace.take<real>(chunk < args.N ? made : 0);
            if (!args.recompute) continue;
            forward[d].plan(workspace, forward_args, d, rows);
            const int64_t most = least(args.N, args.recompute * B + chunk);  // of a segment's rows
            gates[d] = workspace.take<real>(most * 4 * H);
            cells[d] = workspace.take<real>(most * H);
        }
    }

    void start() {
        rows.fill();
        for (int64_t d = 0; d < D; d++) backward[d].start();
        set_barriers(of_backward, sizes.grid), set_barriers(of_forward, args.forward_grid);
    }

    void run(int64_t thread, int64_t threads, Barrier& everyone) {
        if (args.dx) input.prepare(thread, threads);
        for (int64_t d = 0; d < D; d++) {
            backward[d].prepare(thread, threads);
            if (args.recompute) forward[d].prepare(thread, threads);
        }
        everyone.wait();
        for (int64_t turn = 0; turn < segments.n_chunks; turn++) {
            if (args.recompute) {
                bool enters = false;
                for (int64_t d = 0; d < D; d++) enters = enters || enters_segment(d, turn);
                if (enters) everyone.wait();
                for_roles(again, thread, threads, rows, of_forward,
                          [&](const Role& role, int64_t d) {
                              if (enters_segment(d, turn)) run_again(role, d, turn);
                          });
                if (enters) everyone.wait();
            }
            for_roles(sizes.grid, thread, threads, rows, of_backward, [&](const Role& role, int64_t d) {
                const Range steps = chunk(d, turn);
                pass(d, turn).run_steps(role.part, steps.begin, steps.end);
            });
            everyone.wait();
            const Range mine = share(shares, thread, threads);
            for (int64_t k = mine.begin; k < mine.end; k++)
                for (int64_t d = 0; d < D; d++) sum(d, turn, k);
        }
        everyone.wait();
        for (int64_t d = 0; d < D && thread == 0; d++) {
            real* const* to = args.dweights[d];
            if (to[BIAS_IH] && to[BIAS_HH]) memcpy(to[BIAS_HH], to[BIAS_IH], 4 * H * sizeof(real));
        }
    }

    // The chunk that direction d comes to at its turn: the first one begins with the last step.
    int64_t chunk_at(int64_t d, int64_t turn) const {
        return d ? turn : segments.n_chunks - 1 - turn;
    }

    Range chunk(int64_t d, int64_t turn) const {
        const int64_t k = chunk_at(d, turn);
        return {segments.chunks[k], segments.chunks[k + 1]};
    }

    int64_t segment_of(int64_t chunk) const {
        int64_t low = 0, high = segments.n;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (segments.segments[middle] <= chunk ? low : high) = middle;
        }
        return low;
    }

    bool enters_segment(int64_t d, int64_t turn) const {
        return turn == 0 || segment_of(chunk_at(d, turn)) != segment_of(chunk_at(d, turn - 1));
    }

    const real* entry(int64_t d, int64_t segment) const {
        return args.c_kept + (segment * D + d) * B * H;
    }

    void run_again(const Role& role, int64_t d, int64_t turn) const {
        const int64_t segment = segment_of(chunk_at(d, turn));
        const int64_t low = segments.start(segment), high = segments.start(segment + 1);
        Forward<real> f = forward[d];
        f.gates = gates[d], f.cells = cells[d], f.first_row = rows.start(low);
        f.run_again(role.part, role.batch, low, high, args.y, entry(d, segment));
    }

    // Direction d's recurrence, whose gates and cells are those of the segment of its turn.
    Backward<real> pass(int64_t d, int64_t turn) const {
        Backward<real> b = backward[d];
        if (!args.dpre) {
            b.to_dpre = dpre[d][turn & 1];
            b.first_dpre = rows.start(chunk(d, turn).begin);
            if (turn > 0) {
                const Range before = chunk(d, turn - 1);
                const int64_t row = rows.start(d ? before.end - 1 : before.begin);
                b.dpre_entry =
                    dpre[d][~turn & 1] + (row - rows.start(before.begin)) * b.stride_to;
            }
        }
        if (args.recompute) {
            const int64_t segment = segment_of(chunk_at(d, turn));
            b.gates = gates[d], b.cells = cells[d], b.c_entry = entry(d, segment);
            b.low = segments.start(segment), b.high = segments.start(segment + 1);
            b.first_row = rows.start(b.low);
        }
        return b;
    }

    // One share of what a chunk adds to the sums.
    void sum(int64_t d, int64_t turn, int64_t index) const {
        const Range steps = chunk(d, turn);
        const Range of = {rows.start(steps.begin), rows.start(steps.end)};
        const Backward<real> b = pass(d, turn);
        const real* dpre = b.to_dpre + (of.begin - b.first_dpre) * b.stride_to;
        if (args.dx) {
            const int64_t other = segments.n_chunks - 1 - turn;  // when the other direction was here
            input.run_rows(index, shares, d, dpre, of, D == 2 && (d ? other <= turn : other < turn));
        }
        const WeightSumsArguments<real>& w = weight_args[d];
        if (w.dweight_ih || w.dweight_hh || w.dbias)
            weight[d].run_rows(index, shares, 0, dpre, of, {steps.begin, 0, of.begin}, turn > 0);
        real* const* to = args.dweights[d];
        if (to[CI] || to[CF] || to[CO]) sum_peepholes(b, steps, turn > 0, index);
    }

    void sum_peepholes(const Backward<real>& b, const Range& steps, bool add, int64_t index) const {
        constexpr int64_t depth = WeightSums<real>::depth;
        const int64_t begin = rows.start(steps.begin), end = rows.start(steps.end);
        const real *c_prev[depth], *c[depth];
        int64_t t = steps.begin, b_of_t = 0;
        for (int64_t row = begin, count; row < end; row += count) {
            count = least(depth, end - row);
            for (int64_t k = 0; k < count; k++) {
                c_prev[k] = before(b, t, b_of_t);
                c[k] = b.cells + (row + k - b.first_row) * H;
                if (++b_of_t == rows.alive(t)) t++, b_of_t = 0;
            }
            const real* dpre = b.to_dpre + (row - b.first_dpre) * b.stride_to;
            sum_peepholes(b.direction, dpre, c_prev, c, count, add || row > begin, index);
        }
    }

    // B15 over `count` rows of dpre, of direction d.
    void sum_peepholes(int64_t d, const real* dpre, const real* const* c_prev, const real* const* c,
                       int64_t count, bool add, int64_t index) const {
        real* const* to = args.dweights[d];
        real* const dweight[3] = {to[CI], to[CF], to[CO]};
        if (!sizes.full_peepholes)
            return add_peepholes(share_units<real>(H, index, shares), H, dpre, input_args.stride_dpre,
                                 c_prev, c, count, dweight, add);
        for (int64_t g = 0; g < 3; g++)
            if (dweight[g])
                peephole.add_product(index, dpre + (g < 2 ? g : 3) * H, g < 2 ? c_prev : c, dweight[g],
                                     H, {0, 0, count, add});
    }

    // c_{t-1} of a sequence at step t.
    const real* before(const Backward<real>& b, int64_t t, int64_t sequence) const {
        const int64_t prev = b.reverse ? t + 1 : t - 1;
        return sequence < rows.alive(prev) ? b.cells_of(prev) + sequence * H
                                           : args.c0 + (b.direction * B + sequence) * H;
    }
};

template <typename real>
Outcome run_gradients(const GradientsArguments<real>& a) {
    const int64_t begun = nanoseconds();
    Workspace workspace;
    Gradients<real> gradients(a);
    gradients.plan(workspace);
    if (!workspace.allocate()) return NO_MEMORY;
    gradients.plan(workspace);
    gradients.start();
    const int64_t waited =
        run_on(gradients.threads(), [&](int64_t thread, int64_t threads, Barrier& everyone) {
            gradients.run(thread, threads, everyone);
        });
    return outcome_of(gradients.of_backward, a.sizes.grid, gradients.comparable() ? waited : 0, begun);
}

}  // namespace
