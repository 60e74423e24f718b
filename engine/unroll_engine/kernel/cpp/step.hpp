// One step of one layer, compiled once for each kind of vector unit. See step.cpp.
#pragma once

#include <cstdint>

namespace unroll {

enum class Cell : int { rnn_tanh, rnn_relu, lstm, gru, gru_reset_before };

// A matrix packed for the tiles: [block][input][gate][BLOCK] of weights, [block][accumulator][BLOCK] of biases.
struct Packed {
    const float* weights;
    const float* bias;
    int64_t stride;  // floats from one block of weights to the next
    int64_t outputs;
};

struct Layer {
    Cell cell;
    int64_t inputs;
    int64_t hidden;
    Packed gates;
    Packed candidate;  // only for gru_reset_before: the gate n, computed after r
};

// Rows of lanes. Every row of out, cell and scratch has room for a multiple of 16 floats.
struct Rows {
    int64_t lanes;
    const float* x;
    int64_t x_stride;
    const float* h;
    float* out;
    float* cell;     // only for an LSTM: read and written in place
    float* scratch;  // only for gru_reset_before: two blocks of `lanes` rows
    int64_t h_stride;  // of h, out, cell and scratch
};

// The functions of one vector unit. All of them give the same bits.
struct Isa {
    const char* name;
    void (*step)(const Layer&, const Rows&);
    // out = bias + h W, rows of out have room for a multiple of 16 floats.
    void (*readout)(const Packed&, int64_t inputs, int64_t lanes, const float* h, int64_t h_stride, float* out,
                    int64_t out_stride);
    // out = (x - mean) / std
    void (*standardize)(const float* x, const float* mean, const float* std, float* out, int64_t count);
    void (*tanh)(const float* x, float* out, int64_t count);
    void (*sigmoid)(const float* x, float* out, int64_t count);
    // Copies numbers; returns false if one is not finite.
    bool (*copy_finite)(const float* from, float* to, int64_t count);
};

constexpr int64_t row_multiple = 16;
// Outputs in a block of packed weights, by the number of gates of one output.
constexpr int64_t block_of(int gates) { return gates == 1 ? 32 : 16; }

#if defined(__x86_64__)
extern const Isa isa_v3, isa_v4;
#elif defined(__aarch64__)
extern const Isa isa_neon;
#endif

}  // namespace unroll
