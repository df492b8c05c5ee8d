// The LSTM recurrence of one layer, forward and backward (equations: docs/derivations/lstm.md).
//
// T steps, B sequences, N rows (T·B, or Σ batch_sizes when packed), I inputs, H hidden units,
// P outputs (proj_size, or H), D directions. Gates stand in the order i, f, g, o. All tensors are
// dense, in C order, unless a stride is named. A pointer marked "or null" may be left out.
//
// torch_manual/kernels/cpu*.py fill these structures: every member takes eight bytes.
#pragma once

#include <cstring>

#include "packing.h"

namespace {

template <typename real>
struct Weights {
    const real* weight_ih;   // (4H, I)
    const real* weight_hh;   // (4H, P)
    const real* bias_ih;     // (4H,) or null
    const real* bias_hh;     // (4H,) or null
    const real* weight_hr;   // (P, H) or null: then h = m and P = H
    const real* weight_ci;   // (H,) diagonal or (H, H) full, or null
    const real* weight_cf;   // likewise
    const real* weight_co;   // likewise
};

// What both passes are told about the shape of the work.
struct Sizes {
    int64_t T, B, I, H, P, D;
    int64_t full_peepholes;      // 1: weight_ci, weight_cf, weight_co are (H, H)
    int64_t reverse;             // 1: the first direction, then the only one, runs in reverse
    Grid grid;                   // how threads share it
    const int64_t* batch_sizes;  // (T,) falling, first B; or null: every step has B rows
};

template <typename real>
struct ForwardArguments {
    Sizes sizes;
    int64_t unpacked;   // 1: few rows in all, read the weights where they are
    int64_t recompute;  // K: keep c before every K-th step, as Segments has it; 0: do not
    int64_t chunk_rows;  // of Segments, with `recompute`
    const real* x;      // (N, I)
    const real* h0;     // (D, B, P)
    const real* c0;     // (D, B, H)
    real* y;            // (N, D·P)
    real* h_n;          // (D, B, P)
    real* c_n;          // (D, B, H)
    real* gates;        // (D, N, 4H), or null when no backward pass follows
    real* cells;        // (D, N, H), or null
    real* c_kept;       // (segments, D, B, H), with `recompute`
    char* packed_before;  // packed weights of an earlier call, or null: Forward::plan_packed()
    Weights<real> weights[2];
};

template <typename real>
struct BackwardArguments {
    Sizes sizes;
    const real* dy;      // (N, D·P) or null
    int64_t stride_dy;   // between the rows of dy; 0 when they are all the same one
    const real* dh_n;    // (D, B, P) or null
    const real* dc_n;    // (D, B, H) or null
    const real* dcells;  // (D, N, H) or null
    const real* c0;      // (D, B, H)
    const real* gates;   // (D, N, 4H)
    const real* cells;   // (D, N, H)
    real* dpre;          // (D, N, 4H)
    real* dh;            // (D, N, P); may be null without weight_hr
    real* dh0;           // (D, B, P) or null
    real* dc0;           // (D, B, H); holds dc_next throughout
    Weights<real> weights[2];
};

// The tangent of a forward pass, R1 to R8: x, h0, c0, y, h_n, c_n, gates and cells are tangents, or
// x and weight_ih the factors of another product of R1; I may be 0. The rest of tpre but th_{t-1} W_hhᵀ
// may be in `gates` beforehand, and with weight_hr m tW_hrᵀ is in `y`; both are overwritten.
template <typename real>
struct TangentArguments : ForwardArguments<real> {
    const real* of_gates;  // (D, N, 4H), what the forward pass kept
    const real* of_cells;  // (D, N, H)
    const real* of_c0;     // (D, B, H)
    int64_t known;         // 1: a part of tpre is in `gates`
};

// A forward pass and its tangent at once. `gates` is null, and `cells` with tcells where not asked for.
template <typename real>
struct DualArguments : ForwardArguments<real> {
    const real* tx;              // (N, I) or null
    const real* th0;             // (D, B, P) or null
    const real* tc0;             // (D, B, H) or null
    real* ty;                    // (N, D·P)
    real* th_n;                  // (D, B, P)
    real* tc_n;                  // (D, B, H)
    real* tcells;                // (D, N, H) or null
    Weights<real> tweights[2];   // any of them may be null
};

// The tangent of a backward pass, R9 to R17: dy, dh_n, dc_n, dcells, dpre, dh, dh0 and dc0 are
// tangents. What is known beforehand: dy holds the part dpre tW_hh of R17 too, dcells the parts of
// R12 and R16 through tangents of peepholes.
template <typename real>
struct BackwardTangentArguments : BackwardArguments<real> {
    const real* dm;        // (D, N, H)
    const real* tdm;       // (D, N, H) or null: the part dh tW_hr of R10
    const real* dc_given;  // (D, N, H) or null: what dcells and the peepholes add to dc
    real* dc_next;         // (D, B, H); holds dc_n before the last step
    const real* tgates;    // (D, N, 4H)
    const real* tcells;    // (D, N, H)
    const real* tc0;       // (D, B, H)
};

// Which rows belong to which step. Sequences are sorted by falling length, so that those alive at
// step t are the first ones.
struct Rows {
    const Sizes* sizes;
    int64_t* starts;  // (T + 1,) when packed

    void plan(Workspace& workspace, const Sizes& s) {
        sizes = &s;
        starts = s.batch_sizes ? workspace.take<int64_t>(s.T + 1) : nullptr;
    }
    void fill() {
        if (!starts) return;
        starts[0] = 0;
        for (int64_t t = 0; t < sizes->T; t++) starts[t + 1] = starts[t] + sizes->batch_sizes[t];
    }
    // The first row of step t; of step T, N.
    int64_t start(int64_t t) const { return starts ? starts[t] : t * sizes->B; }
    // How many sequences are alive at step t; none before the first step and after the last.
    int64_t alive(int64_t t) const {
        if (t < 0 || t >= sizes->T) return 0;
        return starts ? sizes->batch_sizes[t] : sizes->B;
    }
    // The length of sequence b, given the length `at_least` as long of the one before it.
    int64_t length(int64_t b, int64_t at_least) const {
        while (starts && at_least > 0 && sizes->batch_sizes[at_least - 1] <= b) at_least--;
        return at_least;
    }
    // Share `index` of the sequences, divided so that all shares have about as many rows.
    Range share_sequences(int64_t index, int64_t parts) const {
        const int64_t N = start(sizes->T);
        Range range = {0, 0};
        int64_t length_b = sizes->T, before = 0;
        for (int64_t b = 0; b < sizes->B; b++) {
            if (before * parts < N * index) range.begin = b + 1;
            if (before * parts < N * (index + 1)) range.end = b + 1;
            length_b = length(b, length_b);
            before += length_b;
        }
        return range;
    }
};

// The steps in chunks of at most `chunk_rows` rows, or one step, whose part of a gradient is summed at
// once; and the chunks in segments, of K steps at least, before which a pass that is to be run again
// keeps its state.
struct Segments {
    int64_t *chunks, *segments;  // the first step of every chunk, the first chunk of every segment
    int64_t n_chunks = 0, n = 0;

    void plan(Workspace& workspace, const Rows& rows, int64_t T, int64_t K, int64_t chunk_rows) {
        chunks = workspace.take<int64_t>(T + 1), segments = workspace.take<int64_t>(T + 1);
        if (!chunks) return;
        n_chunks = n = 0;
        for (int64_t t = 0; t < T; n_chunks++) {
            if (n_chunks == 0 || t - chunks[segments[n - 1]] >= K) segments[n++] = n_chunks;
            chunks[n_chunks] = t;
            int64_t n_rows = rows.alive(t++);
            while (t < T && n_rows + rows.alive(t) <= chunk_rows) n_rows += rows.alive(t++);
        }
        chunks[n_chunks] = T, segments[n] = n_chunks;
    }
    // The first step of segment k; of the one after the last, T.
    int64_t start(int64_t k) const { return chunks[segments[k]]; }
};

// Whether rows of this stride spread over the L1 cache. At a multiple of 1 KB those of a tile share a
// few of its sets.
template <typename real>
bool spreads(int64_t stride) {
    return stride * sizeof(real) % 1024 != 0;
}

// The stride of rows of n numbers: whole cache lines, and one that spreads.
template <typename real>
int64_t row_stride(int64_t n) {
    constexpr int64_t line = 64 / sizeof(real);
    const int64_t stride = round_up(n, line);
    return spreads<real>(stride) ? stride : stride + line;
}

// How a thread takes part in one direction: its sequences, its share of every list of panels.
struct Part {
    Range sequences;
    int64_t unit, units;
    Barrier* barrier;

    void barrier_wait() const {
        if (units > 1) barrier->wait();
    }

    // This thread's of the tiles over so many rows of `n_panels` panels. Which ones changes with `rows`:
    // what another stage leaves to the same unit and row may be another thread's work.
    template <typename Stage>
    Range share_tiles(int64_t rows, int64_t n_panels) const {
        return share(n_panels * tiles_of<Stage>(rows), unit, units);
    }

    // Covers sequences [first, end) of this part with the tiles of a stage of `n_panels` panels.
    template <typename Stage>
    void cover(const Stage& stage, int64_t first, int64_t end, int64_t n_panels,
               int64_t turn = 0) const {
        const int64_t from = first > sequences.begin ? first : sequences.begin;
        const int64_t to = least(end, sequences.end);
        if (from < to) ::cover(stage, from, to, share_tiles<Stage>(to - from, n_panels), turn);
    }
};

// How a thread takes part in a pass on a grid, and in which directions.
struct Role {
    Part part;
    int64_t batch;
    Range directions;
};

// The role at a place of the grid, which has a barrier for every direction and part of the batch.
inline Role role_in(const Grid& grid, int64_t place, const Rows& rows, Barrier* barriers) {
    const Place at = place_in(grid, place);
    return {{rows.share_sequences(at.batch, grid.batches), at.unit, grid.units,
             &barriers[at.direction * grid.batches + at.batch]},
            at.batch, share(rows.sizes->D, at.direction, grid.directions)};
}

// Calls work(role, direction) for every role of a thread of `threads`, in each of its directions.
template <typename Work>
void for_roles(const Grid& given, int64_t thread, int64_t threads, const Rows& rows, Barrier* barriers,
               const Work& work) {
    const Grid grid = given.among(threads);
    const Range places = grid.places(thread, threads);
    for (int64_t k = places.begin; k < places.end; k++) {
        const Role role = role_in(grid, k, rows, barriers);
        for (int64_t d = role.directions.begin; d < role.directions.end; d++) work(role, d);
    }
}

inline void set_barriers(Barrier* barriers, const Grid& grid) {
    for (int64_t k = 0; k < grid.directions * grid.batches; k++)
        barriers[k] = Barrier((int)grid.units);
}

// What a call returns.
enum Outcome { DONE, NO_MEMORY, CROWDED, OUTDATED };

// CROWDED if threads waited for one without a core in two fifths of the time since `start` or more,
// else DONE: those that meet at every step, or those that have done as much of the work, which `waited`
// for it, longer than it takes to wake one.
inline Outcome outcome_of(const Barrier* barriers, const Grid& grid, int64_t waited, int64_t start) {
    constexpr int64_t to_wake = 500000;
    const int64_t enough = (nanoseconds() - start) * 2 / 5;
    for (int64_t k = 0; k < grid.directions * grid.batches; k++)
        if (barriers[k].lost() > enough) return CROWDED;
    return waited > enough && waited > to_wake ? CROWDED : DONE;
}

// Whether so many threads at the places of a grid have about as much to do.
inline bool alike(const Sizes& sizes, const Grid& grid, int64_t threads) {
    const bool batches = sizes.B % grid.batches == 0 || sizes.B >= 8 * grid.batches;
    return !sizes.batch_sizes && batches && sizes.D % grid.directions == 0 && grid.size() % threads == 0;
}

// Runs both directions of a Forward or Backward pass on the grid. `Pass` has plan(), start(), prepare(),
// the share of one thread in what comes before the first step, and run().
template <typename Pass, typename Arguments>
Outcome run_layer(const Arguments& a) {
    const int64_t begun = nanoseconds();
    const Sizes& sizes = a.sizes;
    Workspace workspace;
    Rows rows;
    Pass directions[2];
    Barrier* barriers = nullptr;
    const int64_t n_barriers = sizes.grid.directions * sizes.grid.batches;
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1 && !workspace.allocate()) return NO_MEMORY;
        rows.plan(workspace, sizes);
        barriers = workspace.take<Barrier>(n_barriers);
        for (int64_t d = 0; d < sizes.D; d++) directions[d].plan(workspace, a, d, rows);
    }
    rows.fill();
    for (int64_t d = 0; d < sizes.D; d++) directions[d].start();
    set_barriers(barriers, sizes.grid);
    const int64_t wanted = sizes.grid.wanted();
    const int64_t waited = run_on(wanted, [&](int64_t thread, int64_t threads, Barrier& everyone) {
        for (int64_t d = 0; d < sizes.D; d++) directions[d].prepare(thread, threads);
        everyone.wait();
        for_roles(sizes.grid, thread, threads, rows, barriers, [&](const Role& role, int64_t d) {
            directions[d].run(role.part, role.batch);
        });
    });
    const bool comparable = alike(sizes, sizes.grid, wanted);
    return outcome_of(barriers, sizes.grid, comparable ? waited : 0, begun);
}

}  // namespace
