// Vector types and float32 arithmetic that the kernels share.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(FL_LANES)  // tests: another width than the machine's
constexpr int kLanes = FL_LANES;
#elif defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kRows = kLanes == 16 ? 12 : 6;  // of one tile: two sums a row, two weights and a broadcast fit the registers
constexpr int kPanel = 2 * kLanes;

typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4), aligned(4)));

constexpr int64_t kParallelWork = 1 << 15;  // below, starting the other threads costs more than it saves

// y [ROWS, one panel] (+)= x [ROWS, k_size] w [k_size, one panel], all float32.
template <int ROWS>
inline void float_tile(const float* x, int64_t x_stride, int64_t k_size, const float* w, int64_t w_stride, float* y,
                       int64_t y_stride, bool add) {
    Floats sums[ROWS][2] = {};
    if (add) {
        for (int r = 0; r < ROWS; r++) {
            sums[r][0] = *reinterpret_cast<const Floats*>(y + r * y_stride);
            sums[r][1] = *reinterpret_cast<const Floats*>(y + r * y_stride + kLanes);
        }
    }
    for (int64_t k = 0; k < k_size; k++) {
        const Floats low = *reinterpret_cast<const Floats*>(w + k * w_stride);
        const Floats high = *reinterpret_cast<const Floats*>(w + k * w_stride + kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const float value = x[r * x_stride + k];
            sums[r][0] += value * low;
            sums[r][1] += value * high;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        *reinterpret_cast<Floats*>(y + r * y_stride) = sums[r][0];
        *reinterpret_cast<Floats*>(y + r * y_stride + kLanes) = sums[r][1];
    }
}

template <int ROWS>
inline void float_rows(int64_t rows, const float* x, int64_t x_stride, int64_t k_size, const float* w, int64_t w_stride,
                       float* y, int64_t y_stride, bool add) {
    if (rows == ROWS) {
        float_tile<ROWS>(x, x_stride, k_size, w, w_stride, y, y_stride, add);
    } else if constexpr (ROWS > 1) {
        float_rows<ROWS - 1>(rows, x, x_stride, k_size, w, w_stride, y, y_stride, add);
    }
}

// y [rows, columns] (+)= x [rows, k_size] w [k_size, columns]; columns in whole panels.
__attribute__((noinline)) void float_product(int64_t rows, const float* x, int64_t x_stride, int64_t k_size, const float* w,
                          int64_t w_stride, int64_t columns, float* y, int64_t y_stride, bool add) {
    for (int64_t c = 0; c < columns; c += kPanel) {
        for (int64_t r = 0; r < rows; r += kRows) {
            float_rows<kRows>(rows - r < kRows ? rows - r : kRows, x + r * x_stride, x_stride, k_size, w + c, w_stride,
                              y + r * y_stride + c, y_stride, add);
        }
    }
}

// e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of r (Cephes' coefficients); x is cut to [-87, 88].
// Adding 1.5 * 2^23 rounds to an integer, which is then in the sum's low bits.
inline Floats fast_exp(Floats x) {
    constexpr float kRound = 12582912.f;
    const Floats least = Floats{} - 87.f, most = Floats{} + 88.f;
    x = x > most ? most : x;
    x = x < least ? least : x;
    const Floats shifted = x * 1.44269504f + kRound, n = shifted - kRound;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const Words power = ((Words)shifted << 23) + (127u << 23);
    return p * (Floats)power;
}

// The nearest integers; what is left of x is what they lose.
inline Integers round_off(Floats& x) {
#if defined(__AVX512DQ__) && !defined(FL_LANES)
    const Integers nearest = (Integers)_mm512_cvtps_epi32((__m512)x);
    x = _mm512_reduce_ps((__m512)x, 0);
    return nearest;
#else
    constexpr float kRound = 12582912.f;  // 1.5 * 2^23, whose sum with an integer has that in its low bits
    const Floats shifted = x + kRound;
    x -= shifted - kRound;
    return (Integers)(shifted) - 0x4b400000;
#endif
}

// 2^x for x <= 0; below -125 it is next to nothing. The polynomial is a minimax over [0, 1], of 18 bits.
inline Floats fast_exp2(Floats x) {
#if defined(__AVX512DQ__) && !defined(FL_LANES)
    const Floats r = _mm512_reduce_ps((__m512)x, 1);  // x - floor x
#else
    const Floats least = Floats{} - 125.f;
    x = x < least ? least : x;
    Floats r = x - 0.5f;
    const Integers floor = round_off(r);
    r += 0.5f;
#endif
    Floats p = Floats{} + 1.34266972e-2f;
    p = p * r + 5.22424511e-2f;
    p = p * r + 2.41280217e-1f;
    p = p * r + 6.93044843e-1f;
    p = p * r + 1.f;
#if defined(__AVX512DQ__) && !defined(FL_LANES)
    return _mm512_scalef_ps((__m512)p, (__m512)x);  // p 2^floor(x)
#else
    return (Floats)((Integers)p + (floor << 23));
#endif
}

inline float highest_of(Floats x) {
#if defined(__AVX512F__) && !defined(FL_LANES)
    return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__) && !defined(FL_LANES)
    __m128 high = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    high = _mm_max_ps(high, _mm_movehl_ps(high, high));
    return _mm_cvtss_f32(_mm_max_ss(high, _mm_movehdup_ps(high)));
#else
    float highest = x[0];
    for (int i = 1; i < kLanes; i++) highest = x[i] > highest ? x[i] : highest;
    return highest;
#endif
}

// A bit for each element that is at least `least`.
inline uint32_t at_least(Floats x, float least) {
#if defined(__AVX512F__) && !defined(FL_LANES)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_GE_OQ);
#elif defined(__AVX2__) && !defined(FL_LANES)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(least), _CMP_GE_OQ));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; i++) bits |= uint32_t{x[i] >= least} << i;
    return bits;
#endif
}

// to [n] = body of a [n] and b [n].
template <class Body>
inline void map(const float* a, const float* b, int64_t n, float* to, const Body& body) {
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) {
        *reinterpret_cast<Floats*>(to + c) =
            body(*reinterpret_cast<const Floats*>(a + c), *reinterpret_cast<const Floats*>(b + c));
    }
    if (c == n) return;
    Floats x = {}, y = {};
    std::memcpy(&x, a + c, (n - c) * sizeof(float));
    std::memcpy(&y, b + c, (n - c) * sizeof(float));
    x = body(x, y);
    std::memcpy(to + c, &x, (n - c) * sizeof(float));
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

}  // namespace
