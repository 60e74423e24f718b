// Runs random networks on every vector unit of this CPU, and prints a digest of all results for each.
//
// Every sequence is first run alone. The same sequences are then run together in a queue: in random slots, cut at
// random steps, with random budgets, some cancelled, on one thread or two, and with another floating-point mode set.
// Every result must have the bits of the sequence alone. Arguments: networks, most lanes.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "network.hpp"

using namespace unroll;

struct Random {
    uint64_t state;
    uint64_t bits() {
        state += 0x9e3779b97f4a7c15;
        uint64_t z = state;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t limit) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(limit)); }
    int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
    // An integer times a power of two, which is exact on every machine.
    float value() { return static_cast<float>(static_cast<int32_t>(bits() >> 40) - (1 << 23)) * 0x1p-23f; }
    std::vector<float> values(int64_t count, float scale) {
        std::vector<float> all(count);
        for (float& each : all) each = value() * scale;
        return all;
    }
};

struct Digest {
    uint64_t hash = 0xcbf29ce484222325;
    void add(const std::vector<float>& values) {
        for (float value : values) {
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            hash = (hash ^ bits) * 0x100000001b3;
        }
    }
};

// Flushes denormals and rounds upwards, which must not affect the kernel.
struct ForeignMode {
#if defined(__x86_64__)
    unsigned before = __builtin_ia32_stmxcsr();
    ForeignMode() { __builtin_ia32_ldmxcsr(0xdfc0); }
    ~ForeignMode() { __builtin_ia32_ldmxcsr(before); }
#else
    uint64_t before;
    ForeignMode() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(uint64_t{0x1400000}));
    }
    ~ForeignMode() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

// The inputs and results of a sequence, with guards around the written memory.
struct Sequence {
    int64_t steps;
    std::vector<float> x, initial, states, logits, final;
};

constexpr float guard = -1234.5f;

struct Case {
    std::shared_ptr<const Network> network;
    std::vector<Sequence> sequences;
};

static long failures = 0;

static void expect(bool condition, const char* what, int network) {
    if (condition) return;
    if (failures++ < 20) std::printf("FAILED: %s, network %d\n", what, network);
}

static Case make(Random& random, const Isa& isa, int64_t most_lanes) {
    const Cell cell = static_cast<Cell>(random.below(5));
    const int64_t gates = cell == Cell::lstm ? 4 : cell < Cell::lstm ? 1 : 3, sums = cell == Cell::gru ? 4 : gates;
    const int64_t inputs = random.between(1, 40), outputs = random.between(1, 40), layers = random.between(1, 3);
    const int64_t hidden = random.below(8) ? random.between(1, 70) : random.between(100, 150);
    const float scale = 1.7f / std::sqrt(static_cast<float>(hidden)), tiny = random.below(8) ? 1.0f : 0x1p-126f;
    std::vector<std::vector<float>> memory;
    auto weights = [&](int64_t count) { return memory.emplace_back(random.values(count, scale)).data(); };
    memory.reserve(3 * layers);
    std::vector<Network::LayerWeights> packed;
    for (int64_t layer = 0; layer < layers; layer++) {
        const float* input = weights(gates * hidden * (layer ? hidden : inputs));
        const float* recurrent = weights(gates * hidden * hidden);
        const float* bias = weights(sums * hidden);
        packed.push_back({input, recurrent, bias});
        if (tiny != 1.0f) std::fill_n(memory.back().begin(), sums * hidden, 0.0f);
    }
    const std::vector<float> mean = random.values(inputs, tiny), readout = random.values(outputs * hidden, scale);
    std::vector<float> std = random.values(inputs, 1), bias = random.values(outputs, tiny == 1.0f ? 1.0f : 0.0f);
    for (float& each : std) each = std::fabs(each) + 0.5f;
    const bool scaled = random.below(2);
    Case made;
    made.network = std::make_shared<Network>(isa, cell, inputs, hidden, outputs, scaled ? mean.data() : nullptr,
                                             scaled ? std.data() : nullptr, packed, readout.data(), bias.data());
    const int64_t lanes = random.below(8) ? random.between(1, std::min<int64_t>(24, most_lanes)) : random.between(1, most_lanes);
    const int64_t state = made.network->states() * layers * hidden;
    for (int64_t lane = 0; lane < lanes; lane++) {
        const int64_t steps = random.between(1, 9);
        made.sequences.push_back({steps, random.values(steps * inputs, 2 * tiny), random.values(state, tiny),
                                  std::vector<float>(steps * hidden, guard), std::vector<float>(steps * outputs, guard),
                                  std::vector<float>(state, guard)});
    }
    return made;
}

// Makes the job of some steps of a sequence. The state is read from and written to `state`.
static Job job_of(const Network& network, Sequence& sequence, int64_t from, int64_t steps, std::vector<float>& state,
                  bool every_step) {
    const int64_t layers = network.layers.size();
    Job job;
    job.x = sequence.x.data() + from * network.inputs;
    job.x_stride = network.inputs;
    job.steps = steps;
    for (int tensor = 0; tensor < network.states(); tensor++) {
        job.initial[tensor] = job.final[tensor] = state.data() + tensor * layers * network.hidden;
        job.initial_stride[tensor] = job.final_stride[tensor] = network.hidden;
    }
    job.states = sequence.states.data() + from * network.hidden;
    job.states_stride = network.hidden;
    job.logits = sequence.logits.data() + (every_step ? from : from + steps - 1) * network.outputs;
    job.logits_stride = network.outputs;
    job.every_step = every_step;
    return job;
}

static bool same(const std::vector<float>& one, const std::vector<float>& other) {
    return one.size() == other.size() && !std::memcmp(one.data(), other.data(), one.size() * sizeof(float));
}

// Runs copies of the sequences in a queue, and compares the results with those of each alone.
static void storm(Random& random, const Case& alone, int number) {
    const Network& network = *alone.network;
    const bool cancels = random.below(2), every_step = random.below(2);
    const int64_t threads = random.between(1, 2), count = alone.sequences.size();
    Queue queue(alone.network, random.between(1, 40), threads, random.below(2) ? 0 : 1 << 24);
    struct Run {
        Sequence sequence;
        int64_t done = 0, running = 0;
        bool cancelled = false;
    };
    std::vector<Run> runs;
    for (const Sequence& sequence : alone.sequences) {
        runs.push_back({sequence});
        runs.back().sequence.final = sequence.initial;
        for (auto* output : {&runs.back().sequence.states, &runs.back().sequence.logits})
            std::fill(output->begin(), output->end(), guard);
    }
    std::map<int64_t, int64_t> tickets;
    auto submit = [&](int64_t index) {
        Run& run = runs[index];
        run.running = random.between(1, run.sequence.steps - run.done);
        Job job = job_of(network, run.sequence, run.done, run.running, run.sequence.final, every_step);
        if (cancels && random.below(16) == 0) job.deadline = 1;
        std::vector<Job> jobs{job};
        tickets[queue.submit(jobs)] = index;
    };
    for (int64_t index = count; index-- > 0;) submit(index);
    while (queue.size()) {
        if (cancels && random.below(4) == 0) {
            const int64_t ticket = random.between(1, 2 * count);
            expect(queue.cancel(ticket) == (tickets.count(ticket) == 1), "cancel() of what has not ended only", number);
        }
        std::vector<Ended> ended;
        const int64_t budget = random.between(1, 200), rounds = random.below(2) ? unbounded : random.between(1, 3);
        {
            const ForeignMode mode;
            queue.advance(budget, rounds, ended);
        }
        for (const Ended& end : ended) {
            const auto found = tickets.find(end.ticket);
            expect(found != tickets.end(), "a ticket ends once", number);
            if (found == tickets.end()) continue;
            const int64_t index = found->second;
            tickets.erase(found);
            Run& run = runs[index];
            run.cancelled = end.outcome != Outcome::done;
            if (run.cancelled) continue;
            run.done += run.running;
            if (run.done < run.sequence.steps) submit(index);
        }
    }
    expect(tickets.empty(), "every ticket ends", number);
    for (int64_t index = 0; index < count; index++) {
        const Run& run = runs[index];
        const Sequence &got = run.sequence, &expected = alone.sequences[index];
        if (run.cancelled) continue;
        expect(run.done == got.steps, "all steps run", number);
        expect(same(got.states, expected.states), "states as alone", number);
        expect(same(got.final, expected.final), "final states as alone", number);
        const int64_t width = network.outputs;
        for (int64_t step = 0; step < got.steps; step++) {
            const float* logits = got.logits.data() + step * width;
            if (!every_step && logits[0] == guard) continue;
            expect(!std::memcmp(logits, expected.logits.data() + step * width, width * sizeof(float)), "logits as alone", number);
        }
        expect(got.logits[got.steps * width - 1] != guard, "logits of the last step", number);
    }
}

int main(int argc, char** argv) {
    const int networks = argc > 1 ? std::atoi(argv[1]) : 200;
    const int64_t most_lanes = argc > 2 ? std::atoi(argv[2]) : 300;
    for (const Isa* isa : available_isas()) {
        Digest digest;
        long denormals = 0, lanes = 0, most = 0;
        for (int number = 0; number < networks; number++) {
            Random weights{static_cast<uint64_t>(number)}, order{static_cast<uint64_t>(number) << 32};
            Case made = make(weights, *isa, most_lanes);
            for (Sequence& sequence : made.sequences) {
                sequence.final = sequence.initial;
                const Job job = job_of(*made.network, sequence, 0, sequence.steps, sequence.final, true);
                made.network->run(&job, 1);
                for (const auto* values : {&sequence.states, &sequence.logits, &sequence.final}) digest.add(*values);
                for (float value : sequence.states) denormals += value != 0 && std::fabs(value) < 0x1p-126f;
            }
            lanes += made.sequences.size();
            most = std::max<long>(most, made.sequences.size());
            storm(order, made, number);
        }
        std::printf("%s digest=%016llx networks=%d lanes=%ld most=%ld denormals=%ld failures=%ld\n", isa->name,
                    static_cast<unsigned long long>(digest.hash), networks, lanes, most, denormals, failures);
    }
    return failures != 0;
}
