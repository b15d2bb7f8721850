// CPU kernels, compiled by the engine build for several instruction sets (see ../native.py).
//
// Everything is written with the compiler's own vector types and `omp simd`, so one source serves AVX-512, AVX2
// and anything else; only products of small integers need instructions by name (int_linear.h).
//
// Each output element is summed in the same order whatever the number of rows, threads or neighbours: a
// request's tokens do not depend on its batch.

#include <vector>

#include "attention.h"
#include "float_linear.h"
#include "int_linear.h"
#include "pool.h"
#include "rows.h"
#include "vectors.h"

namespace {

Pool pool;

}  // namespace

extern "C" {

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
    return (n + kColumns - 1) / kColumns * groups_of(k_size) * (bits == 4 ? Int4::kBytes : Int8::kBytes);
}

// w [n, k] float32 -> panels of integers; `packed` is zero before.
void fl_pack_ints(int64_t bits, const float* w, int64_t n, int64_t k_size, uint8_t* packed) {
    bits == 4 ? pack_ints<Int4>(pool, w, n, k_size, packed) : pack_ints<Int8>(pool, w, n, k_size, packed);
}

// y [m, n] = x w^T + bias for x [m, groups of k]; bias may be null.
void fl_int_linear(int64_t bits, const Group* x, int64_t m, int64_t k_size, const uint8_t* packed, const float* bias,
                   int64_t n, float* y) {
    bits == 4 ? int_linear<Int4>(pool, x, m, k_size, packed, bias, n, y)
              : int_linear<Int8>(pool, x, m, k_size, packed, bias, n, y);
}

// y [m, n] = x [m, k] w^T + bias; bias may be null.
void fl_linear(const float* x, int64_t m, int64_t k_size, const uint32_t* packed, const float* bias, int64_t n,
               float* y) {
    constexpr int kWide = 4;  // a single row needs more panels at once to keep the multipliers busy
    const int64_t panels = (n + kPanel - 1) / kPanel;
    // Pieces of whole panels, small enough to share out evenly, large enough to be worth claiming.
    int64_t piece = panels / (pool.threads() * 8);
    piece = piece < kWide ? kWide : piece / kWide * kWide;
    pool.run((panels + piece - 1) / piece, m * n * k_size > kParallelWork, [&](int64_t i) {
        const int64_t end = (i + 1) * piece < panels ? (i + 1) * piece : panels;
        for (int64_t p = i * piece; p < end;) {
            const uint32_t* w = packed + p * k_size * kLanes;
            const float* b = bias ? bias + p * kPanel : nullptr;
            float* out = y + p * kPanel;
            const int64_t columns = n - p * kPanel;
            if (m == 1 && p + kWide <= end) {
                tile<1, kWide>(x, k_size, w, b, out, n, columns);
                p += kWide;
                continue;
            }
            for (int64_t r = 0; r < m; r += kRows) {
                rows_of<kRows>(m - r < kRows ? m - r : kRows, x + r * k_size, k_size, w, b, out + r * n, n, columns);
            }
            p++;
        }
    });
}

// x += delta, normed by `post` unless that is null; out = norm of x. Delta may be null. All [rows, k].
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
        rms_norm(row, k_size, w, eps, to);
    });
}

// x [rows, 2 n] -> out [rows, n]: activation of the first half times the second. gelu is its tanh form.
void fl_gate(const float* x, int64_t rows, int64_t n, int64_t gelu, int64_t integers, void* out) {
    for_reader(pool, rows, n, integers, out, [&](int64_t r, float* to) {
        const float *gate = x + r * 2 * n, *up = gate + n;
        if (gelu) {  // 1 + tanh(u) = 2 / (1 + e^-2u)
#pragma omp simd
            for (int64_t c = 0; c < n; c++) {
                const float u = 0.7978845608f * (gate[c] + 0.044715f * gate[c] * gate[c] * gate[c]);
                to[c] = gate[c] / (1.f + fast_exp(-2.f * u)) * up[c];
            }
            return;
        }
#pragma omp simd
        for (int64_t c = 0; c < n; c++) to[c] = gate[c] / (1.f + fast_exp(-gate[c])) * up[c];
    });
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

// Index of the first largest element of each row of x [rows, n].
void fl_argmax(const float* x, int64_t rows, int64_t n, int64_t* out) {
    pool.run(rows, rows * n > kParallelWork, [&](int64_t r) {
        const float* row = x + r * n;
        float highest = row[0];
#pragma omp simd reduction(max : highest)
        for (int64_t i = 0; i < n; i++) highest = row[i] > highest ? row[i] : highest;
        int64_t at = 0;
        while (at < n - 1 && row[at] != highest) at++;
        out[r] = at;
    });
}

}  // extern "C"
