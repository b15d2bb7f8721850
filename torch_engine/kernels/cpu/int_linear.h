// Linear layers in integers: activations int8 and weights int8 or int4, both with a scale for every 32 inputs.
//
// A group of 32 inputs has its own scale because a few activations are a hundred times larger than the
// others: with one scale for a row they would leave nothing of the rest. int8 weights are symmetric; int4
// weights are code * scale + minimum (symmetric int4 loses far more). Products and sums within a group are
// exact integers in every instruction set; the groups are added in float32, always in the same order.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "pool.h"
#include "vectors.h"

namespace {

constexpr int kGroup = 32;
constexpr int kColumns = 16;  // of a panel, whatever the vector width: the layout is the same everywhere
constexpr int kParts = kColumns / kLanes;

typedef int32_t Ints __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2)));

// One group of activations: x = scale * q. Codes stay within +-127, so that no sign flip overflows.
struct Group {
    float scale;
    float sum;  // scale * (q[0] + ... + q[31]), which multiplies the weights' minimum
    int8_t q[kGroup];
};

// A panel's group of weights: 16 scales in bfloat16 (int4: and 16 minima), then the codes. Four neighbouring
// inputs of a column lie together, column after column; of int4, inputs 16..31 are the high halves of 0..15.
struct Int4 {
    static constexpr int kCodes = 2 * kColumns * 2, kBytes = kCodes + kColumns * kGroup / 2;
};
struct Int8 {
    static constexpr int kCodes = kColumns * 2, kBytes = kCodes + kColumns * kGroup;
};

inline int64_t groups_of(int64_t k_size) { return (k_size + kGroup - 1) / kGroup; }

// x [k_size] -> groups, the last one filled up with zeros.
__attribute__((noinline)) inline void quantise(const float* x, int64_t k_size, Group* groups) {
    for (int64_t k = 0; k < k_size; k += kGroup, groups++) {
        const int64_t count = k_size - k < kGroup ? k_size - k : kGroup;
        float values[kGroup] = {};
        std::memcpy(values, x + k, count * sizeof(float));
        float largest = 0.f;
#pragma omp simd reduction(max : largest)
        for (int i = 0; i < kGroup; i++) largest = std::fabs(values[i]) > largest ? std::fabs(values[i]) : largest;
        const float inverse = largest > 0.f ? 127.f / largest : 0.f;
        int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < kGroup; i++) {
            const int32_t code = static_cast<int32_t>(std::nearbyint(values[i] * inverse));
            groups->q[i] = static_cast<int8_t>(code);
            sum += code;
        }
        groups->scale = largest / 127.f;
        groups->sum = groups->scale * static_cast<float>(sum);
    }
}

inline int32_t four(const int8_t* q) {
    int32_t word;
    std::memcpy(&word, q, 4);
    return word;
}

// sums[r] = products of one group of ROWS rows of activations (`stride` groups apart) with one panel's group.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(FL_LANES)

template <int ROWS>
inline void group_products(const Group* x, int64_t stride, const uint8_t* codes, Ints (&sums)[ROWS][kParts], Int4) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i sum[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) {
        const __m512i both = _mm512_loadu_si512(codes + s * 64);
        const __m512i first = _mm512_and_si512(both, low);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const int8_t* q = x[r * stride].q + s * 4;
            sum[r] = _mm512_dpbusd_epi32(sum[r], first, _mm512_set1_epi32(four(q)));
            sum[r] = _mm512_dpbusd_epi32(sum[r], second, _mm512_set1_epi32(four(q + 16)));
        }
    }
    for (int r = 0; r < ROWS; r++) sums[r][0] = reinterpret_cast<Ints>(sum[r]);
}

// The instruction wants one side unsigned: the activations are moved up by 128, and 128 times the weights
// taken off again.
template <int ROWS>
inline void group_products(const Group* x, int64_t stride, const uint8_t* codes, Ints (&sums)[ROWS][kParts], Int8) {
    const __m512i middle = _mm512_set1_epi8(-128);
    __m512i sum[ROWS], excess = _mm512_setzero_si512();
    for (int r = 0; r < ROWS; r++) sum[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int s = 0; s < 8; s++) {
        const __m512i weights = _mm512_loadu_si512(codes + s * 64);
        excess = _mm512_dpbusd_epi32(excess, middle, weights);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const __m512i value = _mm512_xor_si512(_mm512_set1_epi32(four(x[r * stride].q + s * 4)), middle);
            sum[r] = _mm512_dpbusd_epi32(sum[r], value, weights);
        }
    }
    for (int r = 0; r < ROWS; r++) sums[r][0] = reinterpret_cast<Ints>(_mm512_sub_epi32(sum[r], excess));
}

#elif defined(__AVX2__) && !defined(FL_LANES)

// Keeps a sum where it is: GCC would rather compute all products first, add them later, and spill what it has.
inline void pin(__m256i& sum) { asm("" : "+x"(sum)); }

// Eight pairs of 15 * 127 add up to 30,480, which an int16 holds: one widening a group.
template <int ROWS>
inline void group_products(const Group* x, int64_t stride, const uint8_t* codes, Ints (&sums)[ROWS][kParts], Int4) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i sum[ROWS][2];
    for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int s = 0; s < 4; s++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + s * 64));
            __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + s * 64 + 32));
            if (half) a = _mm256_srli_epi16(a, 4), b = _mm256_srli_epi16(b, 4);
            a = _mm256_and_si256(a, low), b = _mm256_and_si256(b, low);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const __m256i value = _mm256_set1_epi32(four(x[r * stride].q + half * 16 + s * 4));
                sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(a, value));
                sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(b, value));
                pin(sum[r][0]), pin(sum[r][1]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int p = 0; p < 2; p++) sums[r][p] = reinterpret_cast<Ints>(_mm256_madd_epi16(sum[r][p], ones));
    }
}

// A pair of |weight| * (activation with the weight's sign) stays within 2 * 127 * 127 = 32,258: no saturation.
template <int ROWS>
inline void group_products(const Group* x, int64_t stride, const uint8_t* codes, Ints (&sums)[ROWS][kParts], Int8) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[ROWS][2];
    for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int s = 0; s < 8; s++) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + s * 64 + p * 32));
            const __m256i size = _mm256_abs_epi8(weights);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const __m256i value = _mm256_sign_epi8(_mm256_set1_epi32(four(x[r * stride].q + s * 4)), weights);
                const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(size, value), ones);
                sum[r][p] = _mm256_add_epi32(sum[r][p], pairs);
                pin(sum[r][p]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int p = 0; p < 2; p++) sums[r][p] = reinterpret_cast<Ints>(sum[r][p]);
    }
}

#else

template <int ROWS, class Weights>
inline void group_products(const Group* x, int64_t stride, const uint8_t* codes, Ints (&sums)[ROWS][kParts], Weights) {
    int8_t weights[kGroup * kColumns];  // four inputs of a column, column after column
    if constexpr (std::is_same_v<Weights, Int4>) {
        constexpr int kHalf = kGroup * kColumns / 2;
        for (int i = 0; i < kHalf; i++) {
            weights[i] = codes[i] & 15;
            weights[kHalf + i] = codes[i] >> 4;
        }
    } else {
        std::memcpy(weights, codes, sizeof weights);
    }
    for (int r = 0; r < ROWS; r++) {
        int32_t sum[kColumns] = {};
        const int8_t* q = x[r * stride].q;
        for (int s = 0; s < kGroup / 4; s++) {
#pragma omp simd
            for (int c = 0; c < kColumns; c++) {
                for (int i = 0; i < 4; i++) sum[c] += weights[(s * kColumns + c) * 4 + i] * q[s * 4 + i];
            }
        }
        std::memcpy(sums[r], sum, sizeof sum);
    }
}

#endif

inline Floats widen(const uint8_t* bfloats) {
    const Halves halves = *reinterpret_cast<const Halves*>(bfloats);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

// y [ROWS, one panel] = x [ROWS, groups] w^T + bias.
template <int ROWS, class Weights>
inline void int_tile(const Group* x, int64_t groups, const uint8_t* w, const float* bias, float* y, int64_t y_stride,
                     int64_t columns) {
    Floats total[ROWS][kParts] = {};
    for (int64_t g = 0; g < groups; g++, w += Weights::kBytes) {
        Ints sums[ROWS][kParts];
        group_products<ROWS>(x + g, groups, w + Weights::kCodes, sums, Weights{});
#pragma GCC unroll 2
        for (int p = 0; p < kParts; p++) {
            const Floats scale = widen(w + p * kLanes * 2);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                total[r][p] += __builtin_convertvector(sums[r][p], Floats) * (scale * x[r * groups + g].scale);
            }
            if constexpr (std::is_same_v<Weights, Int4>) {
                const Floats minimum = widen(w + (kColumns + p * kLanes) * 2);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) total[r][p] += minimum * x[r * groups + g].sum;
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float out[kColumns];
        std::memcpy(out, total[r], sizeof out);
        for (int64_t c = 0; c < columns; c++) y[r * y_stride + c] = out[c] + (bias ? bias[c] : 0.f);
    }
}

template <int ROWS, class Weights>
inline void int_rows(int64_t rows, const Group* x, int64_t groups, const uint8_t* w, const float* bias, float* y,
                     int64_t y_stride, int64_t columns) {
    if (rows == ROWS) {
        int_tile<ROWS, Weights>(x, groups, w, bias, y, y_stride, columns);
    } else if constexpr (ROWS > 1) {
        int_rows<ROWS - 1, Weights>(rows, x, groups, w, bias, y, y_stride, columns);
    }
}

// y [m, n] = x [m, k] w^T + bias; bias may be null.
template <class Weights>
void int_linear(Pool& pool, const Group* x, int64_t m, int64_t k_size, const uint8_t* w, const float* bias, int64_t n,
                float* y) {
    constexpr int64_t kBlock = 48;  // rows whose activations stay in the cache while a piece of the weights passes
    const int64_t groups = groups_of(k_size), panels = (n + kColumns - 1) / kColumns;
    int64_t piece = panels / (pool.threads() * 8);
    piece = piece < 4 ? 4 : piece;
    pool.run((panels + piece - 1) / piece, m * n * k_size > kParallelWork, [&](int64_t i) {
        const int64_t end = (i + 1) * piece < panels ? (i + 1) * piece : panels;
        for (int64_t block = 0; block < m; block += kBlock) {
            const int64_t rows = m - block < kBlock ? m - block : kBlock, tiles = (rows + kRows - 1) / kRows;
            for (int64_t p = i * piece; p < end; p++) {
                const int64_t columns = n - p * kColumns < kColumns ? n - p * kColumns : kColumns;
                for (int64_t t = 0; t < tiles; t++) {
                    const int64_t from = block + rows * t / tiles, count = block + rows * (t + 1) / tiles - from;
                    int_rows<kRows, Weights>(count, x + from * groups, groups, w + p * groups * Weights::kBytes,
                                             bias ? bias + p * kColumns : nullptr, y + from * n + p * kColumns, n,
                                             columns);
                }
            }
        }
    });
}

// Rounds one group of one column of weights, `count` of them, to codes; returns scale and minimum through the panel.
template <class Weights>
inline void pack_group(const float* values, int64_t count, int column, uint8_t* panel) {
    float lowest = count ? values[0] : 0.f, highest = lowest;
    for (int64_t i = 1; i < count; i++) {
        lowest = values[i] < lowest ? values[i] : lowest;
        highest = values[i] > highest ? values[i] : highest;
    }
    constexpr bool kInt4 = std::is_same_v<Weights, Int4>;
    const float largest = std::fmax(std::fabs(lowest), std::fabs(highest));
    const uint16_t scale_bits = to_bfloat16(kInt4 ? (highest - lowest) / 15.f : largest / 127.f);
    const uint16_t minimum_bits = to_bfloat16(lowest);
    std::memcpy(panel + column * 2, &scale_bits, 2);
    if constexpr (kInt4) std::memcpy(panel + (kColumns + column) * 2, &minimum_bits, 2);
    const float scale = from_bfloat16(scale_bits), minimum = kInt4 ? from_bfloat16(minimum_bits) : 0.f;
    uint8_t* codes = panel + Weights::kCodes;
    for (int64_t i = 0; i < count; i++) {
        float code = scale > 0.f ? std::nearbyint((values[i] - minimum) / scale) : 0.f;
        code = std::fmin(std::fmax(code, kInt4 ? 0.f : -127.f), kInt4 ? 15.f : 127.f);
        if constexpr (kInt4) {
            uint8_t& byte = codes[i % 16 / 4 * 64 + column * 4 + i % 4];
            byte |= static_cast<uint8_t>(code) << (i < 16 ? 0 : 4);
        } else {
            codes[i / 4 * 64 + column * 4 + i % 4] = static_cast<uint8_t>(static_cast<int8_t>(code));
        }
    }
}

// w [n, k] float32 -> panels, one after the other; `packed` is zero before.
template <class Weights>
void pack_ints(Pool& pool, const float* w, int64_t n, int64_t k_size, uint8_t* packed) {
    const int64_t groups = groups_of(k_size), panels = (n + kColumns - 1) / kColumns;
    pool.run(panels, true, [&](int64_t p) {
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = g * kGroup, count = k_size - first < kGroup ? k_size - first : kGroup;
            for (int64_t c = 0; c < kColumns && p * kColumns + c < n; c++) {
                pack_group<Weights>(w + (p * kColumns + c) * k_size + first, count, c,
                                    packed + (p * groups + g) * Weights::kBytes);
            }
        }
    });
}

}  // namespace
