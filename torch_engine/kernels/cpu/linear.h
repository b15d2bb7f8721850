// A linear layer of any precision, and how its work is shared out.

#pragma once

#include "float_linear.h"
#include "int_linear.h"
#include "pool.h"

namespace {

// Calls body with the kind of weights that has so many bits.
template <class Body>
auto with_bits(int64_t bits, const Body& body) {
    return bits == 4 ? body(Codes<4>{}) : bits == 7 ? body(Codes<7>{}) : body(Int8{});
}

// Weights as fl_pack or fl_pack_ints left them, or panels of float32 (32 bits). Mirrored in native.py.
struct Linear {
    const void* weights;
    const float* bias;  // null = none
    int64_t bits, inputs, outputs;

    bool integers() const { return bits < 16; }

    // Bytes of a row that it reads: groups, or float32.
    int64_t row_bytes() const { return integers() ? groups_of(inputs) * sizeof(Group) : inputs * sizeof(float); }

    int64_t panels() const {
        const int64_t width = integers() ? kColumns : kPanel;
        return (outputs + width - 1) / width;
    }

    int64_t bytes() const {
        if (!integers()) return panels() * kPanel * inputs * bits / 8;
        return with_bits(bits, [&](auto kind) { return panels() * panel_bytes<decltype(kind)>(inputs); });
    }

    // Panels [first, end) of y [rows, outputs] for x [rows], which is what the linear reads.
    void run(const void* x, int64_t rows, float* y, int64_t first, int64_t end) const {
        const auto* floats = static_cast<const float*>(x);
        if (bits == 32) return float_panels(floats, rows, inputs, static_cast<const float*>(weights), bias, outputs, y, first, end);
        if (bits == 16) return bfloat16_panels(floats, rows, inputs, static_cast<const uint32_t*>(weights), bias, outputs, y, first, end);
        with_bits(bits, [&](auto kind) {
            int_panels<decltype(kind)>(static_cast<const Group*>(x), rows, inputs, static_cast<const uint8_t*>(weights), bias,
                                       outputs, y, first, end);
        });
    }
};

// So many panels at a time that `panels` of them are shared out evenly, and each piece is worth claiming.
inline int64_t piece_of(const Pool& pool, int64_t panels) {
    constexpr int64_t kLeast = 4;  // which a single row of bfloat16 takes at once
    const int64_t piece = panels / (pool.threads() * 8);
    return piece < kLeast ? kLeast : piece / kLeast * kLeast;
}

// y [rows, outputs].
inline void run_linear(Pool& pool, const Linear& linear, const void* x, int64_t rows, float* y) {
    const int64_t panels = linear.panels(), piece = piece_of(pool, panels);
    pool.run((panels + piece - 1) / piece, rows * linear.outputs * linear.inputs > kParallelWork, [&](int64_t i) {
        linear.run(x, rows, y, i * piece, std::min((i + 1) * piece, panels));
    });
}

}  // namespace
