// What happens to each row between the products: residual, norm, gated activation, and rounding to int8.

#pragma once

#include <cmath>

#include "int_linear.h"
#include "pool.h"
#include "vectors.h"

namespace {

// y = x / rms(x) * w over k elements.
__attribute__((noinline)) inline void rms_norm(const float* x, int64_t k_size, const float* w, float eps, float* y) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < k_size; k++) sum += x[k] * x[k];
    const float scale = 1.f / std::sqrt(sum / k_size + eps);
#pragma omp simd
    for (int64_t k = 0; k < k_size; k++) y[k] = x[k] * scale * w[k];
}

// Runs row(r, buffer of `size` floats) for every row; where the reader wants integers, rounds the buffer to
// groups in `out`, else `out` itself is the buffer.
template <class Row>
inline void for_reader(Pool& pool, int64_t rows, int64_t size, bool integers, void* out, const Row& row) {
    pool.run(rows, rows * size > kParallelWork, [&](int64_t r) {
        if (!integers) return row(r, static_cast<float*>(out) + r * size);
        thread_local std::vector<float> buffer;
        buffer.resize(size);
        row(r, buffer.data());
        quantise(buffer.data(), size, static_cast<Group*>(out) + r * groups_of(size));
    });
}

// x [rows, 2 n] -> out [rows, n]: activation of the first half times the second. gelu is its tanh form; with a clamp
// above 0 it is instead gate * sigmoid(1.702 gate) * (up + 1) of both clamped, the gate from above alone.
inline void gate_rows(Pool& pool, const float* x, int64_t rows, int64_t n, bool gelu, float clamp, bool integers, void* out) {
    for_reader(pool, rows, n, integers, out, [&](int64_t r, float* to) {
        const float *gate = x + r * 2 * n, *up = gate + n;
        if (clamp > 0.f) {
            const Floats most = Floats{} + clamp, least = Floats{} - clamp;
            map(gate, up, n, to, [&](Floats x, Floats y) {
                x = x < most ? x : most;
                y = y < most ? y : most;
                y = y > least ? y : least;
                return x / (1.f + fast_exp(-1.702f * x)) * (y + 1.f);
            });
        } else if (gelu) {  // 1 + tanh(u) = 2 / (1 + e^-2u)
            map(gate, up, n, to, [](Floats x, Floats y) {
                const Floats u = 0.7978845608f * (x + 0.044715f * x * x * x);
                return x / (1.f + fast_exp(-2.f * u)) * y;
            });
        } else {
            map(gate, up, n, to, [](Floats x, Floats y) { return x / (1.f + fast_exp(-x)) * y; });
        }
    });
}

}  // namespace
