// Checks tanh and sigmoid of every vector unit of this CPU on every float32 in [-20, 20] and on a grid beyond.
//
// Prints, for each function and unit, the largest error in ulp, the float where it is, and how often the function
// decreased; then how many pieces differ from the first unit's. The reference is libm in float64.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "network.hpp"

using unroll::Isa;

static float of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Returns the spacing of float32 at `exact`, the unit of errors.
static double ulp_at(double exact) {
    constexpr double smallest = std::numeric_limits<float>::min();
    uint64_t bits;
    const double size = std::fabs(exact) < smallest ? smallest : exact;
    std::memcpy(&bits, &size, sizeof bits);
    bits = (bits & 0x7ff0000000000000) - (uint64_t(23) << 52);
    double spacing;
    std::memcpy(&spacing, &bits, sizeof spacing);
    return spacing;
}

struct Result {
    double worst = 0;
    float at = 0;
    long decreases = 0, differences = 0, floats = 0;
};

struct Function {
    const char* name;
    double (*exact)(double);
    void (*Isa::*of)(const float*, float*, int64_t);
    // Most floats are tiny and need no libm: below `tiny` the result is `rounded(x)`, to a tenth of an ulp.
    float tiny;
    float (*rounded)(float);
};

static double sigmoid64(double x) { return 1 / (1 + std::exp(-x)); }

// Floats of one sign with bits first, first + stride, ... below last. Ascending order of the bits is descending order
// of the values where they are negative.
static void sweep(const Function& function, const std::vector<const Isa*>& isas, uint32_t sign, uint32_t first,
                  uint32_t last, uint32_t stride, std::vector<Result>& results) {
    constexpr int64_t piece = 4096;
    std::vector<float> x(piece), reference(piece), y(piece);
    std::vector<float> previous(isas.size(), NAN);
    for (uint64_t begin = first; begin < last; begin += piece * uint64_t(stride)) {
        int64_t count = 0;
        for (uint64_t bits = begin; bits < last && count < piece; bits += stride)
            x[count++] = of_bits(uint32_t(bits) | sign);
        for (size_t unit = 0; unit < isas.size(); unit++) {
            Result& result = results[unit];
            (isas[unit]->*function.of)(x.data(), y.data(), count);
            if (unit == 0) {
                reference = y;
                result.floats += count;
                bool tiny = std::fabs(x[count - 1]) < function.tiny;
                for (int64_t i = 0; i < count && tiny; i++) tiny = bits_of(y[i]) == bits_of(function.rounded(x[i]));
                if (tiny) previous[0] = y[count - 1];
                for (int64_t i = 0; i < count && !tiny; i++) {
                    const double exact = function.exact(x[i]), error = std::fabs(y[i] - exact) / ulp_at(exact);
                    if (!(error <= result.worst)) result.worst = error, result.at = x[i];
                    const float before = i ? y[i - 1] : previous[unit];
                    result.decreases += sign ? y[i] > before : y[i] < before;
                }
                previous[unit] = y[count - 1];
            }
            result.differences += std::memcmp(y.data(), reference.data(), count * sizeof(float)) != 0;
        }
    }
}

int main(int argc, char** argv) {
    const uint32_t stride = argc > 1 ? uint32_t(std::atoi(argv[1])) : 1;
    const std::vector<const Isa*> isas = unroll::available_isas();
    const Function functions[] = {
        {"tanh", std::tanh, &Isa::tanh, 0x1p-13f, [](float x) { return x; }},
        {"sigmoid", sigmoid64, &Isa::sigmoid, 0x1p-27f, [](float) { return 0.5f; }},
    };
    const uint32_t twenty = bits_of(20.0f), infinity = bits_of(INFINITY);
    for (const Function& function : functions) {
        std::vector<Result> totals(isas.size());
        for (uint32_t sign : {0u, 0x80000000u}) {
            // Pieces overlap by one float, so that no decrease hides between them.
            constexpr uint32_t cuts = 64;
            std::vector<std::vector<Result>> results(cuts + 1, std::vector<Result>(isas.size()));
            std::vector<std::thread> threads;
            for (uint32_t thread = 0; thread < 2; thread++)
                threads.emplace_back([&, thread] {
                    for (uint32_t cut = thread; cut < cuts; cut += 2) {
                        const uint32_t first = twenty / cuts * cut, last = cut + 1 == cuts ? twenty : first + twenty / cuts;
                        sweep(function, isas, sign, first, last + 1, stride, results[cut]);
                    }
                });
            for (std::thread& thread : threads) thread.join();
            sweep(function, isas, sign, twenty, infinity + 1, 64 * stride, results[cuts]);
            for (const auto& piece : results)
                for (size_t unit = 0; unit < isas.size(); unit++) {
                    Result &total = totals[unit], part = piece[unit];
                    if (part.worst > total.worst) total.worst = part.worst, total.at = part.at;
                    total.decreases += part.decreases;
                    total.differences += part.differences;
                    total.floats += part.floats;
                }
        }
        long differences = 0;
        for (const Result& total : totals) differences += total.differences;
        std::printf("%s units=%zu floats=%ld worst=%.4f at=%a decreases=%ld differences=%ld\n", function.name, isas.size(),
                    totals[0].floats, totals[0].worst, double(totals[0].at), totals[0].decreases, differences);
    }
}
