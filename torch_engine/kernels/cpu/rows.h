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

}  // namespace
