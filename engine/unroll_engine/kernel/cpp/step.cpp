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

// A kind of product: the gates of one output, adjacent in the weights, and the accumulators of one output.
// A GRU has three gates and four accumulators, since the terms that the reset gate multiplies are summed separately.
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
    const float* weights;  // those of the first output of the tile
    int64_t stride;
    const float* bias;
};

// Adds `count` inputs of M lanes to the accumulators. `weights` is advanced past the last input.
template <class F, int M, int P, int LAST, int BLOCKS>
inline ALWAYS void accumulate(Vector (&sum)[M][P * F::accumulators], const float* rows, int64_t stride, int64_t count,
                              const float* (&weights)[BLOCKS]) {
    // Rows in groups of three: base, base + stride and base + 2 stride need one address register and one index.
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

// Computes the sums of M lanes by P vectors of outputs, into sums[M][P][accumulators][width].
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

// Computes all sums, tile by tile, and calls finish(first lane, lanes, first output, parts, sums) after each tile.
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

// A tile after its product: `lanes` rows by `parts` vectors of outputs, and their sums.
template <int ACCUMULATORS>
struct Finished {
    int64_t stride;  // of the rows of the result arrays
    int64_t lane, lanes, output, parts;
    float* sums;

    int64_t count() const { return lanes * parts; }
    float* sum(int64_t index, int kind) const { return sums + (index * ACCUMULATORS + kind) * width; }
    // Position of a vector's outputs in those arrays.
    int64_t at(int64_t index) const { return (lane + index / parts) * stride + output + index % parts * width; }
};

// to(index) = function(from(index)), vector by vector, several in lockstep.
template <int N = registers == 32 ? 4 : 2, class Function, class From, class To>
inline ALWAYS void apply(Function function, int64_t count, From&& from, To&& to, int64_t index = 0) {
    for (; index + N <= count; index += N) {
        const Pack<N> result = function(Pack<N>::map([&](int i) ALWAYS { return load(from(index + i)); }));
        repeat<N>([&](auto i) ALWAYS { store(to(index + i), result.of[i]); });
    }
    if constexpr (N > 1) apply<N / 2>(function, count, from, to, index);
}

template <class Activation>
void step_simple(const Layer& layer, const Rows& r, const Operands& o) {
    multiply<Form<1, 1>>(layer.gates, o, r.lanes, [&](auto... tile) ALWAYS {
        const Finished<1> f{r.h_stride, tile...};
        apply(Activation{}, f.count(), [&](int64_t i) { return f.sum(i, 0); }, [&](int64_t i) { return r.out + f.at(i); });
    });
}

// Gates in the order i, f, g, o: c' = f c + i g, h' = o tanh(c').
void step_lstm(const Layer& layer, const Rows& r, const Operands& o) {
    multiply<Form<4, 4>>(layer.gates, o, r.lanes, [&](auto... tile) ALWAYS {
        const Finished<4> f{r.h_stride, tile...};
        const auto gate = [&](int kind) { return [&f, kind](int64_t i) { return f.sum(i, kind); }; };
        for (int kind : {0, 1, 3}) apply(Sigmoid{}, f.count(), gate(kind), gate(kind));
        apply(Tanh{}, f.count(), gate(2), gate(2));
        for (int64_t i = 0; i < f.count(); i++) {
            float* const cell = r.cell + f.at(i);
            store(cell, fma(load(f.sum(i, 0)), load(f.sum(i, 2)), load(f.sum(i, 1)) * load(cell)));
        }
        apply(Tanh{}, f.count(), [&](int64_t i) { return r.cell + f.at(i); }, gate(2));
        for (int64_t i = 0; i < f.count(); i++) store(r.out + f.at(i), load(f.sum(i, 3)) * load(f.sum(i, 2)));
    });
}

// h' = n + z (h - n)
inline Vector blend(Vector z, Vector h, Vector n) { return fma(z, h - n, n); }

// Gates in the order r, z, n: n = tanh(sum of the inputs + r (sum of the state)).
void step_gru(const Layer& layer, const Rows& r, const Operands& o) {
    multiply<Form<3, 4>>(layer.gates, o, r.lanes, [&](auto... tile) ALWAYS {
        const Finished<4> f{r.h_stride, tile...};
        const auto gate = [&](int kind) { return [&f, kind](int64_t i) { return f.sum(i, kind); }; };
        for (int kind : {0, 1}) apply(Sigmoid{}, f.count(), gate(kind), gate(kind));
        for (int64_t i = 0; i < f.count(); i++)
            store(f.sum(i, 2), fma(load(f.sum(i, 0)), load(f.sum(i, 3)), load(f.sum(i, 2))));
        apply(Tanh{}, f.count(), gate(2), gate(2));
        for (int64_t i = 0; i < f.count(); i++)
            store(r.out + f.at(i), blend(load(f.sum(i, 1)), load(r.h + f.at(i)), load(f.sum(i, 2))));
    });
}

// The reset gate multiplies the state before the product: n = tanh(sum of the inputs and of r h).
void step_gru_reset_before(const Layer& layer, const Rows& r, Operands o) {
    float *reset_state = r.scratch, *update = r.scratch + r.lanes * r.h_stride;
    multiply<Form<2, 2>>(layer.gates, o, r.lanes, [&](auto... tile) ALWAYS {
        const Finished<2> f{r.h_stride, tile...};
        const auto gate = [&](int kind) { return [&f, kind](int64_t i) { return f.sum(i, kind); }; };
        apply(Sigmoid{}, f.count(), gate(0), gate(0));
        apply(Sigmoid{}, f.count(), gate(1), [&](int64_t i) { return update + f.at(i); });
        for (int64_t i = 0; i < f.count(); i++)
            store(reset_state + f.at(i), load(f.sum(i, 0)) * load(r.h + f.at(i)));
    });
    o.h = reset_state;
    multiply<Form<1, 1>>(layer.candidate, o, r.lanes, [&](auto... tile) ALWAYS {
        const Finished<1> f{r.h_stride, tile...};
        const auto sum = [&](int64_t i) { return f.sum(i, 0); };
        apply(Tanh{}, f.count(), sum, sum);
        for (int64_t i = 0; i < f.count(); i++)
            store(r.out + f.at(i), blend(load(update + f.at(i)), load(r.h + f.at(i)), load(f.sum(i, 0))));
    });
}

void step(const Layer& layer, const Rows& r) {
    const Operands o{r.x, r.x_stride, layer.inputs, r.h, r.h_stride, layer.hidden, nullptr, 0, nullptr};
    switch (layer.cell) {
        case Cell::rnn_tanh: return step_simple<Tanh>(layer, r, o);
        case Cell::rnn_relu: return step_simple<Relu>(layer, r, o);
        case Cell::lstm: return step_lstm(layer, r, o);
        case Cell::gru: return step_gru(layer, r, o);
        case Cell::gru_reset_before: return step_gru_reset_before(layer, r, o);
    }
}

void readout(const Packed& matrix, int64_t inputs, int64_t lanes, const float* h, int64_t h_stride, float* out,
             int64_t out_stride) {
    const Operands o{h, h_stride, 0, h, h_stride, inputs, nullptr, 0, nullptr};
    multiply<Form<1, 1>>(matrix, o, lanes, [&](auto... tile) ALWAYS {
        const Finished<1> f{out_stride, tile...};
        for (int64_t i = 0; i < f.count(); i++) store(out + f.at(i), load(f.sum(i, 0)));
    });
}

void standardize(const float* x, const float* mean, const float* std, float* out, int64_t count) {
    for (int64_t at = 0; at < count; at += width) {
        const Vector value = count - at < width ? load_first(x + at, count - at) : load(x + at);
        store(out + at, (value - load(mean + at)) / load(std + at));
    }
}

template <class Activation>
void activate(const float* x, float* out, int64_t count) {
    const int64_t vectors = count / width, rest = count % width;
    apply(Activation{}, vectors, [&](int64_t i) { return x + i * width; }, [&](int64_t i) { return out + i * width; });
    if (!rest) return;
    const Pack<1> last{{load_first(x + vectors * width, rest)}};
    store_first(out + vectors * width, Activation{}(last).of[0], rest);
}

bool copy_finite(const float* from, float* to, int64_t count) {
    Vector sum = splat(0);
    int64_t at = 0;
    for (; at + width <= count; at += width) {
        const Vector values = load(from + at);
        store(to + at, values);
        sum = sum + (values - values);  // 0, or NaN for an infinity or a NaN
    }
    if (at < count) {
        const Vector values = load_first(from + at, count - at);
        store_first(to + at, values, count - at);
        sum = sum + (values - values);
    }
    float sums[width], total = 0;
    store(sums, sum);
    for (float each : sums) total += each;
    return total == 0;
}

}  // namespace

const Isa UNROLL_ISA{UNROLL_ISA_NAME, step, readout, standardize, activate<Tanh>, activate<Sigmoid>, copy_finite};

}  // namespace unroll
