// What attention is told: of a layer, and of a step.

#pragma once

#include <cstdint>

namespace {

constexpr int64_t kStretch = 64;  // keys that a tile meets at a time; stretches begin at its multiples

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
    int64_t group;  // of layers that have their blocks in common
    float eps, scale, softcap;  // softcap 0 = none
    const float* sinks;  // [heads]: scores that join a query's softmax and that no value belongs to; null = none
};

// One step. Mirrored in native.py.
struct AttentionStep {
    int64_t rows, chunks;
    const int64_t* positions;  // [rows]
    const int64_t* slots;  // [groups, rows]
    const int64_t* spans;  // [chunks, 4]: first row, rows, context (its own rows included), where its table begins
    const int64_t* tables;
    int64_t width;  // of a table: those of a sequence's groups follow each other
};

}  // namespace
