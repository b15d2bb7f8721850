// Linear layers with float32 activations; weights bfloat16, or float32 where rounding them would change a choice.

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

// Panels [first, end) of y [m, n] = x [m, k] w^T + bias; bias may be null.
void bfloat16_panels(const float* x, int64_t m, int64_t k_size, const uint32_t* packed, const float* bias, int64_t n,
                     float* y, int64_t first, int64_t end) {
    constexpr int kWide = 4;  // a single row needs more panels at once to keep the multipliers busy
    for (int64_t p = first; p < end;) {
        const uint32_t* w = packed + p * k_size * kLanes;
        const float* b = bias ? bias + p * kPanel : nullptr;
        float* out = y + p * kPanel;
        const int64_t columns = n - p * kPanel;
        if (m == 1 && p + kWide <= end) {
            tile<1, kWide>(x, k_size, w, b, out, n, columns);
            p += kWide;
            continue;
        }
        for (int64_t r = 0; r < m; r += kRows) {
            rows_of<kRows>(m - r < kRows ? m - r : kRows, x + r * k_size, k_size, w, b, out + r * n, n, columns);
        }
        p++;
    }
}

// The same for weights in float32: panels of [k, kPanel], one after the other.
void float_panels(const float* x, int64_t m, int64_t k_size, const float* packed, const float* bias, int64_t n, float* y,
                  int64_t first, int64_t end) {
    for (int64_t p = first; p < end; p++) {
        const int64_t columns = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
        for (int64_t r = 0; r < m; r += kRows) {
            const int64_t rows = m - r < kRows ? m - r : kRows;
            float out[kRows * kPanel];
            float_rows<kRows>(rows, x + r * k_size, k_size, k_size, packed + p * k_size * kPanel, kPanel, out, kPanel, false);
            for (int64_t i = 0; i < rows; i++) {
                float* to = y + (r + i) * n + p * kPanel;
                for (int64_t c = 0; c < columns; c++) to[c] = out[i * kPanel + c] + (bias ? bias[p * kPanel + c] : 0.f);
            }
        }
    }
}

}  // namespace
