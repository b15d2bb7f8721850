// Attention over a float32 or bfloat16 cache, in float32.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention_layer.h"
#include "vectors.h"

namespace {

inline float load_element(float value) { return value; }
inline float load_element(uint16_t value) { return from_bfloat16(value); }

template <class Element>
inline void widen_run(const Element* from, int64_t count, float* to) {
    if (count == 16) {  // a whole block of the usual size
#pragma omp simd
        for (int64_t i = 0; i < 16; i++) to[i] = load_element(from[i]);
        return;
    }
    for (int64_t i = 0; i < count; i++) to[i] = load_element(from[i]);
}

// Keys and values of one KV head at positions [at, at + kStretch) in float32.
struct Stretch {
    std::vector<float> keys, values;  // [d, kStretch], [kStretch, padded]
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
            j += run;
        }
        for (int64_t j = width; j < columns; j++) {
            std::memset(&values[j * padded], 0, padded * sizeof(float));
        }
    }
};

// One query's scores of so many keys -> its weights, e^(score - peak); unless it sees ALL keys, those outside [low, high)
// have none. Raises `peak` to the highest score and returns the weights' sum.
template <bool ALL>
inline float weigh(float* scores, int64_t columns, int32_t low, int32_t high, float softcap, float& peak) {
    const auto vector = [](const float* at) { return *reinterpret_cast<const Floats*>(at); };
    Integers lanes;
    for (int i = 0; i < kLanes; i++) lanes[i] = i;
    const auto or_else = [&](Floats value, float nothing, int64_t column) {
        if constexpr (ALL) return value;
        const Integers number = lanes + static_cast<int32_t>(column);
        return (number >= low) & (number < high) ? value : Floats{} + nothing;
    };
    Floats highest = Floats{} + peak, sum = {};
    for (int64_t c = 0; c < columns; c += kLanes) {
        Floats score = vector(scores + c);
        if (softcap > 0.f) {
            for (int i = 0; i < kLanes; i++) score[i] = softcap * std::tanh(score[i] / softcap);
        }
        score = or_else(score, -1e30f, c);
        highest = score > highest ? score : highest;
        *reinterpret_cast<Floats*>(scores + c) = score;
    }
    for (int i = 0; i < kLanes; i++) peak = highest[i] > peak ? highest[i] : peak;
    for (int64_t c = 0; c < columns; c += kLanes) {
        const Floats weight = or_else(fast_exp(vector(scores + c) - peak), 0.f, c);
        sum += weight;
        *reinterpret_cast<Floats*>(scores + c) = weight;
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
            const float sum = weights(&scores[r * kStretch], columns, low, high, layer.softcap, peak);
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
        if (layer.sinks) total[r] += std::exp(layer.sinks[head * group + r % group] - highest[r]);
        const float inverse = 1.f / total[r];
        for (int64_t i = 0; i < d; i++) to[i] = sums[r * padded + i] * inverse;
    }
}

}  // namespace
