// CPU kernels, compiled by the engine build for several instruction sets (see ../native.py).
//
// Everything is written with the compiler's own vector types and `omp simd`, so one source serves AVX-512, AVX2
// and anything else; only products of small integers need instructions by name (int_linear.h).
//
// Each output element is summed in the same order whatever the number of rows, threads or neighbours: a
// request's tokens do not depend on its batch.

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "mixture.h"
#include "pool.h"
#include "rows.h"
#include "sampling.h"
#include "vectors.h"

namespace {

Pool pool;

// Mirrored in native.py, as the following and those of the headers.
struct Layer {
    Linear qkv, out, gate_up, down;  // the last two without a mixture
    const Mixture* mixture;          // null = none
    const float *input_norm, *attention_post, *mlp_norm, *mlp_post;  // null = none
    AttentionLayer attention;
};

struct Decoder {
    const Layer* layers;
    int64_t count;
    Linear head;
    const float* norm;
    int64_t gelu;
    float eps;
};

}  // namespace

extern "C" {

// The structs that native.py mirrors, in the order of its STRUCTS: of each a line with its size, its fields' names and
// their offsets, which it compares at load.
const char* fl_layout() {
#define AT(field) {#field, offsetof(Struct, field)}
    static std::string layout;
    layout.clear();
    const auto add = [](size_t size, std::initializer_list<std::pair<const char*, size_t>> fields) {
        layout += std::to_string(size);
        for (const auto& [name, offset] : fields) layout.append(" ").append(name).append(" ") += std::to_string(offset);
        layout += "\n";
    };
    {
        using Struct = AttentionLayer;
        add(sizeof(Struct), {AT(cache), AT(scales), AT(rope), AT(q_norm), AT(k_norm), AT(element_bytes), AT(heads),
                             AT(kv_heads), AT(d), AT(block_size), AT(window), AT(norms_row), AT(group), AT(eps), AT(scale),
                             AT(softcap), AT(sinks)});
    }
    {
        using Struct = AttentionStep;
        add(sizeof(Struct), {AT(rows), AT(chunks), AT(positions), AT(slots), AT(spans), AT(tables), AT(width)});
    }
    {
        using Struct = SamplingRow;
        add(sizeof(Struct), {AT(allowed), AT(seen), AT(generated), AT(amounts), AT(num_generated), AT(bias_ids),
                             AT(biases), AT(num_biases), AT(banned), AT(num_banned), AT(matched), AT(num_matched), AT(ends),
                             AT(num_ends), AT(ends_from), AT(seed), AT(top_k), AT(num_top), AT(temperature), AT(top_p),
                             AT(least), AT(repetition)});
    }
    {
        using Struct = Linear;
        add(sizeof(Struct), {AT(weights), AT(bias), AT(bits), AT(inputs), AT(outputs)});
    }
    {
        using Struct = Mixture;
        add(sizeof(Struct), {AT(router), AT(gate_up), AT(down), AT(shared_gate_up), AT(shared_down), AT(correction),
                             AT(shared_gate), AT(experts), AT(chosen), AT(groups), AT(kept_groups), AT(sigmoid),
                             AT(normalise), AT(gelu), AT(scale), AT(clamp)});
    }
    {
        using Struct = Layer;
        add(sizeof(Struct), {AT(qkv), AT(out), AT(gate_up), AT(down), AT(mixture), AT(input_norm), AT(attention_post), AT(mlp_norm),
                             AT(mlp_post), AT(attention)});
    }
    {
        using Struct = Decoder;
        add(sizeof(Struct), {AT(layers), AT(count), AT(head), AT(norm), AT(gelu), AT(eps)});
    }
#undef AT
    return layout.c_str();
}

int64_t fl_panel() { return kPanel; }

int64_t fl_group_bytes() { return sizeof(Group); }

void fl_set_threads(int64_t threads) { pool.resize(static_cast<int>(threads)); }

// w [n, k] float32 -> panels, (n rounded up to a whole panel) * k * 2 bytes.
void fl_pack(const float* w, int64_t n, int64_t k_size, uint32_t* packed) {
    const int64_t panels = (n + kPanel - 1) / kPanel;
    pool.run(panels, true, [&](int64_t p) {
        for (int64_t k = 0; k < k_size; k++) {
            for (int64_t lane = 0; lane < kLanes; lane++) {
                const int64_t low = p * kPanel + lane, high = low + kLanes;
                const uint32_t a = low < n ? to_bfloat16(w[low * k_size + k]) : 0;
                const uint32_t b = high < n ? to_bfloat16(w[high * k_size + k]) : 0;
                packed[(p * k_size + k) * kLanes + lane] = b << 16 | a;
            }
        }
    });
}

// Bytes of a packed integer weight [n, k].
int64_t fl_int_bytes(int64_t bits, int64_t n, int64_t k_size) {
    return with_bits(bits, [&](auto kind) {
        return (n + kColumns - 1) / kColumns * (kUnits + groups_of(k_size) * static_cast<int64_t>(kind.kBytes));
    });
}

// w [n, k] float32 -> panels of integers; `packed` is zero before.
void fl_pack_ints(int64_t bits, const float* w, int64_t n, int64_t k_size, uint8_t* packed) {
    with_bits(bits, [&](auto kind) { pack_ints<decltype(kind)>(pool, w, n, k_size, packed); });
}

// Codes [n, k] that are given -> panels of integers; as pack_codes says.
void fl_pack_codes(int64_t bits, const uint8_t* w, const float* scales, const float* minima, int64_t n, int64_t k_size,
                   int64_t group, uint8_t* packed) {
    with_bits(bits, [&](auto kind) { pack_codes<decltype(kind)>(pool, w, scales, minima, n, k_size, group, packed); });
}

// y [rows, outputs] for x [rows], which is what the linear reads.
void fl_linear(const Linear* linear, const void* x, int64_t rows, float* y) { run_linear(pool, *linear, x, rows, y); }

// y [rows, size] for x [rows, size].
void fl_mixture(const Mixture* mixture, const float* x, int64_t rows, float* y) { run_mixture(pool, *mixture, x, rows, y); }

// x += delta, normed by `post` unless that is null; out = norm of x, or x itself if `w` is null. Delta may be null. All
// [rows, k].
void fl_add_norm(float* x, const float* delta, const float* post, const float* w, float eps, int64_t rows,
                 int64_t k_size, int64_t integers, void* out) {
    for_reader(pool, rows, k_size, integers, out, [&](int64_t r, float* to) {
        float* row = x + r * k_size;
        if (delta) {
            const float* more = delta + r * k_size;
            if (post) {
                rms_norm(more, k_size, post, eps, to);
                more = to;
            }
#pragma omp simd
            for (int64_t k = 0; k < k_size; k++) row[k] += more[k];
        }
        if (w) {
            rms_norm(row, k_size, w, eps, to);
        } else {
            std::memcpy(to, row, k_size * sizeof(float));
        }
    });
}

// x [rows, 2 n] -> out [rows, n]: activation of the first half times the second. gelu is its tanh form.
void fl_gate(const float* x, int64_t rows, int64_t n, int64_t gelu, int64_t integers, void* out) {
    gate_rows(pool, x, rows, n, gelu, 0.f, integers, out);
}

// qkv [rows, (heads + 2 kv_heads) * d], changed in place -> out [rows, heads * d].
void fl_attention(const AttentionLayer* layer, const AttentionStep* step, float* qkv, int64_t integers, void* out) {
    static std::vector<float> buffer;
    const int64_t size = layer->heads * layer->d;
    if (integers) buffer.resize(step->rows * size);
    float* result = integers ? buffer.data() : static_cast<float*>(out);
    switch (layer->element_bytes) {
        case 1: attend<int8_t>(pool, *layer, *step, qkv, result); break;
        case 2: attend<uint16_t>(pool, *layer, *step, qkv, result); break;
        default: attend<float>(pool, *layer, *step, qkv, result);
    }
    if (!integers) return;
    pool.run(step->rows, step->rows * size > kParallelWork, [&](int64_t r) {
        quantise(result + r * size, size, static_cast<Group*>(out) + r * groups_of(size));
    });
}

// Index of the first largest element of each row of x [rows, n]; -1 of a row without a number above -inf.
void fl_argmax(const float* x, int64_t rows, int64_t n, int64_t* out) {
    constexpr int64_t kStretch = 512;  // searched once more, and only if it has a larger element than all before
    pool.run(rows, rows * n > kParallelWork, [&](int64_t r) {
        const float* row = x + r * n;
        int64_t best = -1;
        float most = -kInfinity;
        for (int64_t from = 0; from < n; from += kStretch) {
            const int64_t end = from + kStretch < n ? from + kStretch : n;
            float highest = -kInfinity;  // NaN is above nothing
#pragma omp simd reduction(max : highest)
            for (int64_t i = from; i < end; i++) highest = row[i] > highest ? row[i] : highest;
            if (!(highest > most)) continue;
            most = highest;
            best = from;
            while (row[best] != highest) best++;
        }
        out[r] = best;
    });
}

// The next token of each row of logits [rows, n], which are changed: -1 if no logit is finite. asked [rows] is what is
// asked of each, positions [rows] where its token will stand. Log-probabilities [rows] and [rows, width] of those who
// ask, the others' are left as they are.
void fl_sample(float* logits, int64_t rows, int64_t n, const SamplingRow* const* asked, const int64_t* positions,
               int64_t* tokens, float* log_probs, int64_t width, int32_t* top_ids, float* top_log_probs) {
    pool.run(rows, rows * n > kParallelWork, [&](int64_t r) {
        tokens[r] = choose(logits + r * n, n, *asked[r], positions[r], log_probs + r, top_ids + r * width,
                           top_log_probs + r * width);
    });
}

// For tests: kept [n] is 1 where a token of x [n] may be drawn, x being after bias, penalties and bans.
void fl_kept(float* x, int64_t n, const SamplingRow* asked, uint8_t* kept) {
    Scratch scratch;
    Logits logits(x, n, scratch);
    logits.survey();
    std::memset(kept, 0, n);
    if (logits.max() == -kInfinity) return;
    logits.above(cut_of(logits, *asked, scratch), [&](int64_t id, float) { kept[id] = 1; });
}

// For tests: random words and noise of the numbers 0 to count - 1.
void fl_noise(uint64_t seed, int64_t position, int64_t stream, int64_t count, uint32_t* words, double* noise) {
    Noise source(seed, position, static_cast<uint32_t>(stream));
    for (int64_t i = 0; i < count; i++) noise[i] = source.of(i), words[i] = source.word(i);
}

// Rows `ids` [count] of table [.., n], float32 or bfloat16 by its element's size, times factor -> out [count, n].
void fl_embed_rows(const int64_t* ids, int64_t count, const void* table, int64_t element_bytes, int64_t n, float factor,
                   float* out) {
    for (int64_t r = 0; r < count; r++) {
        const int64_t first = ids[r] * n;
        if (element_bytes == 2) {
            const uint16_t* row = static_cast<const uint16_t*>(table) + first;
#pragma omp simd
            for (int64_t c = 0; c < n; c++) out[r * n + c] = from_bfloat16(row[c]) * factor;
        } else {
            const float* row = static_cast<const float*>(table) + first;
#pragma omp simd
            for (int64_t c = 0; c < n; c++) out[r * n + c] = row[c] * factor;
        }
    }
}

// chunks [count, 4]: row of the block table, tokens computed before, tokens, of which so many at the end are sampled.
// tables [.., groups, width] -> out: spans [count, 4], positions [rows], slots [groups, rows] as AttentionStep has them,
// and the rows of the sampled tokens.
void fl_step(const int64_t* chunks, int64_t count, const int64_t* tables, int64_t groups, int64_t width,
             int64_t block_size, int64_t rows, int64_t* out) {
    int64_t *spans = out, *positions = spans + 4 * count, *slots = positions + rows, row = 0;
    int64_t* sampled = slots + groups * rows;
    for (int64_t c = 0; c < count; c++, chunks += 4, spans += 4) {
        const int64_t begin = chunks[1], tokens = chunks[2], *table = tables + chunks[0] * groups * width;
        spans[0] = row, spans[1] = tokens, spans[2] = begin + tokens, spans[3] = chunks[0] * groups * width;
        for (int64_t i = 0; i < tokens; i++, row++) {
            const int64_t position = begin + i;
            positions[row] = position;
            for (int64_t g = 0; g < groups; g++) {
                slots[g * rows + row] = table[g * width + position / block_size] * block_size + position % block_size;
            }
        }
        for (int64_t i = row - chunks[3]; i < row; i++) *sampled++ = i;
    }
}

// The whole decoder in one call: x [step's rows, size], changed in place -> logits [wanted, vocabulary] of the rows
// in `rows`, in ascending order.
void fl_decode(const Decoder* decoder, const AttentionStep* step, float* x, const int64_t* rows, int64_t wanted,
               float* logits) {
    static std::vector<float> hidden, wide, delta;  // what linears read; qkv, or gate and up; what is added to x
    const int64_t size = decoder->head.inputs;
    const float eps = decoder->eps;
    const float* post = nullptr;
    int64_t count = step->rows;
    for (const Layer* layer = decoder->layers; layer != decoder->layers + decoder->count; layer++) {
        const bool first = layer == decoder->layers, last = layer + 1 == decoder->layers + decoder->count;
        const int64_t integers = layer->qkv.integers();
        const int64_t bytes[] = {layer->qkv.row_bytes(), layer->out.row_bytes(), layer->down.row_bytes(), size * 4};
        hidden.resize(count * *std::max_element(std::begin(bytes), std::end(bytes)) / 4);
        wide.resize(count * std::max(layer->qkv.outputs, layer->gate_up.outputs));
        delta.resize(count * size);
        fl_add_norm(x, first ? nullptr : delta.data(), post, layer->input_norm, eps, count, size, integers, hidden.data());
        run_linear(pool, layer->qkv, hidden.data(), count, wide.data());
        fl_attention(&layer->attention, step, wide.data(), integers, hidden.data());
        if (last && wanted < count) {  // nobody reads the others any more
            const int64_t bytes = layer->out.row_bytes();
            char* read = reinterpret_cast<char*>(hidden.data());
            for (int64_t r = 0; r < wanted; r++) {
                std::memmove(x + r * size, x + rows[r] * size, size * sizeof(float));
                std::memmove(read + r * bytes, read + rows[r] * bytes, bytes);
            }
            count = wanted;
        }
        run_linear(pool, layer->out, hidden.data(), count, delta.data());
        const int64_t rounded = integers && !layer->mixture;  // a router reads float32
        fl_add_norm(x, delta.data(), layer->attention_post, layer->mlp_norm, eps, count, size, rounded, hidden.data());
        if (layer->mixture) {
            run_mixture(pool, *layer->mixture, hidden.data(), count, delta.data());
        } else {
            run_linear(pool, layer->gate_up, hidden.data(), count, wide.data());
            fl_gate(wide.data(), count, layer->down.inputs, decoder->gelu, integers, hidden.data());
            run_linear(pool, layer->down, hidden.data(), count, delta.data());
        }
        post = layer->mlp_post;
    }
    fl_add_norm(x, delta.data(), post, decoder->norm, eps, count, size, decoder->head.integers(), hidden.data());
    run_linear(pool, decoder->head, hidden.data(), count, logits);
}

}  // extern "C"
