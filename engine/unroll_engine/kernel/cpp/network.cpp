#include "network.hpp"

#include <algorithm>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace unroll {

namespace {

constexpr int64_t readout_rows = 24;
constexpr int64_t pooled_slots = 48;

int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Rows are not multiples of 128 bytes: lanes at a distance of a power of two would share a few cache sets.
int64_t row(int64_t size) { return up(size, 32) + row_multiple; }

void copy(float* to, const float* from, int64_t count) { std::memcpy(to, from, sizeof(float) * count); }

// Sets rounding to nearest and keeps denormals; restores the thread's own mode at the end.
class FloatEnvironment {
public:
#if defined(__x86_64__)
    FloatEnvironment() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~FloatEnvironment() { _mm_setcsr(before_); }

private:
    unsigned before_;
#else
    FloatEnvironment() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~FloatEnvironment() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

private:
    uint64_t before_;
#endif
};

class Listed final : public Source {
public:
    Listed(const Job* jobs, int64_t count) : next_(jobs), end_(jobs + count) {}
    bool next(Job& job) override {
        if (next_ == end_) return false;
        job = *next_++;
        return true;
    }
    void ended(const Job&, Outcome) override {}

private:
    const Job *next_, *end_;
};

}  // namespace

std::vector<const Isa*> available_isas() {
    std::vector<const Isa*> isas;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
    if (fma && wide) isas.push_back(&isa_v4);
    if (fma) isas.push_back(&isa_v3);
#elif defined(__aarch64__)
    isas.push_back(&isa_neon);
#endif
    return isas;
}

void Floats::Free::operator()(float* data) const { ::operator delete(data, std::align_val_t(64)); }

Floats::Floats(int64_t count) {
    if (!count) return;
    data_.reset(static_cast<float*>(::operator new(sizeof(float) * count, std::align_val_t(64))));
    std::fill_n(data_.get(), count, 0.0f);
}

Network::Network(const Isa& isa, Cell cell, int64_t inputs, int64_t hidden, int64_t outputs, const float* mean,
                 const float* std, const std::vector<LayerWeights>& weights, const float* readout_weights,
                 const float* readout_bias)
    : isa(isa),
      cell(cell),
      inputs(inputs),
      hidden(hidden),
      outputs(outputs),
      x_width(row(inputs)),
      h_width(row(hidden)),
      logits_width(up(outputs, row_multiple)),
      mean(x_width),
      std(x_width),
      standardizes(mean != nullptr),
      products_(hidden * outputs) {
    std::fill_n(this->std.at(0), x_width, 1.0f);
    if (standardizes) {
        copy(this->mean.at(0), mean, inputs);
        copy(this->std.at(0), std, inputs);
    }
    const bool lstm = cell == Cell::lstm, gru = cell == Cell::gru, before = cell == Cell::gru_reset_before;
    const int gates = lstm ? 4 : gru ? 3 : before ? 2 : 1, accumulators = gru ? 4 : gates;
    int64_t width = inputs;
    for (const LayerWeights& layer : weights) {
        Layer packed{cell, width, hidden, pack(gates, accumulators, layer.input, width, layer.recurrent, layer.bias, hidden), {}};
        if (before) {
            const float *input = layer.input + 2 * hidden * width, *recurrent = layer.recurrent + 2 * hidden * hidden;
            packed.candidate = pack(1, 1, input, width, recurrent, layer.bias + 2 * hidden, hidden);
        }
        layers.push_back(packed);
        products_ += (gates + before) * hidden * (width + hidden);
        width = hidden;
    }
    readout = pack(1, 1, nullptr, 0, readout_weights, readout_bias, outputs);
}

Packed Network::pack(int gates, int accumulators, const float* input, int64_t width, const float* recurrent,
                     const float* bias, int64_t size) {
    const int64_t block = block_of(gates), blocks = up(size, block) / block, rows = width + hidden;
    const int64_t stride = rows * gates * block;
    float* const matrix = memory_.emplace_back(blocks * stride).at(0);
    float* const biases = memory_.emplace_back(blocks * accumulators * block).at(0);
    for (int64_t output = 0; output < size; output++) {
        for (int gate = 0; gate < gates; gate++) {
            float* to = matrix + output / block * stride + gate * block + output % block;
            const int64_t line = gate * size + output;
            for (int64_t k = 0; k < rows; k++)
                to[k * gates * block] = k < width ? input[line * width + k] : recurrent[line * hidden + k - width];
        }
        for (int sum = 0; sum < accumulators; sum++)
            biases[(output / block * accumulators + sum) * block + output % block] = bias[sum * size + output];
    }
    return {matrix, biases, stride, size};
}

void Network::run(const Job* jobs, int64_t count) const {
    std::unique_ptr<Slots> slots;
    {
        const std::lock_guard lock(lock_);
        if (!idle_.empty()) {
            slots = std::move(idle_.back());
            idle_.pop_back();
        }
    }
    if (!slots) slots = std::make_unique<Slots>(*this, pooled_slots);
    Listed source(jobs, count);
    slots->run(source, unbounded);
    const std::lock_guard lock(lock_);
    idle_.push_back(std::move(slots));
}

Slots::Slots(const Network& network, int64_t capacity)
    : network_(network),
      capacity_(capacity),
      slots_(capacity),
      x_(capacity * network.x_width),
      h_(static_cast<int64_t>(network.layers.size()) * 2 * capacity * network.h_width),
      cells_(network.cell == Cell::lstm ? static_cast<int64_t>(network.layers.size()) * capacity * network.h_width : 0),
      scratch_(network.cell == Cell::gru_reset_before ? 2 * capacity * network.h_width : 0),
      read_(readout_rows * network.h_width),
      logits_(readout_rows * network.logits_width),
      logits_to_(readout_rows) {}

float* Slots::h(int64_t layer, int parity, int64_t lane) const {
    return h_.at(((2 * layer + parity) * capacity_ + lane) * network_.h_width);
}

float* Slots::cell(int64_t layer, int64_t lane) const {
    return cells_.at((layer * capacity_ + lane) * network_.h_width);
}

void Slots::fill(Source& source, int64_t most) {
    Job job;
    while (active_ < std::min(most, capacity_) && source.next(job)) begin(job);
}

int64_t Slots::run(Source& source, int64_t budget, int64_t rounds, int64_t most) {
    const FloatEnvironment environment;
    int64_t ran = 0;
    for (int64_t lane = active_; lane-- > 0;) {
        if (const auto outcome = source.stopped(slots_[lane])) {
            source.ended(slots_[lane], *outcome);
            remove(lane);
        }
    }
    for (;;) {
        fill(source, most);
        if (!active_ || ran >= budget || !rounds) break;
        int64_t steps = std::min((budget - ran - 1) / active_ + 1, rounds);
        for (int64_t lane = 0; lane < active_; lane++) steps = std::min(steps, slots_[lane].steps);
        for (int64_t count = 0; count < steps; count++) step();
        ran += steps * active_;
        rounds -= steps;
        for (int64_t lane = active_; lane-- > 0;) {
            if (slots_[lane].steps) continue;
            write_state(lane);
            source.ended(slots_[lane], Outcome::done);
            remove(lane);
        }
    }
    flush();
    return ran;
}

void Slots::begin(const Job& job) {
    const int64_t lane = active_++, hidden = network_.hidden;
    slots_[lane] = job;
    for (int tensor = 0; tensor < network_.states(); tensor++) {
        for (size_t layer = 0; layer < network_.layers.size(); layer++) {
            float* to = state(tensor, layer, lane);
            if (job.initial[tensor])
                copy(to, job.initial[tensor] + layer * job.initial_stride[tensor], hidden);
            else
                std::fill_n(to, hidden, 0.0f);
        }
    }
}

// Brings values into the cache before the next step reads them. An address past the end does no harm.
inline void prefetch(const float* values, int64_t count) {
    constexpr int64_t line = 64 / sizeof(float);
    for (int64_t at = 0; at < count; at += line) __builtin_prefetch(values + at);
    __builtin_prefetch(values + count - 1);
}

// One step of every active lane.
void Slots::step() {
    for (int64_t lane = 0; lane < active_; lane++) {
        Job& job = slots_[lane];
        float* x = x_.at(lane * network_.x_width);
        if (network_.standardizes)
            network_.isa.standardize(job.x, network_.mean.at(0), network_.std.at(0), x, network_.inputs);
        else
            copy(x, job.x, network_.inputs);
        job.x += job.x_stride;
        // Of so many sequences at once, the processor foresees none.
        prefetch(job.x, network_.inputs);
    }
    Rows rows{active_, x_.at(0), network_.x_width, nullptr, nullptr, nullptr, scratch_.at(0), network_.h_width};
    for (size_t layer = 0; layer < network_.layers.size(); layer++) {
        rows.h = h(layer, parity_);
        rows.out = h(layer, 1 - parity_);
        if (network_.cell == Cell::lstm) rows.cell = cell(layer);
        network_.isa.step(network_.layers[layer], rows);
        rows.x = rows.out;
        rows.x_stride = network_.h_width;
    }
    parity_ = 1 - parity_;
    for (int64_t lane = 0; lane < active_; lane++) {
        Job& job = slots_[lane];
        job.steps--;
        const float* last = h(network_.layers.size() - 1, parity_, lane);
        if (job.states) {
            copy(job.states, last, network_.hidden);
            job.states += job.states_stride;
        }
        if (job.logits && (job.every_step || !job.steps)) {
            read_out(last, job.logits);
            job.logits += job.logits_stride;
        }
    }
}

void Slots::read_out(const float* state, float* logits) {
    copy(read_.at(readouts_ * network_.h_width), state, network_.hidden);
    logits_to_[readouts_++] = logits;
    if (readouts_ == readout_rows) flush();
}

void Slots::flush() {
    if (!readouts_) return;
    network_.isa.readout(network_.readout, network_.hidden, readouts_, read_.at(0), network_.h_width, logits_.at(0),
                         network_.logits_width);
    for (int64_t row = 0; row < readouts_; row++)
        copy(logits_to_[row], logits_.at(row * network_.logits_width), network_.outputs);
    readouts_ = 0;
}

void Slots::write_state(int64_t lane) {
    const Job& job = slots_[lane];
    for (int tensor = 0; tensor < network_.states(); tensor++) {
        if (!job.final[tensor]) continue;
        for (size_t layer = 0; layer < network_.layers.size(); layer++)
            copy(job.final[tensor] + layer * job.final_stride[tensor], state(tensor, layer, lane), network_.hidden);
    }
}

// Moves the last lane to the place of one that ended.
void Slots::remove(int64_t lane) {
    const int64_t last = --active_;
    if (lane == last) return;
    slots_[lane] = slots_[last];
    for (int tensor = 0; tensor < network_.states(); tensor++)
        for (size_t layer = 0; layer < network_.layers.size(); layer++)
            copy(state(tensor, layer, lane), state(tensor, layer, last), network_.hidden);
}

}  // namespace unroll
