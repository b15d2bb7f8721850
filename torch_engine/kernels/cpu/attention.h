// One operation for attention: norm and rotary embedding of queries and keys, paged KV write, grouped-query
// attention of decodes and prompt chunks alike, rounding for the next layer.
//
// A block of the cache holds for each KV head the keys of its tokens transposed, [d, block_size], and then their
// values, [block_size, d]: scores are sums of neighbouring tokens, and nothing is gathered. int8 caches have one
// scale for each token and head, for keys and for values.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention_float.h"
#include "attention_int.h"
#include "attention_layer.h"
#include "int_linear.h"
#include "pool.h"
#include "rows.h"
#include "vectors.h"

namespace {

inline void store_element(float* to, float value) { *to = value; }
inline void store_element(uint16_t* to, float value) { *to = to_bfloat16(value); }
inline void store_element(int8_t* to, float value) { *to = static_cast<int8_t>(std::nearbyint(value)); }

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
    const int64_t d = layer.d, bs = layer.block_size, slot = step.slots[layer.group * step.rows + row];
    const int64_t block = slot / bs, offset = slot % bs;
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

// qkv [rows, (heads + 2 kv_heads) * d], changed in place -> out [rows, heads * d] float32.
template <class Element>
void attend(Pool& pool, const AttentionLayer& layer, const AttentionStep& step, float* qkv, float* out) {
    constexpr bool kIntegers = sizeof(Element) == 1;
    constexpr int64_t kRows = kIntegers ? 96 : 16, kLeast = 16;  // of a tile; many rows share the weaving of integers
    const int64_t d = layer.d, stride = (layer.heads + 2 * layer.kv_heads) * d;
    const int64_t most = std::max(kLeast, kRows * layer.kv_heads / layer.heads);
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
        for (int64_t first = 0; first < count; first += most) {
            const int64_t tokens = std::min(count - first, most);
            tiles.push_back({span[0] + first, tokens, start + first, span[3]});
            work += tokens * span[2] * layer.heads * d;
        }
    }
    const int64_t* tables = step.tables + layer.group * step.width;
    const std::vector<Tile>& shared = tiles;  // the caller's, for every thread
    pool.run(shared.size() * layer.kv_heads, work > kParallelWork, [&](int64_t task) {
        const Tile& tile = shared[task / layer.kv_heads];
        const auto attend = [&](auto kernel) {
            kernel(layer, qkv + tile.row * stride, stride, tables + tile.table, task % layer.kv_heads, tile.position,
                   tile.tokens, out + tile.row * layer.heads * d);
        };
        if constexpr (kIntegers) {
            attend(attend_int_tile);
        } else {
            attend(attend_tile<Element>);
        }
    });
}

}  // namespace
