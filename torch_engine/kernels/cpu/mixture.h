// A mixture of experts: routing in float32, and products that read only the experts which were hit.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "linear.h"
#include "pool.h"
#include "rows.h"
#include "vectors.h"

namespace {

// Mirrored in native.py.
struct Mixture {
    Linear router;                        // float32
    Linear gate_up, down;                 // of the first expert; the others' weights and biases follow
    Linear shared_gate_up, shared_down;   // of the expert that works for every row; no weights = none
    const float* correction;              // [experts], added to the scores for the choice alone; null = none
    const float* shared_gate;             // [size]; null = the shared expert counts fully
    int64_t experts, chosen, groups, kept_groups, sigmoid, normalise, gelu;
    float scale;
    float clamp;  // of the clamped activation; 0 = the model's own
};

// The `count` largest of n values, best first; of equal ones the first. The values are used up.
inline void take_best(float* values, int64_t n, int64_t count, int64_t* best) {
    for (int64_t i = 0; i < count; i++) {
        int64_t found = -1;
        for (int64_t c = 0; c < n; c++) {
            if (found < 0 ? values[c] == values[c] : values[c] > values[found]) found = c;
        }
        best[i] = found < 0 ? i : found;  // of NaNs any
        values[best[i]] = NAN;
    }
}

// The chosen experts of one row of logits [experts], which become scores, and their weights.
inline void route(const Mixture& mixture, float* scores, int64_t* ids, float* weights) {
    const int64_t experts = mixture.experts, each = experts / mixture.groups;
    if (mixture.sigmoid) {
        for (int64_t e = 0; e < experts; e++) scores[e] = 1.f / (1.f + std::exp(-scores[e]));
    } else {
        const float largest = *std::max_element(scores, scores + experts);
        float sum = 0.f;
        for (int64_t e = 0; e < experts; e++) sum += scores[e] = std::exp(scores[e] - largest);
        for (int64_t e = 0; e < experts; e++) scores[e] /= sum;
    }
    thread_local std::vector<float> choice, worth;
    thread_local std::vector<int64_t> kept;
    choice.assign(scores, scores + experts);
    for (int64_t e = 0; mixture.correction && e < experts; e++) choice[e] += mixture.correction[e];
    if (mixture.groups > 1) {
        worth.resize(mixture.groups), kept.resize(mixture.kept_groups);
        for (int64_t g = 0; g < mixture.groups; g++) {
            float best = -INFINITY, second = each > 1 ? -INFINITY : 0.f;
            for (int64_t e = g * each; e < (g + 1) * each; e++) {
                if (choice[e] > best) {
                    if (each > 1) second = best;
                    best = choice[e];
                } else if (choice[e] > second && each > 1) {
                    second = choice[e];
                }
            }
            worth[g] = best + second;
        }
        take_best(worth.data(), mixture.groups, mixture.kept_groups, kept.data());
        for (int64_t g = 0; g < mixture.groups; g++) {
            if (std::find(kept.begin(), kept.end(), g) == kept.end()) std::fill_n(choice.begin() + g * each, each, -INFINITY);
        }
    }
    take_best(choice.data(), experts, mixture.chosen, ids);
    float sum = 0.f;
    for (int64_t i = 0; i < mixture.chosen; i++) sum += weights[i] = scores[ids[i]];
    const float factor = mixture.scale / (mixture.normalise ? sum + 1e-20f : 1.f);
    for (int64_t i = 0; i < mixture.chosen; i++) weights[i] *= factor;
}

// Rows [begin, begin + rows) of the sorted ones, which an expert works for.
struct Hit {
    int64_t expert, begin, rows;
};

// y = each expert's product of its rows. All panels of all experts are shared out together, so that one row keeps every
// thread busy.
inline void run_experts(Pool& pool, const Linear& first, const std::vector<Hit>& hits, const char* x, float* y) {
    const int64_t panels = first.panels(), piece = std::min(piece_of(pool, panels * hits.size()), panels);
    const int64_t pieces = (panels + piece - 1) / piece, bytes = first.bytes();
    const int64_t work = (hits.back().begin + hits.back().rows) * first.inputs * first.outputs;
    pool.run(hits.size() * pieces, work > kParallelWork, [&](int64_t i) {
        const Hit& hit = hits[i / pieces];
        Linear expert = first;
        expert.weights = static_cast<const char*>(first.weights) + hit.expert * bytes;
        if (first.bias) expert.bias += hit.expert * first.outputs;
        const int64_t from = i % pieces * piece;
        expert.run(x + hit.begin * first.row_bytes(), hit.rows, y + hit.begin * first.outputs, from,
                   std::min(from + piece, panels));
    });
}

// y [rows, size] for x [rows, size]; the results of a row's experts are added best first, whatever the other rows are.
inline void run_mixture(Pool& pool, const Mixture& mixture, const float* x, int64_t rows, float* y) {
    static std::vector<float> logits, weights, wide, out, shared;
    static std::vector<int64_t> ids, places;
    static std::vector<char> read, sorted;
    static std::vector<Hit> hits;
    const int64_t chosen = mixture.chosen, experts = mixture.experts, size = mixture.router.inputs;
    const int64_t pairs = rows * chosen, integers = mixture.gate_up.integers();

    logits.resize(rows * experts), weights.resize(pairs), ids.resize(pairs), places.resize(pairs);
    run_linear(pool, mixture.router, x, rows, logits.data());
    pool.run(rows, pairs * experts * 8 > kParallelWork, [&](int64_t r) {
        route(mixture, logits.data() + r * experts, ids.data() + r * chosen, weights.data() + r * chosen);
    });

    // Where each pair of a row and an expert stands among the sorted ones.
    static std::vector<int64_t> next;
    next.assign(experts + 1, 0);
    for (int64_t i = 0; i < pairs; i++) next[ids[i] + 1]++;
    hits.clear();
    for (int64_t e = 0; e < experts; e++) {
        if (next[e + 1]) hits.push_back({e, next[e], next[e + 1]});
        next[e + 1] += next[e];
    }
    for (int64_t i = 0; i < pairs; i++) places[i] = next[ids[i]]++;

    const int64_t bytes = mixture.gate_up.row_bytes();
    const char* rounded = reinterpret_cast<const char*>(x);
    if (integers) {
        read.resize(rows * bytes);
        pool.run(rows, rows * size > kParallelWork, [&](int64_t r) {
            quantise(x + r * size, size, reinterpret_cast<Group*>(read.data() + r * bytes));
        });
        rounded = read.data();
    }
    const int64_t inner = mixture.down.inputs, widest = std::max(bytes, mixture.down.row_bytes());
    sorted.resize(pairs * widest), wide.resize(pairs * 2 * inner), out.resize(pairs * size);
    for (int64_t i = 0; i < pairs; i++) std::memcpy(sorted.data() + places[i] * bytes, rounded + i / chosen * bytes, bytes);
    run_experts(pool, mixture.gate_up, hits, sorted.data(), wide.data());
    gate_rows(pool, wide.data(), pairs, inner, mixture.gelu, mixture.clamp, integers, sorted.data());
    run_experts(pool, mixture.down, hits, sorted.data(), out.data());

    const Linear &wider = mixture.shared_gate_up, &narrower = mixture.shared_down;
    if (wider.weights) {
        wide.resize(std::max<int64_t>(wide.size(), rows * wider.outputs)), shared.resize(rows * size);
        sorted.resize(std::max<int64_t>(sorted.size(), rows * narrower.row_bytes()));
        run_linear(pool, wider, rounded, rows, wide.data());
        gate_rows(pool, wide.data(), rows, narrower.inputs, mixture.gelu, 0.f, integers, sorted.data());
        run_linear(pool, narrower, sorted.data(), rows, shared.data());
    }
    pool.run(rows, pairs * size > kParallelWork, [&](int64_t r) {
        float* to = y + r * size;
        std::fill_n(to, size, 0.f);
        const auto add = [&](const float* from, float weight) {
#pragma omp simd
            for (int64_t c = 0; c < size; c++) to[c] += weight * from[c];
        };
        for (int64_t i = r * chosen; i < (r + 1) * chosen; i++) add(out.data() + places[i] * size, weights[i]);
        if (!wider.weights) return;
        float part = 1.f;
        if (mixture.shared_gate) {
            float sum = 0.f;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < size; c++) sum += x[r * size + c] * mixture.shared_gate[c];
            part = 1.f / (1.f + std::exp(-sum));
        }
        add(shared.data() + r * size, part);
    });
}

}  // namespace
