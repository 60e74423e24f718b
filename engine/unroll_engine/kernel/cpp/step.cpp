// The step kernel. Compiled once for each vector unit; everything but one table of functions is local to the file.
//
// Every output of every cell is ONE chain of fused multiply-adds in a fixed order: bias, inputs, state. Vectors run
// over outputs and tiles over lanes and outputs, so neither touches the chain: its bits do not depend on them.
#include "step.hpp"

#include <utility>

#include "activations.hpp"

#define ALWAYS __attribute__((always_inline))

namespace unroll {
namespace {

template <int... I, class Body>
inline ALWAYS void unrolled(std::integer_sequence<int, I...>, Body&& body) {
    (body(std::integral_constant<int, I>{}), ...);
}

// Calls body(integral_constant 0) ... body(integral_constant COUNT - 1), unrolled by the language, not by an optimizer.
template <int COUNT, class Body>
inline ALWAYS void repeat(Body&& body) {
    unrolled(std::make_integer_sequence<int, COUNT>{}, body);
}

// A kind of product: gates of one output side by side in the weights, and accumulators of one output.
// Three gates with four accumulators are a GRU's: what the reset gate multiplies is summed apart.
template <int GATES, int ACCUMULATORS>
struct Form {
    static constexpr int gates = GATES, accumulators = ACCUMULATORS, block = block_of(GATES);
    // Registers for accumulators: the others hold weights and one lane's broadcast value.
    static constexpr int budget = registers == 32 ? 24 : 12;
    static constexpr int most_lanes = budget / (ACCUMULATORS > 2 ? 4 : 2);
    static constexpr bool fits(int lanes, int parts) {
        return lanes * parts * ACCUMULATORS <= budget && parts * ACCUMULATORS <= 8;
    }
    static constexpr int most_parts(int lanes) {
        int parts = 1;
        while (fits(lanes, 2 * parts)) parts *= 2;
        return parts;
    }
};

struct Operands {
    const float* x;
    int64_t x_stride, inputs;
    const float* h;
    int64_t h_stride, hidden;
    const float* weights;  // at the first output of the tile
    int64_t stride;
    const float* bias;
};

// Adds `count` inputs of M lanes to the accumulators. `weights` are advanced behind the last input.
template <class F, int M, int P, int LAST, int BLOCKS>
inline ALWAYS void accumulate(Vector (&sum)[M][P * F::accumulators], const float* rows, int64_t stride, int64_t count,
                              const float* (&weights)[BLOCKS]) {
    // Rows in groups of three: base, base + stride, base + 2 stride are one address register and one index.
    const float* base[(M + 2) / 3];
    repeat<(M + 2) / 3>([&](auto group) ALWAYS { base[group] = rows + 3 * group * stride; });
    for (int64_t k = 0; k < count; k++) {
        Vector w[P * F::gates];
        repeat<P * F::gates>([&](auto index) ALWAYS {
            constexpr int part = index / F::gates, gate = index % F::gates, offset = part * width;
            w[index] = load(weights[offset / F::block] + gate * F::block + offset % F::block);
        });
        repeat<M>([&](auto m) ALWAYS {
            const Vector value = splat(base[m / 3][(m % 3) * stride]);
            repeat<P * F::gates>([&](auto index) ALWAYS {
                constexpr int part = index / F::gates, gate = index % F::gates;
                constexpr int to = part * F::accumulators + (gate == F::gates - 1 ? LAST : gate);
                sum[m][to] = fma(value, w[index], sum[m][to]);
            });
        });
        repeat<(M + 2) / 3>([&](auto group) ALWAYS { base[group]++; });
        repeat<BLOCKS>([&](auto block) ALWAYS { weights[block] += F::gates * F::block; });
    }
}

// Sums of M lanes by P vectors of outputs, into sums[M][P][accumulators][width].
template <class F, int M, int P>
__attribute__((noinline)) void tile(const Operands& o, float* sums) {
    constexpr int blocks = P * width > F::block ? P * width / F::block : 1;
    Vector sum[M][P * F::accumulators];
    repeat<P * F::accumulators>([&](auto index) ALWAYS {
        constexpr int part = index / F::accumulators, kind = index % F::accumulators, offset = part * width;
        constexpr int block = offset / F::block, within = offset % F::block;
        const Vector bias = load(o.bias + (block * F::accumulators + kind) * F::block + within);
        repeat<M>([&](auto m) ALWAYS { sum[m][index] = bias; });
    });
    const float* weights[blocks];
    repeat<blocks>([&](auto block) ALWAYS { weights[block] = o.weights + block * o.stride; });
    accumulate<F, M, P, F::gates - 1>(sum, o.x, o.x_stride, o.inputs, weights);
    accumulate<F, M, P, F::accumulators - 1>(sum, o.h, o.h_stride, o.hidden, weights);
    repeat<M>([&](auto m) ALWAYS {
        repeat<P * F::accumulators>([&](auto index) ALWAYS {
            store(sums + (m * P * F::accumulators + index) * width, sum[m][index]);
        });
    });
}

using Tile = void (*)(const Operands&, float*);

template <class F, int M, int LOG>
constexpr Tile tile_of() {
    if constexpr (F::fits(M, 1 << LOG)) return tile<F, M, (1 << LOG)>;
    return nullptr;
}

template <class F, int... I>
constexpr Tile choose(int lanes, int log, std::integer_sequence<int, I...>) {
    Tile chosen = nullptr;
    ((I == (lanes - 1) * 4 + log ? void(chosen = tile_of<F, I / 4 + 1, I % 4>()) : void()), ...);
    return chosen;
}

template <class F>
struct Tiles {
    Tile of[F::most_lanes][4];
    constexpr Tiles() : of{} {
        for (int lanes = 1; lanes <= F::most_lanes; lanes++)
            for (int log = 0; log < 4; log++)
                of[lanes - 1][log] = choose<F>(lanes, log, std::make_integer_sequence<int, F::most_lanes * 4>{});
    }
};

// Computes all sums, tile by tile, and calls finish(first lane, lanes, first output, parts, sums) behind each tile.
template <class F, class Finish>
inline ALWAYS void multiply(const Packed& matrix, Operands o, int64_t lanes, Finish&& finish) {
    static constexpr Tiles<F> tiles;
    alignas(64) float sums[F::budget * width];
    const int64_t count = (lanes + F::most_lanes - 1) / F::most_lanes, least = lanes / count, larger = lanes % count;
    const int64_t parts = (matrix.outputs + width - 1) / width;
    const int most_parts = F::most_parts(static_cast<int>(least + (larger > 0)));
    const float *x = o.x, *h = o.h;
    for (int64_t part = 0; part < parts;) {
        int step = most_parts, log = 0;
        while (step > parts - part) step /= 2;
        while ((1 << log) < step) log++;
        const int64_t output = part * width, block = output / F::block, within = output % F::block;
        o.stride = matrix.stride;
        o.weights = matrix.weights + block * matrix.stride + within;
        o.bias = matrix.bias + block * F::accumulators * F::block + within;
        int64_t lane = 0;
        for (int64_t index = 0; index < count; index++) {
            const int64_t size = least + (index < larger);
            o.x = x + lane * o.x_stride;
            o.h = h + lane * o.h_stride;
            tiles.of[size - 1][log](o, sums);
            finish(lane, size, output, step, sums);
            lane += size;
        }
        part += step;
    }
}

// Calls body(offset of the vector from a row's beginning, its sums) for each vector of outputs of a tile.
template <int ACCUMULATORS, class Body>
inline ALWAYS void each(int64_t stride, int64_t lane, int64_t lanes, int64_t output, int parts, float* sums,
                        Body&& body) {
    for (int64_t m = 0; m < lanes; m++)
        for (int64_t part = 0; part < parts; part++, sums += ACCUMULATORS * width)
            body((lane + m) * stride + output + part * width, sums);
}

template <Vector (*ACTIVATION)(Vector)>
void step_simple(const Layer& layer, const Rows& r, const Operands& o) {
    multiply<Form<1, 1>>(layer.gates, o, r.lanes, [&](auto... tile) ALWAYS {
        each<1>(r.h_stride, tile..., [&](int64_t at, float* sums) ALWAYS {
            store(r.out + at, ACTIVATION(load(sums)));
        });
    });
}

// Gates in the order i, f, g, o: c' = f c + i g, h' = o tanh(c'). Finished in two passes, as a GRU: one sequence of
// dependent operations would be too long for the CPU to overlap with the next vector's.
void step_lstm(const Layer& layer, const Rows& r, const Operands& o) {
    multiply<Form<4, 4>>(layer.gates, o, r.lanes, [&](auto... tile) ALWAYS {
        each<4>(r.h_stride, tile..., [&](int64_t at, float* sums) ALWAYS {
            const Vector kept = sigmoid_of(load(sums + width)) * load(r.cell + at);
            store(r.cell + at, fma(sigmoid_of(load(sums)), tanh_of(load(sums + 2 * width)), kept));
            store(r.out + at, sigmoid_of(load(sums + 3 * width)));
        });
        each<4>(r.h_stride, tile..., [&](int64_t at, float*) ALWAYS {
            store(r.out + at, load(r.out + at) * tanh_of(load(r.cell + at)));
        });
    });
}

// h' = n + z (h - n)
inline Vector blend(Vector z, Vector h, Vector n) { return fma(z, h - n, n); }

// Gates in the order r, z, n: n = tanh(sum of the inputs + r (sum of the state)).
void step_gru(const Layer& layer, const Rows& r, const Operands& o) {
    multiply<Form<3, 4>>(layer.gates, o, r.lanes, [&](auto... tile) ALWAYS {
        each<4>(r.h_stride, tile..., [&](int64_t, float* sums) ALWAYS {
            store(sums, sigmoid_of(load(sums)));
            store(sums + width, sigmoid_of(load(sums + width)));
        });
        each<4>(r.h_stride, tile..., [&](int64_t at, float* sums) ALWAYS {
            const Vector n = tanh_of(fma(load(sums), load(sums + 3 * width), load(sums + 2 * width)));
            store(r.out + at, blend(load(sums + width), load(r.h + at), n));
        });
    });
}

// The reset gate multiplies the state before the product: n = tanh(sum of the inputs and of r h).
void step_gru_reset_before(const Layer& layer, const Rows& r, Operands o) {
    float *reset_state = r.scratch, *update = r.scratch + r.lanes * r.h_stride;
    multiply<Form<2, 2>>(layer.gates, o, r.lanes, [&](auto... tile) ALWAYS {
        each<2>(r.h_stride, tile..., [&](int64_t at, float* sums) ALWAYS {
            store(reset_state + at, sigmoid_of(load(sums)) * load(r.h + at));
            store(update + at, sigmoid_of(load(sums + width)));
        });
    });
    o.h = reset_state;
    multiply<Form<1, 1>>(layer.candidate, o, r.lanes, [&](auto... tile) ALWAYS {
        each<1>(r.h_stride, tile..., [&](int64_t at, float* sums) ALWAYS {
            store(r.out + at, blend(load(update + at), load(r.h + at), tanh_of(load(sums))));
        });
    });
}

void step(const Layer& layer, const Rows& r) {
    const Operands o{r.x, r.x_stride, layer.inputs, r.h, r.h_stride, layer.hidden, nullptr, 0, nullptr};
    switch (layer.cell) {
        case Cell::rnn_tanh: return step_simple<tanh_of>(layer, r, o);
        case Cell::rnn_relu: return step_simple<relu_of>(layer, r, o);
        case Cell::lstm: return step_lstm(layer, r, o);
        case Cell::gru: return step_gru(layer, r, o);
        case Cell::gru_reset_before: return step_gru_reset_before(layer, r, o);
    }
}

void readout(const Packed& matrix, int64_t inputs, int64_t lanes, const float* h, int64_t h_stride, float* out,
             int64_t out_stride) {
    const Operands o{h, h_stride, 0, h, h_stride, inputs, nullptr, 0, nullptr};
    multiply<Form<1, 1>>(matrix, o, lanes, [&](auto... tile) ALWAYS {
        each<1>(out_stride, tile..., [&](int64_t at, float* sums) ALWAYS { store(out + at, load(sums)); });
    });
}

template <class Body>
inline ALWAYS void over(int64_t count, Body&& body) {
    for (int64_t at = 0; at < count; at += width) body(at, count - at);
}

inline Vector load_up_to(const float* from, int64_t count) {
    return count < width ? load_first(from, count) : load(from);
}

inline void store_up_to(float* to, Vector value, int64_t count) {
    count < width ? store_first(to, value, count) : store(to, value);
}

void standardize(const float* x, const float* mean, const float* std, float* out, int64_t count) {
    over(count, [&](int64_t at, int64_t left) ALWAYS {
        store(out + at, (load_up_to(x + at, left) - load(mean + at)) / load(std + at));
    });
}

template <Vector (*ACTIVATION)(Vector)>
void activate(const float* x, float* out, int64_t count) {
    over(count, [&](int64_t at, int64_t left) ALWAYS {
        store_up_to(out + at, ACTIVATION(load_up_to(x + at, left)), left);
    });
}

}  // namespace

const Isa UNROLL_ISA{UNROLL_ISA_NAME, step, readout, standardize, activate<tanh_of>, activate<sigmoid_of>};

}  // namespace unroll
