// Python bindings of the kernel. Arrays are checked before their memory is used.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <unordered_map>

#include "network.hpp"
#include "pack.hpp"

namespace nb = nanobind;
using namespace unroll;

namespace {

// Of any dtype: other dtypes than float32 are refused with one line, shorter than nanobind's own message.
using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;
template <class Array>
using Tensors = std::vector<Array>;  // the state, tensor by tensor

constexpr int64_t most_steps = int64_t{1} << 31;
constexpr int64_t held = int64_t{1} << 20;  // most products that are computed with the GIL held: about 20 us

[[noreturn]] void refuse(const std::string& problem) { throw nb::value_error(problem.c_str()); }

std::string text(int64_t size) { return size < 0 ? std::string("any") : std::to_string(size); }

// Checks that an array has a shape (-1: any size) and contiguous rows of floats, and returns it.
template <class Array>
const Array& checked(const char* name, const Array& array, std::initializer_list<int64_t> shape) {
    std::string expected, found;
    bool same = array.ndim() == shape.size();
    for (int64_t size : shape) expected += (expected.empty() ? "" : ", ") + text(size);
    for (size_t axis = 0; axis < array.ndim(); axis++) {
        found += (axis ? ", " : "") + std::to_string(array.shape(axis));
        same = same && (shape.begin()[axis] < 0 || static_cast<int64_t>(array.shape(axis)) == shape.begin()[axis]);
    }
    if (array.dtype() != nb::dtype<float>()) throw nb::type_error((std::string(name) + ": float32 expected").c_str());
    if (!same) refuse(std::string(name) + ": shape [" + found + "], [" + expected + "] expected");
    const size_t last = array.ndim() - 1;
    if (array.shape(last) > 1 && array.stride(last) != 1)
        refuse(std::string(name) + ": its last axis must be contiguous");
    if (reinterpret_cast<uintptr_t>(array.data()) % alignof(float))
        refuse(std::string(name) + ": not aligned to 4 bytes; copy it");
    return array;
}

float* floats(const Output& array) { return static_cast<float*>(array.data()); }
const float* floats(const Input& array) { return static_cast<const float*>(array.data()); }

template <class Array>
const float* contiguous(const char* name, const Array& array, std::initializer_list<int64_t> shape) {
    checked(name, array, shape);
    int64_t stride = 1;
    for (size_t axis = array.ndim(); axis-- > 0; stride *= array.shape(axis))
        if (array.shape(axis) > 1 && array.stride(axis) != stride)
            refuse(std::string(name) + ": must be C-contiguous");
    return floats(array);
}

Cell cell_of(const std::string& name) {
    const char* names[] = {"rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"};
    for (int cell = 0; cell < 5; cell++)
        if (name == names[cell]) return static_cast<Cell>(cell);
    refuse("cell: " + name + "; one of rnn_tanh, rnn_relu, lstm, gru, gru_reset_before expected");
}

const Isa& isa_named(const std::string& name) {
    std::string names;
    for (const Isa* isa : available_isas()) {
        if (name.empty() || name == isa->name) return *isa;
        names += (names.empty() ? "" : ", ") + std::string(isa->name);
    }
    refuse("isa: " + name + "; this CPU has " + (names.empty() ? "none that the kernel is compiled for" : names));
}

std::shared_ptr<Network> make_network(const std::string& cell_name, const std::optional<std::pair<Input, Input>>& scale,
                                      const std::vector<std::tuple<Input, Input, Input>>& layers, const Input& readout,
                                      const Input& bias, const std::string& isa) {
    const Cell cell = cell_of(cell_name);
    const int64_t gates = cell == Cell::lstm ? 4 : cell < Cell::lstm ? 1 : 3;
    const int64_t sums = cell == Cell::gru ? 4 : gates;
    if (layers.empty()) refuse("layers: at least one expected");
    const Input& first = std::get<0>(layers[0]);
    checked("readout", readout, {-1, -1});
    checked("layer 0, input weights", first, {-1, -1});
    const int64_t inputs = first.shape(1), outputs = readout.shape(0), hidden = readout.shape(1);
    for (int64_t size : {inputs, hidden, outputs})
        if (size < 1 || size > 1 << 20) refuse("sizes: from 1 to 2^20 expected, got " + std::to_string(size));
    std::vector<Network::LayerWeights> weights;
    for (size_t layer = 0; layer < layers.size(); layer++) {
        const auto& [input, recurrent, biases] = layers[layer];
        const std::string name = "layer " + std::to_string(layer);
        weights.push_back({
            contiguous((name + ", input weights").c_str(), input, {gates * hidden, layer ? hidden : inputs}),
            contiguous((name + ", recurrent weights").c_str(), recurrent, {gates * hidden, hidden}),
            contiguous((name + ", biases").c_str(), biases, {sums * hidden}),
        });
    }
    const float* mean = scale ? contiguous("mean", scale->first, {inputs}) : nullptr;
    const float* std = scale ? contiguous("std", scale->second, {inputs}) : nullptr;
    return std::make_shared<Network>(isa_named(isa), cell, inputs, hidden, outputs, mean, std, weights,
                                     contiguous("readout", readout, {outputs, hidden}),
                                     contiguous("readout bias", bias, {outputs}));
}

int64_t checked_steps(int64_t steps) {
    if (steps < 1 || steps > most_steps) refuse("x: from 1 to 2^31 timesteps expected, got " + std::to_string(steps));
    return steps;
}

template <class Array>
void check_tensors(const char* name, const Network& network, const Tensors<Array>& tensors) {
    if (static_cast<int>(tensors.size()) != network.states())
        refuse(std::string(name) + ": " + std::to_string(tensors.size()) + " tensors, " +
               std::to_string(network.states()) + " expected");
}

// Makes the job of one sequence: x [steps, inputs], state [layers, hidden] each, states [steps, hidden], logits
// [outputs] of the last step or [steps, outputs].
Job job_of(const Network& network, const Input& x, const std::optional<Tensors<Input>>& initial,
           const std::optional<Tensors<Output>>& final, const std::optional<Output>& states,
           const std::optional<Output>& logits) {
    const int64_t layers = network.layers.size();
    Job job;
    job.steps = checked_steps(checked("x", x, {-1, network.inputs}).shape(0));
    job.x = floats(x);
    job.x_stride = x.stride(0);
    if (initial) {
        check_tensors("state", network, *initial);
        for (int tensor = 0; tensor < network.states(); tensor++) {
            const Input& array = checked("state", (*initial)[tensor], {layers, network.hidden});
            job.initial[tensor] = floats(array);
            job.initial_stride[tensor] = array.stride(0);
        }
    }
    if (final) {
        check_tensors("final_state", network, *final);
        for (int tensor = 0; tensor < network.states(); tensor++) {
            const Output& array = checked("final_state", (*final)[tensor], {layers, network.hidden});
            job.final[tensor] = floats(array);
            job.final_stride[tensor] = array.stride(0);
        }
    }
    if (states) {
        job.states = floats(checked("states", *states, {job.steps, network.hidden}));
        job.states_stride = states->stride(0);
    }
    if (logits) {
        job.every_step = logits->ndim() == 2;
        if (job.every_step) {
            checked("logits", *logits, {job.steps, network.outputs});
            job.logits_stride = logits->stride(0);
        } else {
            checked("logits", *logits, {network.outputs});
        }
        job.logits = floats(*logits);
    }
    return job;
}

void run(const Network& network, const Job* jobs, int64_t count) {
    if (count * jobs->steps <= held / network.products()) return network.run(jobs, count);
    const nb::gil_scoped_release released;
    network.run(jobs, count);
}

void run_one(const Network& network, const Input& x, const std::optional<Tensors<Input>>& initial,
             const std::optional<Tensors<Output>>& final, const std::optional<Output>& states,
             const std::optional<Output>& logits) {
    const Job job = job_of(network, x, initial, final, states, logits);
    run(network, &job, 1);
}

// Runs lanes in parallel, time-major: x [steps, lanes, inputs], states likewise, state [layers, lanes, hidden] each;
// logits [lanes, outputs] of the last step or [steps, lanes, outputs].
void run_lanes(const Network& network, const Input& x, const Tensors<Input>& initial, const Tensors<Output>& final,
               const std::optional<Output>& states, const Output& logits) {
    checked("x", x, {-1, -1, network.inputs});
    const int64_t steps = checked_steps(x.shape(0)), lanes = x.shape(1), layers = network.layers.size();
    const int64_t hidden = network.hidden;
    const bool every_step = logits.ndim() == 3;
    if (!lanes) refuse("x: at least one lane expected");
    check_tensors("state", network, initial);
    check_tensors("final_state", network, final);
    for (int tensor = 0; tensor < network.states(); tensor++) {
        checked("state", initial[tensor], {layers, lanes, hidden});
        checked("final_state", final[tensor], {layers, lanes, hidden});
    }
    if (states) checked("states", *states, {steps, lanes, hidden});
    every_step ? checked("logits", logits, {steps, lanes, network.outputs})
               : checked("logits", logits, {lanes, network.outputs});
    std::vector<Job> jobs(lanes);
    for (int64_t lane = 0; lane < lanes; lane++) {
        Job& job = jobs[lane];
        job.steps = steps;
        job.x = floats(x) + lane * x.stride(1);
        job.x_stride = x.stride(0);
        for (int tensor = 0; tensor < network.states(); tensor++) {
            job.initial[tensor] = floats(initial[tensor]) + lane * initial[tensor].stride(1);
            job.initial_stride[tensor] = initial[tensor].stride(0);
            job.final[tensor] = floats(final[tensor]) + lane * final[tensor].stride(1);
            job.final_stride[tensor] = final[tensor].stride(0);
        }
        if (states) {
            job.states = floats(*states) + lane * states->stride(1);
            job.states_stride = states->stride(0);
        }
        job.logits = floats(logits) + lane * logits.stride(every_step ? 1 : 0);
        job.logits_stride = every_step ? logits.stride(0) : 0;
        job.every_step = every_step;
    }
    run(network, jobs.data(), lanes);
}

// A Queue that keeps the arrays of its sequences until they have ended. The GIL guards `kept`.
struct KeepingQueue {
    struct Arrays {
        Input x;
        std::optional<Tensors<Input>> initial;
        std::optional<Tensors<Output>> final;
        std::optional<Output> states, logits;
    };
    Queue queue;
    std::unordered_map<int64_t, Arrays> kept;
};

KeepingQueue* make_queue(std::shared_ptr<Network> network, int64_t slots, int64_t threads) {
    if (slots < 1 || slots > 4096) refuse("slots: from 1 to 4096 expected, got " + std::to_string(slots));
    if (threads < 1 || threads > 1024) refuse("threads: from 1 to 1024 expected, got " + std::to_string(threads));
    return new KeepingQueue{Queue(std::move(network), slots, threads), {}};
}

int64_t submit(KeepingQueue& self, const Input& x, const std::optional<Tensors<Input>>& initial,
               const std::optional<Tensors<Output>>& final, const std::optional<Output>& states,
               const std::optional<Output>& logits, int64_t deadline) {
    if (deadline < 0) refuse("deadline: at least 0 expected, got " + std::to_string(deadline));
    Job job = job_of(*self.queue.network, x, initial, final, states, logits);
    job.deadline = deadline;
    std::vector<Job> jobs{job};
    const int64_t ticket = self.queue.submit(jobs);
    self.kept.emplace(ticket, KeepingQueue::Arrays{x, initial, final, states, logits});
    return ticket;
}

// Sequences first to first + count - 1 of a batch: values [rows, inputs] with sequence i in rows offsets[i] to
// offsets[i + 1] - 1, state and final state [layers, sequences, hidden] each, logits [sequences, outputs] of the last
// steps; or of every step with states [rows, hidden], logits [rows, outputs] and a final state.
int64_t submit_batch(KeepingQueue& self, const Input& values, const std::vector<int64_t>& offsets, int64_t first,
                     const std::optional<Tensors<Input>>& initial, const std::optional<Tensors<Output>>& final,
                     const Output& logits, const std::optional<Output>& states) {
    const Network& network = *self.queue.network;
    const int64_t rows = checked("values", values, {-1, network.inputs}).shape(0), layers = network.layers.size();
    const int64_t count = static_cast<int64_t>(offsets.size()) - 1;
    checked("logits", logits, {states ? rows : -1, network.outputs});
    if (states) {
        checked("states", *states, {rows, network.hidden});
        if (!final) refuse("final_state: expected with states");
        check_tensors("final_state", network, *final);
        checked("final_state", (*final)[0], {layers, -1, network.hidden});
    }
    const int64_t sequences = states ? (*final)[0].shape(1) : logits.shape(0);
    if (count < 1 || first < 0 || first + count > sequences)
        refuse("first: " + std::to_string(count) + " sequences from " + std::to_string(first) + " are not among " +
               std::to_string(sequences));
    for (int tensor = 0; tensor < network.states(); tensor++) {
        if (initial) {
            check_tensors("state", network, *initial);
            checked("state", (*initial)[tensor], {layers, sequences, network.hidden});
        }
        if (final) {
            check_tensors("final_state", network, *final);
            checked("final_state", (*final)[tensor], {layers, sequences, network.hidden});
        }
    }
    std::vector<Job> jobs(count);
    for (int64_t index = 0; index < count; index++) {
        Job& job = jobs[index];
        const int64_t begin = offsets[index], lane = first + index;
        if (begin < 0 || offsets[index + 1] > rows)
            refuse("offsets: from 0 to " + std::to_string(rows) + " expected");
        job.steps = checked_steps(offsets[index + 1] - begin);
        job.x = floats(values) + begin * values.stride(0);
        job.x_stride = values.stride(0);
        for (int tensor = 0; tensor < network.states(); tensor++) {
            if (initial) {
                job.initial[tensor] = floats((*initial)[tensor]) + lane * (*initial)[tensor].stride(1);
                job.initial_stride[tensor] = (*initial)[tensor].stride(0);
            }
            if (final) {
                job.final[tensor] = floats((*final)[tensor]) + lane * (*final)[tensor].stride(1);
                job.final_stride[tensor] = (*final)[tensor].stride(0);
            }
        }
        job.logits = floats(logits) + (states ? begin : lane) * logits.stride(0);
        if (states) {
            job.every_step = true;
            job.logits_stride = logits.stride(0);
            job.states = floats(*states) + begin * states->stride(0);
            job.states_stride = states->stride(0);
        }
    }
    const int64_t ticket = self.queue.submit(jobs);
    self.kept.emplace(ticket, KeepingQueue::Arrays{values, initial, final, states, logits});
    return ticket;
}

// Timesteps, and the ended sequences as (ticket, outcome, count), with one entry for consecutive ones of a ticket.
std::pair<int64_t, std::vector<std::tuple<int64_t, int, int64_t>>> advance(KeepingQueue& self, int64_t budget, int64_t rounds) {
    if (budget < 1) refuse("budget: at least 1 step expected, got " + std::to_string(budget));
    if (rounds < 1) refuse("rounds: at least 1 expected, got " + std::to_string(rounds));
    std::vector<Ended> ended;
    int64_t ran;
    {
        const nb::gil_scoped_release released;
        ran = self.queue.advance(budget, rounds, ended);
    }
    std::vector<std::tuple<int64_t, int, int64_t>> outcomes;
    for (const Ended& each : ended) {
        if (each.last) self.kept.erase(each.ticket);
        const int outcome = static_cast<int>(each.outcome);
        if (outcomes.empty() || std::get<0>(outcomes.back()) != each.ticket || std::get<1>(outcomes.back()) != outcome)
            outcomes.emplace_back(each.ticket, outcome, 0);
        std::get<2>(outcomes.back())++;
    }
    return {ran, std::move(outcomes)};
}

nb::ndarray<nb::numpy, float> activation(void (*Isa::*function)(const float*, float*, int64_t), const Input& x, const std::string& isa) {
    const float* data = contiguous("x", x, {-1});
    const size_t count = x.shape(0);
    std::unique_ptr<float[]> y(new float[count]);
    (isa_named(isa).*function)(data, y.get(), count);
    return owned(std::move(y), {count});
}

}  // namespace

NB_MODULE(_kernel, m) {
    // Objects that live until the process exits would print a page of warnings.
    nb::set_leak_warnings(false);
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Isa* isa : available_isas()) names.emplace_back(isa->name);
        return names;
    });
    m.def("tanh", [](const Input& x, const std::string& isa) { return activation(&Isa::tanh, x, isa); },
          nb::arg("x").noconvert(), nb::arg("isa") = "");
    m.def("sigmoid", [](const Input& x, const std::string& isa) { return activation(&Isa::sigmoid, x, isa); },
          nb::arg("x").noconvert(), nb::arg("isa") = "");
    m.def("pack", &pack, nb::arg("arrays"), nb::arg("features"));
    nb::class_<Network>(m, "Network")
        .def(nb::new_(&make_network), nb::arg("cell"), nb::arg("scale").none(), nb::arg("layers"), nb::arg("readout"),
             nb::arg("bias"), nb::arg("isa") = "")
        .def("run_one", &run_one, nb::arg("x").noconvert(), nb::arg("state").none().noconvert() = nb::none(),
             nb::arg("final_state").none().noconvert() = nb::none(), nb::arg("states").none().noconvert() = nb::none(),
             nb::arg("logits").none().noconvert() = nb::none())
        .def("run_lanes", &run_lanes, nb::arg("x").noconvert(), nb::arg("state").noconvert(),
             nb::arg("final_state").noconvert(), nb::arg("states").none().noconvert(), nb::arg("logits").noconvert())
        .def_prop_ro("isa", [](const Network& network) { return std::string(network.isa.name); })
        .def_prop_ro("input_size", [](const Network& network) { return network.inputs; })
        .def_prop_ro("hidden_size", [](const Network& network) { return network.hidden; })
        .def_prop_ro("output_size", [](const Network& network) { return network.outputs; })
        .def_prop_ro("num_layers", [](const Network& network) { return network.layers.size(); })
        .def_prop_ro("state_tensors", [](const Network& network) { return network.states(); });
    nb::class_<KeepingQueue>(m, "Queue")
        .def(nb::new_(&make_queue), nb::arg("network"), nb::arg("slots"), nb::arg("threads"))
        .def("submit", &submit, nb::arg("x").noconvert(), nb::arg("state").none().noconvert() = nb::none(),
             nb::arg("final_state").none().noconvert() = nb::none(), nb::arg("states").none().noconvert() = nb::none(),
             nb::arg("logits").none().noconvert() = nb::none(), nb::arg("deadline") = 0)
        .def("submit_batch", &submit_batch, nb::arg("values").noconvert(), nb::arg("offsets"), nb::arg("first"),
             nb::arg("state").none().noconvert(), nb::arg("final_state").none().noconvert(),
             nb::arg("logits").noconvert(), nb::arg("states").none().noconvert() = nb::none())
        .def("advance", &advance, nb::arg("budget"), nb::arg("rounds") = unbounded)
        .def("cancel", [](KeepingQueue& self, int64_t ticket) { return self.queue.cancel(ticket); }, nb::arg("ticket"))
        .def("__len__", [](const KeepingQueue& self) { return self.queue.size(); });
}
