// Linear layers with float32 activations and bfloat16 weights.

#pragma once

#include "pool.h"
#include "vectors.h"

namespace {

// One tile of y = x w^T: ROWS rows of x times PANELS neighbouring panels. A word of a panel holds two
// columns, `kLanes` apart: the low half is one bfloat16, the high half the other.
template <int ROWS, int PANELS>
inline void tile(const float* x, int64_t k_size, const uint32_t* w, const float* bias, float* y,
                 int64_t y_stride, int64_t columns) {
    Floats sums[ROWS][PANELS][2] = {};
    for (int64_t k = 0; k < k_size; k++) {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) {
            const Words word = *reinterpret_cast<const Words*>(w + (p * k_size + k) * kLanes);
            const Floats low = reinterpret_cast<Floats>(word << 16);
            const Floats high = reinterpret_cast<Floats>(word & 0xffff0000u);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                const float value = x[r * k_size + k];
                sums[r][p][0] += value * low;
                sums[r][p][1] += value * high;
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int p = 0; p < PANELS; p++) {
            float out[kPanel];
            std::memcpy(out, sums[r][p], sizeof out);
            const int64_t first = p * kPanel;
            const int64_t count = columns - first < kPanel ? columns - first : kPanel;
            for (int64_t c = 0; c < count; c++) {
                y[r * y_stride + first + c] = out[c] + (bias ? bias[first + c] : 0.f);
            }
        }
    }
}

template <int ROWS>
inline void rows_of(int64_t rows, const float* x, int64_t k_size, const uint32_t* w, const float* bias, float* y,
                    int64_t y_stride, int64_t columns) {
    if (rows == ROWS) {
        tile<ROWS, 1>(x, k_size, w, bias, y, y_stride, columns);
    } else if constexpr (ROWS > 1) {
        rows_of<ROWS - 1>(rows, x, k_size, w, bias, y, y_stride, columns);
    }
}

}  // namespace
