// One operation for attention: norm and rotary embedding of queries and keys, paged KV write, grouped-query
// attention of decodes and prompt chunks alike, rounding for the next layer.
//
// A block of the cache holds for each KV head the keys of its tokens transposed, [d, block_size], and then their
// values, [block_size, d]: scores are sums of neighbouring tokens, and nothing is gathered. int8 caches have one
// scale for each token and head, for keys and for values.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "int_linear.h"
#include "pool.h"
#include "rows.h"
#include "vectors.h"

namespace {

// What stays the same from step to step. Mirrored in native.py.
struct AttentionLayer {
    void* cache;
    float* scales;  // [blocks, kv_heads, 2, block_size]; null unless the cache is int8
    const float* rope;  // [positions, 2, d / 2]
    const float* q_norm;  // [d], or [heads * d] of a norm over the row; null = none
    const float* k_norm;
    int64_t element_bytes;  // of the cache: 4 float32, 2 bfloat16, 1 int8
    int64_t heads, kv_heads, d, block_size;
    int64_t window;  // 0 = all
    int64_t norms_row;  // all heads of a token together, not each
    float eps, scale, softcap;  // softcap 0 = none
};

// One step. Mirrored in native.py.
struct AttentionStep {
    int64_t rows, chunks;
    const int64_t* positions;  // [rows]
    const int64_t* slots;  // [rows]
    const int64_t* spans;  // [chunks, 4]: first row, rows, context (its own rows included), where its table begins
    const int64_t* tables;
};

inline void store_element(float* to, float value) { *to = value; }
inline void store_element(uint16_t* to, float value) { *to = to_bfloat16(value); }
inline void store_element(int8_t* to, float value) { *to = static_cast<int8_t>(std::nearbyint(value)); }
inline float load_element(float value) { return value; }
inline float load_element(uint16_t value) { return from_bfloat16(value); }
inline float load_element(int8_t value) { return value; }

inline void rotate(float* x, int64_t d, const float* cos) {
    const int64_t half = d / 2;
    const float* sin = cos + half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

// Writes one token's key or value of one head, elements `stride` apart.
template <class Element>
inline void write_head(const float* x, int64_t d, Element* to, int64_t stride, float* scale) {
    float factor = 1.f;
    if constexpr (sizeof(Element) == 1) {
        float largest = 0.f;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < d; i++) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
        *scale = largest / 127.f;
        factor = largest > 0.f ? 127.f / largest : 0.f;
    }
    for (int64_t i = 0; i < d; i++) store_element(to + i * stride, x[i] * factor);
}

// Norm, rotary embedding and cache write of one row; the queries stay in `x`.
template <class Element>
inline void prepare_row(const AttentionLayer& layer, const AttentionStep& step, int64_t row, float* x) {
    const int64_t d = layer.d, bs = layer.block_size, block = step.slots[row] / bs, offset = step.slots[row] % bs;
    const float* cos = layer.rope + step.positions[row] * d;
    if (layer.norms_row) {
        float* keys = x + layer.heads * d;
        rms_norm(x, layer.heads * d, layer.q_norm, layer.eps, x);
        rms_norm(keys, layer.kv_heads * d, layer.k_norm, layer.eps, keys);
    }
    for (int64_t h = 0; h < layer.heads + layer.kv_heads; h++) {
        const float* norm = h < layer.heads ? layer.q_norm : layer.k_norm;
        if (norm && !layer.norms_row) rms_norm(x + h * d, d, norm, layer.eps, x + h * d);
        rotate(x + h * d, d, cos);
    }
    for (int64_t h = 0; h < layer.kv_heads; h++) {
        const int64_t at = block * layer.kv_heads + h;
        Element* keys = static_cast<Element*>(layer.cache) + at * 2 * bs * d;
        float* scales = layer.scales ? layer.scales + at * 2 * bs + offset : nullptr;
        const float* key = x + (layer.heads + h) * d;
        write_head(key, d, keys + offset, bs, scales);
        write_head(key + layer.kv_heads * d, d, keys + (bs + offset) * d, 1, scales ? scales + bs : nullptr);
    }
}

template <class Element>
inline void widen_run(const Element* from, int64_t count, float* to) {
    if (count == 16) {  // a whole block of the usual size
#pragma omp simd
        for (int64_t i = 0; i < 16; i++) to[i] = load_element(from[i]);
        return;
    }
    for (int64_t i = 0; i < count; i++) to[i] = load_element(from[i]);
}

constexpr int64_t kStretch = 64;  // keys that a tile meets at a time, in whole panels

// Keys and values of one KV head at positions [at, at + kStretch) in float32, without their scales.
struct Stretch {
    std::vector<float> keys, values;  // [d, kStretch], [kStretch, padded]
    float key_scales[kStretch], value_scales[kStretch];
    int64_t padded;
    int64_t columns;  // of them, in whole panels

    explicit Stretch(int64_t d) : padded((d + kPanel - 1) / kPanel * kPanel) {
        keys.resize(d * kStretch);
        values.resize(kStretch * padded);
    }

    // Values from `width` on become zero; keys there may be anything finite or not, since nobody looks at their scores.
    template <class Element>
    void load(const AttentionLayer& layer, const int64_t* table, int64_t head, int64_t at, int64_t width) {
        const int64_t d = layer.d, bs = layer.block_size;
        columns = (width + kPanel - 1) / kPanel * kPanel;
        for (int64_t j = 0; j < width;) {
            const int64_t offset = (at + j) % bs, place = table[(at + j) / bs] * layer.kv_heads + head;
            const int64_t run = bs - offset < columns - j ? bs - offset : columns - j;
            const Element* block = static_cast<const Element*>(layer.cache) + place * 2 * bs * d;
            for (int64_t i = 0; i < d; i++) widen_run(block + i * bs + offset, run, &keys[i * kStretch + j]);
            for (int64_t t = 0; t < run && j + t < width; t++) {
                const Element* value = block + (bs + offset + t) * d;
                float* to = &values[(j + t) * padded];
#pragma omp simd
                for (int64_t i = 0; i < d; i++) to[i] = load_element(value[i]);
            }
            for (int64_t t = 0; t < run; t++) {
                const float* scales = layer.scales + place * 2 * bs + offset + t;
                key_scales[j + t] = layer.scales ? scales[0] : 1.f;
                value_scales[j + t] = layer.scales ? scales[bs] : 1.f;
            }
            j += run;
        }
        for (int64_t j = width; j < columns; j++) {
            std::memset(&values[j * padded], 0, padded * sizeof(float));
            value_scales[j] = 0.f;
        }
    }
};

// One query's products with a stretch's keys -> its weights, e^(score - peak), times the values' scales; unless it sees
// ALL keys, those outside [low, high) have none. Raises `peak` to the highest score and returns the weights' sum.
template <bool ALL>
inline float weigh(float* scores, const Stretch& stretch, int32_t low, int32_t high, float softcap, float& peak) {
    const auto vector = [](const float* at) { return *reinterpret_cast<const Floats*>(at); };
    Integers lanes;
    for (int i = 0; i < kLanes; i++) lanes[i] = i;
    const auto or_else = [&](Floats value, float nothing, int64_t column) {
        if constexpr (ALL) return value;
        const Integers number = lanes + static_cast<int32_t>(column);
        return (number >= low) & (number < high) ? value : Floats{} + nothing;
    };
    Floats highest = Floats{} + peak, sum = {};
    for (int64_t c = 0; c < stretch.columns; c += kLanes) {
        Floats score = vector(scores + c) * vector(stretch.key_scales + c);
        if (softcap > 0.f) {
            for (int i = 0; i < kLanes; i++) score[i] = softcap * std::tanh(score[i] / softcap);
        }
        score = or_else(score, -1e30f, c);
        highest = score > highest ? score : highest;
        *reinterpret_cast<Floats*>(scores + c) = score;
    }
    for (int i = 0; i < kLanes; i++) peak = highest[i] > peak ? highest[i] : peak;
    for (int64_t c = 0; c < stretch.columns; c += kLanes) {
        const Floats weight = or_else(fast_exp(vector(scores + c) - peak), 0.f, c);
        sum += weight;
        *reinterpret_cast<Floats*>(scores + c) = weight * vector(stretch.value_scales + c);
    }
    float result = 0.f;
    for (int i = 0; i < kLanes; i++) result += sum[i];
    return result;
}

// `tokens` neighbouring rows of one chunk, all queries of one KV head. `own` is the first token's position.
//
// Flash attention (Dao et al. 2022): the queries meet the keys stretch by stretch with a running maximum and sum.
// Stretches begin at multiples of their length, whatever the chunk, so that a token's result does not depend on
// how its prompt was cut, nor on whether it was a decode.
template <class Element>
void attend_tile(const AttentionLayer& layer, const float* q, int64_t stride, const int64_t* table, int64_t head,
                 int64_t own, int64_t tokens, float* out) {
    const int64_t d = layer.d, group = layer.heads / layer.kv_heads, rows = tokens * group, window = layer.window;
    thread_local Stretch stretch(d);
    if (static_cast<int64_t>(stretch.keys.size()) != d * kStretch) stretch = Stretch(d);
    const int64_t padded = stretch.padded;
    thread_local std::vector<float> queries, scores, sums, total, highest;
    queries.resize(rows * d);
    scores.resize(rows * kStretch);
    sums.assign(rows * padded, 0.f);
    total.assign(rows, 0.f);
    highest.assign(rows, -1e30f);
    for (int64_t r = 0; r < rows; r++) {
        const float* from = q + r / group * stride + (head * group + r % group) * d;
        for (int64_t i = 0; i < d; i++) queries[r * d + i] = from[i] * layer.scale;
    }
    const int64_t begin = window && own >= window ? (own - window + 1) / kStretch * kStretch : 0, end = own + tokens;
    for (int64_t at = begin; at < end; at += kStretch) {
        stretch.load<Element>(layer, table, head, at, end - at < kStretch ? end - at : kStretch);
        const int64_t columns = stretch.columns;
        float_product(rows, queries.data(), d, d, stretch.keys.data(), kStretch, columns, scores.data(), kStretch, false);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t position = own + r / group;
            const int32_t low = window ? position - window + 1 - at : 0, high = position - at + 1;
            const auto weights = low <= 0 && high >= columns ? weigh<true> : weigh<false>;
            float peak = highest[r];
            const float sum = weights(&scores[r * kStretch], stretch, low, high, layer.softcap, peak);
            if (peak > highest[r]) {
                const float fade = std::exp(highest[r] - peak);
                highest[r] = peak;
                total[r] *= fade;
                for (int64_t i = 0; i < padded; i++) sums[r * padded + i] *= fade;
            }
            total[r] += sum;
        }
        float_product(rows, scores.data(), kStretch, columns, stretch.values.data(), padded, padded, sums.data(), padded,
                      true);
    }
    for (int64_t r = 0; r < rows; r++) {
        float* to = out + (r / group * layer.heads + head * group + r % group) * d;
        const float inverse = 1.f / total[r];
        for (int64_t i = 0; i < d; i++) to[i] = sums[r * padded + i] * inverse;
    }
}

// qkv [rows, (heads + 2 kv_heads) * d], changed in place -> out [rows, heads * d] float32.
template <class Element>
void attend(Pool& pool, const AttentionLayer& layer, const AttentionStep& step, float* qkv, float* out) {
    constexpr int64_t kTokens = 16;
    const int64_t d = layer.d, stride = (layer.heads + 2 * layer.kv_heads) * d;
    pool.run(step.rows, step.rows * stride > kParallelWork,
             [&](int64_t r) { prepare_row<Element>(layer, step, r, qkv + r * stride); });
    struct Tile {
        int64_t row, tokens, position, table;
    };
    thread_local std::vector<Tile> tiles;
    tiles.clear();
    int64_t work = 0;
    for (int64_t c = 0; c < step.chunks; c++) {
        const int64_t *span = step.spans + c * 4, count = span[1], start = span[2] - count;
        for (int64_t first = 0; first < count; first += kTokens) {
            const int64_t tokens = count - first < kTokens ? count - first : kTokens;
            tiles.push_back({span[0] + first, tokens, start + first, span[3]});
            work += tokens * span[2] * layer.heads * d;
        }
    }
    const std::vector<Tile>& shared = tiles;  // the caller's, for every thread
    pool.run(shared.size() * layer.kv_heads, work > kParallelWork, [&](int64_t task) {
        const Tile& tile = shared[task / layer.kv_heads];
        attend_tile<Element>(layer, qkv + tile.row * stride, stride, step.tables + tile.table, task % layer.kv_heads,
                             tile.position, tile.tokens, out + tile.row * layer.heads * d);
    });
}

}  // namespace
