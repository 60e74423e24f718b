// A network packed for the step kernel, and the loop that runs sequences of any lengths in parallel.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "step.hpp"

namespace unroll {

// The vector units of this CPU that the kernel is compiled for, the widest first.
std::vector<const Isa*> available_isas();

// Zeroed float32 memory, aligned to 64 bytes.
class Floats {
public:
    explicit Floats(int64_t count = 0);
    float* at(int64_t index) const { return data_.get() + index; }

private:
    struct Free {
        void operator()(float* data) const;
    };
    std::unique_ptr<float, Free> data_;
};

constexpr int64_t unbounded = std::numeric_limits<int64_t>::max();
constexpr int max_states = 2;  // tensors in the state: h, and c of an LSTM

// A sequence to run: pointers to its values and its results. Strides are in floats.
// The members that every step uses come first, in one cache line; their pointers advance.
struct alignas(64) Job {
    const float* x = nullptr;
    int64_t x_stride = 0;
    int64_t steps = 0;  // left to run
    float* states = nullptr;  // of the last layer at every step; null if not wanted
    int64_t states_stride = 0;
    float* logits = nullptr;  // null if not wanted
    int64_t logits_stride = 0;
    bool every_step = false;  // true for the logits of every step, false for those of the last

    int64_t ticket = 0;
    int64_t deadline = 0;  // std::chrono::steady_clock, nanoseconds; 0: none
    const float* initial[max_states] = {};  // null: zeros
    int64_t initial_stride[max_states] = {};  // between layers
    float* final[max_states] = {};  // null if not wanted; may be the initial state's memory
    int64_t final_stride[max_states] = {};
};

enum class Outcome : int { done, cancelled, expired };

struct Ended {
    int64_t ticket;
    Outcome outcome;
    bool last;  // true for the last of its ticket
};

// Provides jobs for free slots, and receives their outcomes.
class Source {
public:
    virtual ~Source() = default;
    virtual bool next(Job& job) = 0;
    // Returns the outcome with which a running job must end now, if any.
    virtual std::optional<Outcome> stopped(const Job&) { return std::nullopt; }
    virtual void ended(const Job& job, Outcome outcome) = 0;
};

class Network;

// Parallel lanes, one sequence each. A slot is refilled as soon as its sequence ends.
class Slots {
public:
    Slots(const Network& network, int64_t capacity);
    // Runs at most `most` lanes at a time, until at least `budget` steps over all lanes or exactly `rounds` steps of
    // each lane are done, or nothing is left. Returns the steps over all lanes.
    int64_t run(Source& source, int64_t budget, int64_t rounds = unbounded, int64_t most = unbounded);
    // Starts jobs until `most` are active.
    void fill(Source& source, int64_t most);
    int64_t active() const { return active_; }

private:
    float* h(int64_t layer, int parity, int64_t lane = 0) const;
    float* cell(int64_t layer, int64_t lane = 0) const;
    float* state(int tensor, int64_t layer, int64_t lane) const { return tensor ? cell(layer, lane) : h(layer, parity_, lane); }
    void begin(const Job& job);
    void step();
    void write_state(int64_t lane);
    void remove(int64_t lane);
    void read_out(const float* state, float* logits);
    void flush();

    const Network& network_;
    const int64_t capacity_;
    int64_t active_ = 0, readouts_ = 0;
    int parity_ = 0;  // half of h_ with the state; a step writes the other half
    std::vector<Job> slots_;
    Floats x_, h_, cells_, scratch_;
    Floats read_, logits_;  // states that wait for the readout, which is faster for several at once
    std::vector<float*> logits_to_;
};

class Network {
public:
    // Weights of a layer: [gates * hidden, inputs], [gates * hidden, hidden], gates in the order of step.cpp; biases
    // of the accumulators, [accumulators * hidden].
    struct LayerWeights {
        const float *input, *recurrent, *bias;
    };

    // mean and std: [inputs], or null if values are not scaled. readout: [outputs, hidden].
    Network(const Isa& isa, Cell cell, int64_t inputs, int64_t hidden, int64_t outputs, const float* mean,
            const float* std, const std::vector<LayerWeights>& layers, const float* readout, const float* bias);

    // Runs jobs to their ends on the calling thread.
    void run(const Job* jobs, int64_t count) const;

    const Isa& isa;
    const Cell cell;
    const int64_t inputs, hidden, outputs;
    const int64_t x_width, h_width, logits_width;  // of rows, padded
    std::vector<Layer> layers;
    Packed readout;
    Floats mean, std;
    bool standardizes;
    int states() const { return cell == Cell::lstm ? 2 : 1; }
    int64_t products() const { return products_; }  // of one step of one lane

private:
    Packed pack(int gates, int accumulators, const float* input, int64_t inputs, const float* recurrent,
                const float* bias, int64_t outputs);

    int64_t products_;
    std::vector<Floats> memory_;
    mutable std::mutex lock_;
    mutable std::vector<std::unique_ptr<Slots>> idle_;
};

// Waiting sequences, and the slots of several threads that run them.
class Queue {
public:
    // `slots` is per thread; `worthwhile` is the number of products that are worth another thread.
    Queue(std::shared_ptr<const Network> network, int64_t slots, int64_t threads, int64_t worthwhile = 1 << 23);

    // Returns the ticket of all these jobs. Their memory must stay valid until advance() returns the end of the last.
    int64_t submit(std::vector<Job>& jobs);
    // Cancels the remaining sequences of a ticket at the next advance(). Returns false if all have ended.
    bool cancel(int64_t ticket);
    // Runs the slots of all threads; see Slots::run. Throws std::logic_error if they are running.
    int64_t advance(int64_t budget, int64_t rounds, std::vector<Ended>& ended);
    // Number of sequences that have not ended.
    int64_t size() const;
    int64_t threads() const { return static_cast<int64_t>(slots_.size()); }

    const std::shared_ptr<const Network> network;

private:
    class Turn;  // the Source of one thread in one advance()

    mutable std::mutex lock_;
    std::deque<Job> waiting_;
    std::unordered_map<int64_t, int64_t> live_;  // sequences that have not ended, by ticket
    std::unordered_set<int64_t> cancelled_;
    int64_t tickets_ = 0, size_ = 0;
    std::vector<std::unique_ptr<Slots>> slots_;  // by thread
    std::atomic_flag running_ = ATOMIC_FLAG_INIT;
    const int64_t worthwhile_;
};

}  // namespace unroll
