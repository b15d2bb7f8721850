// Linear layers in integers: activations int8, weights int8 or codes of a few bits, both with a scale for every 32 inputs.
//
// A group of 32 inputs has its own scale because a few activations are a hundred times larger than the
// others: with one scale for a row they would leave nothing of the rest. int8 weights are symmetric; the shorter
// codes are unsigned, code * scale + minimum (symmetric int4 loses far more). The scales of a column are themselves
// integers in a unit of the column. Products and sums within a group are exact integers in every instruction set;
// the groups are added in float32, always in the same order.

#pragma once

#include <algorithm>
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
typedef int16_t Shorts __attribute__((vector_size(kLanes * 2), aligned(2)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2)));

// One group of activations: x = scale * q. Codes stay within +-127, so that no sign flip overflows.
struct Group {
    float scale;
    float sum;  // scale * (q[0] + ... + q[31]), which multiplies the weights' minimum
    int8_t q[kGroup];
};

// A panel is 16 columns: their units in float32, then its groups. A group is 16 scales in int16, for codes 16 minima
// in bfloat16, then the weights: four neighbouring inputs of a column lie together, column after column; of 4-bit
// codes, inputs 16..31 are the high halves of 0..15.
template <int BITS>
struct Codes {
    static constexpr int kTop = (1 << BITS) - 1;
    static constexpr int kQuads = 32767 / (2 * 127 * kTop);  // fours of inputs whose products int16 pairs can add up
    static constexpr int kScales = std::min(32767, 2147483647 / (kGroup * 127 * kTop));  // the largest; sums stay in int32
    static constexpr int kWeights = 4 * kColumns, kBytes = kWeights + kColumns * kGroup * (BITS == 4 ? 4 : 8) / 8;
    static constexpr int kRows = kLanes == 16 ? 12 : BITS == 4 ? 6 : 4;  // of a tile: its sums fit the registers
};
struct Int8 {
    static constexpr int kTop = 127, kScales = 32767;
    static constexpr int kWeights = 2 * kColumns, kBytes = kWeights + kColumns * kGroup;
    static constexpr int kRows = kLanes == 16 ? 12 : 6;
};
constexpr int64_t kUnits = kColumns * sizeof(float);

inline int64_t groups_of(int64_t k_size) { return (k_size + kGroup - 1) / kGroup; }

inline void quantise_group(const float* x, Group* group) {
    float largest = 0.f;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < kGroup; i++) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    const float inverse = largest > 0.f ? 127.f / largest : 0.f;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < kGroup; i++) {
        const int32_t code = static_cast<int32_t>(std::nearbyint(x[i] * inverse));
        group->q[i] = static_cast<int8_t>(code);
        sum += code;
    }
    group->scale = largest / 127.f;
    group->sum = group->scale * static_cast<float>(sum);
}

// x [k_size] -> groups, the last one filled up with zeros.
__attribute__((noinline)) inline void quantise(const float* x, int64_t k_size, Group* groups) {
    const int64_t whole = k_size / kGroup, rest = k_size % kGroup;
    for (int64_t g = 0; g < whole; g++) quantise_group(x + g * kGroup, groups + g);
    if (rest == 0) return;
    float values[kGroup] = {};
    std::memcpy(values, x + whole * kGroup, rest * sizeof(float));
    quantise_group(values, groups + whole);
}

// The first input of the i-th four of a group, in the order in which codes of BITS bits are unpacked.
template <int BITS>
constexpr int input_of(int i) {
    return BITS == 4 ? i % 2 * 16 + i / 2 * 4 : i * 4;
}

inline int32_t four(const int8_t* q) {
    int32_t word;
    std::memcpy(&word, q, 4);
    return word;
}

inline Floats widen(const uint8_t* bfloats) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(FL_LANES)  // of which GCC makes ten instructions
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bfloats)));
    return reinterpret_cast<Floats>(_mm256_slli_epi32(words, 16));
#endif
    const Halves halves = *reinterpret_cast<const Halves*>(bfloats);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

inline Floats scales_of(const uint8_t* group, int part) {
    return __builtin_convertvector(reinterpret_cast<const Shorts*>(group)[part], Floats);
}

// out[r] = products of one group of ROWS rows of activations (`stride` groups apart) with one panel's group, times the
// weights' scales: the float32 nearest to an exact integer.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(FL_LANES)

template <int ROWS, int BITS>
inline void group_products(const Group* x, int64_t stride, const uint8_t* group, Floats (&out)[ROWS][kParts],
                           Codes<BITS>) {
    const uint8_t* codes = group + Codes<BITS>::kWeights;
    const __m512i low = _mm512_set1_epi8(15);
    __m512i sum[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m512i weights = _mm512_loadu_si512(codes + (BITS == 4 ? i / 2 : i) * 64);
        if (BITS == 4) weights = _mm512_and_si512(i % 2 ? _mm512_srli_epi16(weights, 4) : weights, low);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const int32_t values = four(x[r * stride].q + input_of<BITS>(i));
            sum[r] = _mm512_dpbusd_epi32(sum[r], weights, _mm512_set1_epi32(values));
        }
    }
    const Floats scales = scales_of(group, 0);
    for (int r = 0; r < ROWS; r++) out[r][0] = reinterpret_cast<Floats>(_mm512_cvtepi32_ps(sum[r])) * scales;
}

// The instruction wants one side unsigned: the activations are moved up by 128, and 128 times the weights
// taken off again.
template <int ROWS>
inline void group_products(const Group* x, int64_t stride, const uint8_t* group, Floats (&out)[ROWS][kParts], Int8) {
    const uint8_t* codes = group + Int8::kWeights;
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
    const Floats scales = scales_of(group, 0);
    for (int r = 0; r < ROWS; r++) {
        out[r][0] = reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r], excess))) * scales;
    }
}

#elif defined(__AVX2__) && !defined(FL_LANES)

// Keeps a sum where it is: GCC would rather compute all products first, add them later, and spill what it has.
inline void pin(__m256i& sum) { asm("" : "+x"(sum)); }

// sum += products of unsigned weights and signed values, in pairs. In one piece, so that the sum stays in its register.
inline void multiply_add(__m256i& sum, __m256i weights, __m256i values) {
    __m256i pairs;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(pairs) : "x"(weights), "x"(values));
}

inline __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

inline __m256i values_of(const Group& x, int input) { return _mm256_set1_epi32(four(x.q + input)); }

// The scales of columns 0..7 and 8..15, each twice: an int16 pair's sum in int32 is scaled as it is widened.
inline void pair_scales(const uint8_t* group, __m256i (&scales)[2]) {
    const __m256i all = _mm256_permute4x64_epi64(load(group), 0xd8);
    scales[0] = _mm256_unpacklo_epi16(all, all), scales[1] = _mm256_unpackhi_epi16(all, all);
}

template <int ROWS>
inline void group_products(const Group* x, int64_t stride, const uint8_t* group, Floats (&out)[ROWS][kParts], Codes<4>) {
    const uint8_t* codes = group + Codes<4>::kWeights;
    const __m256i low = _mm256_set1_epi8(15);
    __m256i sum[ROWS][2], scales[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m256i a = load(codes + i / 2 * 64), b = load(codes + i / 2 * 64 + 32);
        if (i % 2) a = _mm256_srli_epi16(a, 4), b = _mm256_srli_epi16(b, 4);
        a = _mm256_and_si256(a, low), b = _mm256_and_si256(b, low);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m256i values = values_of(x[r * stride], input_of<4>(i));
            if (i == 0) {
                sum[r][0] = _mm256_maddubs_epi16(a, values), sum[r][1] = _mm256_maddubs_epi16(b, values);
            } else {
                multiply_add(sum[r][0], a, values), multiply_add(sum[r][1], b, values);
            }
        }
    }
    pair_scales(group, scales);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        for (int p = 0; p < 2; p++) {
            out[r][p] = reinterpret_cast<Floats>(_mm256_cvtepi32_ps(_mm256_madd_epi16(sum[r][p], scales[p])));
        }
    }
}

template <int ROWS, int BITS>
inline void group_products(const Group* x, int64_t stride, const uint8_t* group, Floats (&out)[ROWS][kParts],
                           Codes<BITS>) {
    static_assert(Codes<BITS>::kQuads == 1);
    const uint8_t* codes = group + Codes<BITS>::kWeights;
    __m256i sum[ROWS][2], scales[2];
    pair_scales(group, scales);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m256i weights[2] = {load(codes + i * 64), load(codes + i * 64 + 32)};
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m256i values = values_of(x[r * stride], i * 4);
            for (int p = 0; p < 2; p++) {
                const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(weights[p], values), scales[p]);
                sum[r][p] = i ? _mm256_add_epi32(sum[r][p], pairs) : pairs;
                pin(sum[r][p]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int p = 0; p < 2; p++) out[r][p] = reinterpret_cast<Floats>(_mm256_cvtepi32_ps(sum[r][p]));
    }
}

// A pair of |weight| * (activation with the weight's sign) stays within 2 * 127 * 127 = 32,258: no saturation.
template <int ROWS>
inline void group_products(const Group* x, int64_t stride, const uint8_t* group, Floats (&out)[ROWS][kParts], Int8) {
    const uint8_t* codes = group + Int8::kWeights;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[ROWS][2];
    for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int s = 0; s < 8; s++) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
            const __m256i weights = load(codes + s * 64 + p * 32), size = _mm256_abs_epi8(weights);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const __m256i value = _mm256_sign_epi8(values_of(x[r * stride], s * 4), weights);
                const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(size, value), ones);
                sum[r][p] = _mm256_add_epi32(sum[r][p], pairs);
                pin(sum[r][p]);
            }
        }
    }
    for (int p = 0; p < 2; p++) {
        const Floats scales = scales_of(group, p);
        for (int r = 0; r < ROWS; r++) {
            out[r][p] = reinterpret_cast<Floats>(_mm256_cvtepi32_ps(sum[r][p])) * scales;
        }
    }
}

#else

inline void unpack(const uint8_t* codes, int8_t* weights, Codes<4>) {
    constexpr int kHalf = kGroup * kColumns / 2;
    for (int i = 0; i < kHalf; i++) {
        weights[i] = codes[i] & 15;
        weights[kHalf + i] = codes[i] >> 4;
    }
}

template <class Weights>
inline void unpack(const uint8_t* codes, int8_t* weights, Weights) {
    std::memcpy(weights, codes, kGroup * kColumns);
}

template <int ROWS, class Weights>
inline void group_products(const Group* x, int64_t stride, const uint8_t* group, Floats (&out)[ROWS][kParts],
                           Weights kind) {
    int8_t weights[kGroup * kColumns];  // four inputs of a column, column after column
    unpack(group + Weights::kWeights, weights, kind);
    for (int r = 0; r < ROWS; r++) {
        int32_t sum[kColumns] = {};
        const int8_t* q = x[r * stride].q;
        for (int s = 0; s < kGroup / 4; s++) {
#pragma omp simd
            for (int c = 0; c < kColumns; c++) {
                for (int i = 0; i < 4; i++) sum[c] += weights[(s * kColumns + c) * 4 + i] * q[s * 4 + i];
            }
        }
        for (int p = 0; p < kParts; p++) {
            const Ints part = *reinterpret_cast<const Ints*>(sum + p * kLanes);
            out[r][p] = __builtin_convertvector(part, Floats) * scales_of(group, p);
        }
    }
}

#endif

// y [ROWS, one panel] = x [ROWS, groups] w^T + bias.
template <int ROWS, class Weights>
inline void int_tile(const Group* x, int64_t groups, const uint8_t* w, const float* bias, float* y, int64_t y_stride,
                     int64_t columns) {
    const Floats* units = reinterpret_cast<const Floats*>(w);
    Floats total[ROWS][kParts] = {};
    w += kUnits;
    for (int64_t g = 0; g < groups; g++, w += Weights::kBytes) {
        Floats products[ROWS][kParts];
        group_products<ROWS>(x + g, groups, w, products, Weights{});
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 2
            for (int p = 0; p < kParts; p++) {
                total[r][p] += products[r][p] * x[r * groups + g].scale;
                if constexpr (!std::is_same_v<Weights, Int8>) {
                    total[r][p] += widen(w + (kColumns + p * kLanes) * 2) * x[r * groups + g].sum;
                }
            }
        }
    }
    for (int r = 0; r < ROWS; r++, y += y_stride) {
        float out[kColumns], *to = columns == kColumns ? y : out;
        for (int p = 0; p < kParts; p++) *reinterpret_cast<Floats*>(to + p * kLanes) = total[r][p] * units[p];
        if (columns < kColumns) std::memcpy(y, out, columns * sizeof(float));
        if (bias) {
            for (int64_t c = 0; c < columns; c++) y[c] += bias[c];
        }
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

// Bytes of a panel.
template <class Weights>
constexpr int64_t panel_bytes(int64_t k_size) {
    return kUnits + groups_of(k_size) * Weights::kBytes;
}

// Panels [first, end) of y [m, n] = x [m, k] w^T + bias; bias may be null.
template <class Weights>
void int_panels(const Group* x, int64_t m, int64_t k_size, const uint8_t* w, const float* bias, int64_t n, float* y,
                int64_t first, int64_t end) {
    constexpr int64_t kBlock = 48;  // rows whose activations stay in the cache while a piece of the weights passes
    constexpr int kRows = Weights::kRows;
    const int64_t groups = groups_of(k_size), panel = panel_bytes<Weights>(k_size);
    for (int64_t block = 0; block < m; block += kBlock) {
        const int64_t rows = m - block < kBlock ? m - block : kBlock, tiles = (rows + kRows - 1) / kRows;
        for (int64_t p = first; p < end; p++) {
            const int64_t columns = n - p * kColumns < kColumns ? n - p * kColumns : kColumns;
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t from = block + rows * t / tiles, count = block + rows * (t + 1) / tiles - from;
                int_rows<kRows, Weights>(count, x + from * groups, groups, w + p * panel,
                                         bias ? bias + p * kColumns : nullptr, y + from * n + p * kColumns, n, columns);
            }
        }
    }
}

// Smallest and largest of `count` numbers; at least 0 where a column has none.
struct Range {
    float low, high;

    Range(const float* values, int64_t count) : low(count ? values[0] : 0.f), high(low) {
        for (int64_t i = 1; i < count; i++) {
            low = values[i] < low ? values[i] : low;
            high = values[i] > high ? values[i] : high;
        }
    }

    // What one code is worth.
    template <class Weights>
    float step() const {
        constexpr bool kSigned = std::is_same_v<Weights, Int8>;
        return (kSigned ? std::fmax(std::fabs(low), std::fabs(high)) : high - low) / Weights::kTop;
    }
};

// The code of input `i` of a group's column, in place; the group's codes are zero before.
template <class Weights>
inline void put_code(uint8_t* codes, int64_t i, int64_t column, uint8_t code) {
    if constexpr (std::is_same_v<Weights, Codes<4>>) {
        codes[i % 16 / 4 * 64 + column * 4 + i % 4] |= static_cast<uint8_t>(code << (i < 16 ? 0 : 4));
    } else {
        codes[i / 4 * 64 + column * 4 + i % 4] = code;
    }
}

// Rounds one group of one column of weights, `count` of them, to codes.
template <class Weights>
inline void pack_group(const float* values, int64_t count, float unit, int column, uint8_t* group) {
    constexpr bool kSigned = std::is_same_v<Weights, Int8>;
    const Range range(values, count);
    const float parts = unit > 0.f ? std::nearbyint(range.step<Weights>() / unit) : 0.f;
    const int16_t scale_code = static_cast<int16_t>(parts);
    std::memcpy(group + column * 2, &scale_code, 2);
    float minimum = 0.f;
    if constexpr (!kSigned) {
        const uint16_t minimum_bits = to_bfloat16(unit > 0.f ? range.low / unit : 0.f);
        std::memcpy(group + (kColumns + column) * 2, &minimum_bits, 2);
        minimum = from_bfloat16(minimum_bits) * unit;
    }
    const float scale = parts * unit;
    uint8_t* codes = group + Weights::kWeights;
    for (int64_t i = 0; i < count; i++) {
        float code = scale > 0.f ? std::nearbyint((values[i] - minimum) / scale) : 0.f;
        code = std::fmin(std::fmax(code, kSigned ? -127.f : 0.f), Weights::kTop);
        put_code<Weights>(codes, i, column, static_cast<uint8_t>(static_cast<int8_t>(code)));
    }
}

// w [n, k] float32 -> panels, one after the other; `packed` is zero before.
template <class Weights>
void pack_ints(Pool& pool, const float* w, int64_t n, int64_t k_size, uint8_t* packed) {
    const int64_t groups = groups_of(k_size), panels = (n + kColumns - 1) / kColumns;
    const auto count = [&](int64_t g) { return std::min<int64_t>(k_size - g * kGroup, kGroup); };
    pool.run(panels, true, [&](int64_t p) {
        uint8_t* panel = packed + p * (kUnits + groups * Weights::kBytes);
        for (int64_t c = 0; c < kColumns && p * kColumns + c < n; c++) {
            const float* column = w + (p * kColumns + c) * k_size;
            float largest = 0.f;
            for (int64_t g = 0; g < groups; g++) {
                largest = std::fmax(largest, Range(column + g * kGroup, count(g)).step<Weights>());
            }
            const float unit = largest / Weights::kScales;
            std::memcpy(panel + c * sizeof(float), &unit, sizeof unit);
            for (int64_t g = 0; g < groups; g++) {
                pack_group<Weights>(column + g * kGroup, count(g), unit, c, panel + kUnits + g * Weights::kBytes);
            }
        }
    });
}

// Codes that are given, [n, k] bytes of 4 or 7 bits (unsigned) or int8, with a scale and a minimum (null = none) for
// `group` inputs each, [n, groups of k], a whole number of ours -> panels; `packed` is zero before. Codes stay as they
// are; scales are rounded to the column's unit, minima to bfloat16.
template <class Weights>
void pack_codes(Pool& pool, const uint8_t* w, const float* scales, const float* minima, int64_t n, int64_t k_size,
                int64_t group, uint8_t* packed) {
    const int64_t groups = groups_of(k_size), panels = (n + kColumns - 1) / kColumns;
    const int64_t theirs = (k_size + group - 1) / group;
    pool.run(panels, true, [&](int64_t p) {
        uint8_t* panel = packed + p * (kUnits + groups * Weights::kBytes);
        for (int64_t c = 0; c < kColumns && p * kColumns + c < n; c++) {
            const int64_t row = p * kColumns + c;
            float largest = 0.f;
            for (int64_t g = 0; g < theirs; g++) largest = std::fmax(largest, std::fabs(scales[row * theirs + g]));
            const float unit = largest / Weights::kScales;
            std::memcpy(panel + c * sizeof(float), &unit, sizeof unit);
            if (!(unit > 0.f)) continue;
            for (int64_t g = 0; g < groups; g++) {
                uint8_t* to = panel + kUnits + g * Weights::kBytes;
                const int64_t at = row * theirs + g * kGroup / group;
                const int16_t scale = static_cast<int16_t>(std::nearbyint(scales[at] / unit));
                std::memcpy(to + c * 2, &scale, 2);
                if constexpr (!std::is_same_v<Weights, Int8>) {
                    const uint16_t minimum = to_bfloat16(minima[at] / unit);
                    std::memcpy(to + (kColumns + c) * 2, &minimum, 2);
                }
                const int64_t count = std::min<int64_t>(k_size - g * kGroup, kGroup);
                for (int64_t i = 0; i < count; i++) {
                    put_code<Weights>(to + Weights::kWeights, i, c, w[row * k_size + g * kGroup + i]);
                }
            }
        }
    });
}

}  // namespace
