// Concatenation of a caller's arrays.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <utility>

namespace unroll {

// Gives memory to a new numpy array.
template <class T>
nanobind::ndarray<nanobind::numpy, T> owned(std::unique_ptr<T[]> memory, std::initializer_list<size_t> shape) {
    T* const data = memory.release();
    return {data, shape, nanobind::capsule(data, [](void* all) noexcept { delete[] static_cast<T*>(all); })};
}

using PackedRows = std::pair<nanobind::ndarray<nanobind::numpy, float>, nanobind::ndarray<nanobind::numpy, int64_t>>;

// Concatenates arrays [steps, features]; returns them and the first row of each, and the end. None if one is not
// C-contiguous float32 with a step or more, or holds a NaN or an infinity.
std::optional<PackedRows> pack(const nanobind::tuple& arrays, int64_t features);

}  // namespace unroll
