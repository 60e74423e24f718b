#include "pack.hpp"

#include <vector>

#include "network.hpp"

namespace nb = nanobind;

namespace unroll {

namespace {

// The buffers of Python's objects, which can't be resized or freed meanwhile.
struct Buffers : std::vector<Py_buffer> {
    ~Buffers() {
        for (Py_buffer& each : *this) PyBuffer_Release(&each);
    }
    // Appends an object's buffer if it is C-contiguous float32 [1 or more, features], aligned.
    bool add(nb::handle object, nb::handle dtype, nb::handle float32, int64_t features) {
        const nb::object own = nb::steal(PyObject_GetAttr(object.ptr(), dtype.ptr()));
        Py_buffer view;
        if (!own.is(float32) || PyObject_GetBuffer(object.ptr(), &view, PyBUF_ND)) {
            PyErr_Clear();
            return false;
        }
        push_back(view);
        return view.ndim == 2 && view.shape[0] && view.shape[1] == features &&
               reinterpret_cast<uintptr_t>(view.buf) % alignof(float) == 0;
    }
};

}  // namespace

std::optional<PackedRows> pack(const nb::tuple& arrays, int64_t features) {
    const size_t count = arrays.size();
    if (available_isas().empty()) return std::nullopt;
    const nb::str dtype("dtype");
    const nb::object float32 = nb::module_::import_("numpy").attr(dtype)("float32");
    Buffers buffers;
    buffers.reserve(count);
    auto offsets = std::make_unique<int64_t[]>(count + 1);
    for (size_t index = 0; index < count; index++) {
        if (!buffers.add(arrays[index], dtype, float32, features)) return std::nullopt;
        offsets[index + 1] = offsets[index] + buffers.back().shape[0];
    }
    const size_t rows = offsets[count];
    std::unique_ptr<float[]> values(new float[rows * features]);
    const auto copy = available_isas()[0]->copy_finite;
    for (size_t index = 0; index < count; index++)
        if (!copy(static_cast<const float*>(buffers[index].buf), values.get() + offsets[index] * features,
                  buffers[index].len / sizeof(float)))
            return std::nullopt;
    return PackedRows(owned<float>(std::move(values), {rows, static_cast<size_t>(features)}),
                     owned<int64_t>(std::move(offsets), {count + 1}));
}

}  // namespace unroll
