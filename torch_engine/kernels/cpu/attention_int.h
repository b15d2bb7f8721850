// Attention over an int8 cache in integers: queries are rounded to 127 steps and weights to 255, each row with a scale
// of its own, and the products with keys and values are exact integers in every instruction set.
//
// Queries lose no more than the keys in the cache have lost. Of the weights many small ones add up to what one large one
// is, so what a weight loses by rounding is handed on to another one.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "attention_layer.h"
#include "int_linear.h"
#include "vectors.h"

namespace {

constexpr int kIntRows = kLanes == 16 ? 6 : 4;  // of one tile of products: its sums and what they read fit the registers
constexpr int kIntParts = kLanes == 16 ? 4 : 2;

typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(kLanes), aligned(1)));

// A lane of a product takes one word of each side, of neighbouring integers of the index that is summed over. This is
// two int16.
struct Pairs {
    using Code = int16_t;
    static constexpr int kCount = 2;

    // What a product with keys begins with, if the query's codes add up to `total`.
    static int32_t start(int32_t) { return 0; }

    static Ints step(Ints sum, Ints left, Ints right) {
#if defined(__AVX512VNNI__) && !defined(FL_LANES)
        return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
#elif defined(__AVX2__) && !defined(__AVX512F__) && !defined(FL_LANES)
        return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)left, (__m256i)right));
#else
        return sum + (left << 16 >> 16) * (right << 16 >> 16) + (left >> 16) * (right >> 16);
#endif
    }

    // The right side's words of kLanes columns, from their codes in kCount rows.
    static Ints weave(const int8_t* const* rows) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(FL_LANES)
        const auto bytes = [](const int8_t* row) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)); };
        return (Ints)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(bytes(rows[0]), bytes(rows[1])));
#else
        const auto wide = [](const int8_t* row) {
            return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(row), Shorts), Ints);
        };
        return (wide(rows[0]) & 0xffff) | wide(rows[1]) << 16;
#endif
    }
};

#if defined(__AVX512VNNI__) && !defined(FL_LANES)

// Four int8, of which the instruction wants one side unsigned. Keys are moved up by 128, and 128 times the query taken
// off again; weights have no sign.
struct Fours {
    static constexpr int kCount = 4;

    static Ints weave(const int8_t* const* rows) {
        const auto wide = [](const int8_t* row) {
            return __builtin_convertvector(
                __builtin_convertvector(*reinterpret_cast<const UnsignedBytes*>(row), Halves), Ints);
        };
        return wide(rows[0]) | wide(rows[1]) << 8 | wide(rows[2]) << 16 | wide(rows[3]) << 24;
    }
};

struct KeyWords : Fours {
    using Code = int8_t;

    static int32_t start(int32_t total) { return -128 * total; }

    static Ints step(Ints sum, Ints query, Ints keys) {
        return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)keys, (__m512i)query);
    }

    static Ints weave(const int8_t* const* rows) { return Fours::weave(rows) ^ static_cast<int32_t>(0x80808080); }
};

struct ValueWords : Fours {
    using Code = uint8_t;

    static Ints step(Ints sum, Ints weight, Ints values) {
        return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight, (__m512i)values);
    }
};

#else

using KeyWords = Pairs;
using ValueWords = Pairs;

#endif

// An array that begins where a cache line does: a vector that lies in two lines takes two loads.
template <class Element>
class Lines {
   public:
    void assign(int64_t count, Element value) {
        constexpr int64_t kOfLine = sizeof(Line) / sizeof(Element);
        Line line;
        std::fill_n(line.elements, kOfLine, value);
        lines_.assign((count + kOfLine - 1) / kOfLine, line);
    }

    Element& operator[](int64_t i) { return lines_.data()->elements[i]; }
    const Element& operator[](int64_t i) const { return lines_.data()->elements[i]; }

   private:
    struct alignas(64) Line {
        Element elements[64 / sizeof(Element)];
    };
    std::vector<Line> lines_;
};

// Words of `count` <= kLanes columns.
template <class Kind>
inline void weave(const int8_t* const* rows, int64_t count, int32_t* to) {
    if (count == kLanes) {
        *reinterpret_cast<Ints*>(to) = Kind::weave(rows);
        return;
    }
    int8_t copies[Kind::kCount][kLanes] = {};
    const int8_t* whole[Kind::kCount];
    for (int i = 0; i < Kind::kCount; i++) {
        std::memcpy(copies[i], rows[i], count);
        whole[i] = copies[i];
    }
    const Ints words = Kind::weave(whole);
    std::memcpy(to, &words, count * sizeof(int32_t));
}

// sums [ROWS, PARTS vectors] += left [ROWS, steps words] right [steps words, PARTS vectors].
template <class Kind, int ROWS, int PARTS>
inline void multiply(const typename Kind::Code* left, int64_t left_stride, int64_t steps, const int32_t* right,
                     int64_t right_stride, Ints (&sums)[ROWS][PARTS]) {
    for (int64_t k = 0; k < steps; k++) {
        Ints words[PARTS];
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) words[p] = *reinterpret_cast<const Ints*>(right + k * right_stride + p * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t word;
            std::memcpy(&word, left + r * left_stride + k * Kind::kCount, sizeof word);
            const Ints value = Ints{} + word;
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) sums[r][p] = Kind::step(sums[r][p], value, words[p]);
        }
    }
}

// Keys and values of one KV head at positions [at, at + kStretch) as words; what lies beyond the context is anything.
struct IntStretch {
    int64_t d, padded;
    int64_t key_steps;
    Lines<int32_t> keys, values;  // [key_steps, kStretch], [steps, padded]
    Lines<int8_t> nothing;        // zeros, in place of a key's or value's elements
    alignas(64) float key_scales[kStretch] = {}, value_scales[kStretch] = {};

    explicit IntStretch(int64_t size)
        : d(size),
          padded((d + kLanes - 1) / kLanes * kLanes),
          key_steps((d + KeyWords::kCount - 1) / KeyWords::kCount) {
        keys.assign(key_steps * kStretch, 0);
        values.assign(kStretch / ValueWords::kCount * padded, 0);
        nothing.assign(std::max(padded, kStretch), 0);
    }

    void load(const AttentionLayer& layer, const int64_t* table, int64_t head, int64_t at, int64_t width) {
        const int64_t bs = layer.block_size;
        const int8_t* tokens[kStretch];
        for (int64_t j = 0; j < width;) {
            const int64_t offset = (at + j) % bs, place = table[(at + j) / bs] * layer.kv_heads + head;
            const int64_t run = std::min(bs - offset, kStretch - j);
            const int8_t* block = static_cast<const int8_t*>(layer.cache) + place * 2 * bs * d;
            const float* scales = layer.scales + place * 2 * bs + offset;
            std::memcpy(key_scales + j, scales, run * sizeof(float));
            std::memcpy(value_scales + j, scales + bs, run * sizeof(float));
            load_keys(block + offset, bs, j, run);
            for (int64_t t = 0; t < run; t++) tokens[j + t] = block + (bs + offset + t) * d;
            j += run;
        }
        load_values(tokens, width);
    }

   private:
    void load_keys(const int8_t* block, int64_t bs, int64_t at, int64_t run) {
        for (int64_t k = 0; k < key_steps; k++) {
            const int8_t* rows[KeyWords::kCount];
            for (int64_t t = 0; t < run; t += kLanes) {
                for (int i = 0; i < KeyWords::kCount; i++) {
                    const int64_t element = k * KeyWords::kCount + i;
                    rows[i] = element < d ? block + element * bs + t : &nothing[0];
                }
                weave<KeyWords>(rows, std::min<int64_t>(run - t, kLanes), &keys[k * kStretch + at + t]);
            }
        }
    }

    void load_values(const int8_t* const* tokens, int64_t width) {
        for (int64_t j = 0; j < width; j += ValueWords::kCount) {
            const int8_t* rows[ValueWords::kCount];
            for (int64_t c = 0; c < d; c += kLanes) {
                for (int i = 0; i < ValueWords::kCount; i++) rows[i] = (j + i < width ? tokens[j + i] : &nothing[0]) + c;
                weave<ValueWords>(rows, std::min<int64_t>(d - c, kLanes), &values[j / ValueWords::kCount * padded + c]);
            }
        }
    }
};

inline auto narrow(Ints codes) {
#if defined(__AVX512VNNI__) && !defined(FL_LANES)
    typedef uint8_t Codes __attribute__((vector_size(kLanes)));
    return (Codes)_mm512_cvtepi32_epi8((__m512i)codes);
#else
    return __builtin_convertvector(codes, Shorts);
#endif
}

// One query in the course of its keys. Scores are in units of ln 2, whose powers of two are the weights.
struct IntRow {
    float scale;   // of its codes, times the layer's
    int32_t start; // of its products with keys
    float highest = -1e30f;
    Floats total = {};
};

// What a code of a row's weights is worth, and by how much the weights before have faded.
struct Share {
    float scale, fade;
};

// The products of a row with a stretch's keys -> codes of its weights, times the values' scales; unless it sees ALL keys,
// those outside [low, high) have none.
template <bool ALL>
inline Share share_out(const int32_t* products, const IntStretch& stretch, int32_t low, int32_t high, float softcap,
                       IntRow& row, ValueWords::Code* codes) {
    constexpr float kTop = 254.f;  // and half of one more that is handed on
    constexpr int kVectors = kStretch / kLanes;
    typedef ValueWords::Code Codes __attribute__((vector_size(kLanes * sizeof(ValueWords::Code)), aligned(1)));
    const auto or_else = [&](Floats value, float nothing, int vector) {
        if constexpr (ALL) return value;
        Integers number;
        for (int i = 0; i < kLanes; i++) number[i] = vector * kLanes + i;
        return (number >= low) & (number < high) ? value : Floats{} + nothing;
    };
    const float unit = softcap > 0.f ? 1.f : row.scale, before = row.highest;
    Floats weights[kVectors], highest = Floats{} - 1e30f, largest = {}, sum = {}, rest = {};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
        const Ints product = *reinterpret_cast<const Ints*>(products + v * kLanes);
        const Floats scales = *reinterpret_cast<const Floats*>(stretch.key_scales + v * kLanes);
        Floats score = __builtin_convertvector(product, Floats) * scales;
        if (softcap > 0.f) score = softcap - 2.f * softcap / (1.f + fast_exp(score * (2.f * row.scale / softcap)));  // tanh
        weights[v] = or_else(score, -1e30f, v);
        highest = highest > weights[v] ? highest : weights[v];
    }
    row.highest = std::max(before, highest_of(highest) * unit);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
        const Floats weight = or_else(fast_exp2(weights[v] * unit - row.highest), 0.f, v);
        sum += weight;
        weights[v] = weight * *reinterpret_cast<const Floats*>(stretch.value_scales + v * kLanes);
        largest = largest > weights[v] ? largest : weights[v];
    }
    const float most = highest_of(largest), inverse = most > 0.f ? kTop / most : 0.f;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
        rest += weights[v] * inverse;
        *reinterpret_cast<Codes*>(codes + v * kLanes) = narrow(round_off(rest));
    }
    float fade = 1.f;
    if (row.highest > before) {
        fade = std::exp2(before - row.highest);
        row.total *= fade;
    }
    row.total += sum;
    return {most / kTop, fade};
}

// `tokens` neighbouring rows of one chunk, all queries of one KV head. `own` is the first token's position. As
// attend_tile of attention_float.h, with the queries in groups that stay in registers from scores to sums.
struct IntTile {
    const AttentionLayer& layer;
    IntStretch& stretch;
    int64_t own, group;
    std::vector<KeyWords::Code>& queries;  // [rows, key_steps words]
    std::vector<IntRow>& rows;
    Lines<float>& sums;  // [rows, padded]

    void read(const float* q, int64_t stride, int64_t head) {
        const int64_t d = layer.d, size = stretch.key_steps * KeyWords::kCount;
        queries.assign(rows.size() * size, 0);
        sums.assign(rows.size() * stretch.padded, 0.f);
        for (int64_t r = 0; r < static_cast<int64_t>(rows.size()); r++) {
            const float* from = q + r / group * stride + (head * group + r % group) * d;
            KeyWords::Code* codes = &queries[r * size];
            float largest = 0.f;
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < d; i++) largest = std::fabs(from[i]) > largest ? std::fabs(from[i]) : largest;
            const float inverse = largest > 0.f ? 127.f / largest : 0.f;
            int32_t total = 0;
#pragma omp simd reduction(+ : total)
            for (int64_t i = 0; i < d; i++) {
                const int32_t code = static_cast<int32_t>(std::nearbyint(from[i] * inverse));
                codes[i] = static_cast<KeyWords::Code>(code);
                total += code;
            }
            rows[r] = IntRow{largest / 127.f * layer.scale * 1.44269504f, KeyWords::start(total)};
        }
    }

    void meet(int64_t at, int64_t width) {
        const int64_t count = rows.size();
        for (int64_t r = 0; r < count; r += kIntRows) meet_rows<kIntRows>(std::min<int64_t>(count - r, kIntRows), r, at, width);
    }

   private:
    template <int ROWS>
    void meet_rows(int64_t count, int64_t first, int64_t at, int64_t width) {
        if (count == ROWS) {
            meet_exactly<ROWS>(first, at, width);
        } else if constexpr (ROWS > 1) {
            meet_rows<ROWS - 1>(count, first, at, width);
        }
    }

    template <int ROWS>
    void meet_exactly(int64_t first, int64_t at, int64_t width) {
        const int64_t size = stretch.key_steps * KeyWords::kCount, padded = stretch.padded;
        alignas(64) int32_t products[ROWS][kStretch];
        alignas(64) ValueWords::Code codes[ROWS][kStretch];
        float scales[ROWS];
        for (int64_t c = 0; c < kStretch; c += kIntParts * kLanes) {
            Ints part[ROWS][kIntParts];
            for (int r = 0; r < ROWS; r++) {
                for (int p = 0; p < kIntParts; p++) part[r][p] = Ints{} + rows[first + r].start;
            }
            multiply<KeyWords>(&queries[first * size], size, stretch.key_steps, &stretch.keys[c], kStretch, part);
            for (int r = 0; r < ROWS; r++) {
                for (int p = 0; p < kIntParts; p++) *reinterpret_cast<Ints*>(&products[r][c + p * kLanes]) = part[r][p];
            }
        }
        const int64_t window = layer.window;
        const float softcap = layer.softcap * 1.44269504f;
        for (int r = 0; r < ROWS; r++) {
            const int64_t position = own + (first + r) / group;
            const int32_t low = window ? position - window + 1 - at : 0, high = position - at + 1;
            const auto weights = low <= 0 && high >= kStretch ? share_out<true> : share_out<false>;
            const Share share = weights(products[r], stretch, low, high, softcap, rows[first + r], codes[r]);
            scales[r] = share.scale;
            if (share.fade == 1.f) continue;
            for (int64_t i = 0; i < padded; i++) sums[(first + r) * padded + i] *= share.fade;
        }
        const int64_t steps = (width + ValueWords::kCount - 1) / ValueWords::kCount;
        int64_t c = 0;
        for (; c + kIntParts * kLanes <= padded; c += kIntParts * kLanes) add<ROWS, kIntParts>(codes[0], steps, scales, first, c);
        for (; c < padded; c += kLanes) add<ROWS, 1>(codes[0], steps, scales, first, c);
    }

    // Adds the values of columns [c, c + PARTS vectors), by their weights.
    template <int ROWS, int PARTS>
    void add(const ValueWords::Code* codes, int64_t steps, const float* scales, int64_t first, int64_t c) {
        Ints part[ROWS][PARTS] = {};
        multiply<ValueWords>(codes, kStretch, steps, &stretch.values[c], stretch.padded, part);
        for (int r = 0; r < ROWS; r++) {
            float* to = &sums[(first + r) * stretch.padded + c];
            for (int p = 0; p < PARTS; p++) {
                *reinterpret_cast<Floats*>(to + p * kLanes) += __builtin_convertvector(part[r][p], Floats) * scales[r];
            }
        }
    }
};

inline void attend_int_tile(const AttentionLayer& layer, const float* q, int64_t stride, const int64_t* table,
                            int64_t head, int64_t own, int64_t tokens, float* out) {
    thread_local IntStretch stretch(layer.d);
    thread_local std::vector<KeyWords::Code> queries;
    thread_local std::vector<IntRow> rows;
    thread_local Lines<float> sums;
    const int64_t d = layer.d, group = layer.heads / layer.kv_heads, window = layer.window, end = own + tokens;
    if (stretch.d != d) stretch = IntStretch(d);
    rows.resize(tokens * group);
    IntTile tile{layer, stretch, own, group, queries, rows, sums};
    tile.read(q, stride, head);
    for (int64_t at = window && own >= window ? (own - window + 1) / kStretch * kStretch : 0; at < end; at += kStretch) {
        const int64_t width = std::min(end - at, kStretch);
        stretch.load(layer, table, head, at, width);
        tile.meet(at, width);
    }
    for (int64_t r = 0; r < tokens * group; r++) {
        float* to = out + (r / group * layer.heads + head * group + r % group) * d;
        float total = 0.f;
        for (int i = 0; i < kLanes; i++) total += rows[r].total[i];
        if (layer.sinks) total += std::exp2(layer.sinks[head * group + r % group] * 1.44269504f - rows[r].highest);
        const float inverse = 1.f / total;
        for (int64_t i = 0; i < d; i++) to[i] = sums[r * stretch.padded + i] * inverse;
    }
}

}  // namespace
