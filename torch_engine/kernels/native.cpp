// CPU kernels, compiled by the engine build for the machine it runs on (see native.py).
//
// Activations and sums are float32; weights are bfloat16 in panels, so that a decode step reads half the
// bytes of float32 weights and loses nothing of a bfloat16 checkpoint. Everything is written with the
// compiler's own vector types and `omp simd`: one source for AVX2, AVX-512 and anything else.
//
// Each output element is summed in the same order whatever the number of rows, threads or neighbours: a
// request's tokens do not depend on its batch.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
constexpr int kRows = 12;  // rows of one tile: 24 sums, 2 weights and a broadcast fit 32 registers
#else
constexpr int kLanes = 8;
constexpr int kRows = 6;  // 12 sums, 2 weights and a broadcast fit 16 registers
#endif
constexpr int kPanel = 2 * kLanes;

typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(4)));

constexpr int64_t kParallelWork = 1 << 15;  // below, starting the other threads costs more than it saves
constexpr int kSpins = 2000;                // about 30 us of waiting for the next job before a worker sleeps

// Threads for one caller at a time. The caller works too and waits only for pieces that a worker has
// claimed, never for a worker to show up: where the server, its clients and the engine share the cores, a
// barrier (OpenMP) would stand still for a scheduler's time slice whenever a thread is not running.
class Pool {
   public:
    ~Pool() { resize(1); }

    void resize(int threads) {
        stop_ = true;
        ticket_.fetch_add(uint64_t{1} << 32);
        ticket_.notify_all();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        stop_ = false;
        for (int i = 1; i < threads; i++) workers_.emplace_back([this] { serve(); });
    }

    int64_t threads() const { return workers_.size() + 1; }

    // Calls body(i) for every i in [0, count), in any order, on any thread.
    template <class Body>
    void run(int64_t count, bool parallel, const Body& body) {
        if (!parallel || count < 2 || workers_.empty()) {
            for (int64_t i = 0; i < count; i++) body(i);
            return;
        }
        call_ = [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); };
        context_ = &body;
        done_.store(0, std::memory_order_relaxed);
        const uint64_t next = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        ticket_.store(next << 32 | static_cast<uint64_t>(count), std::memory_order_release);
        ticket_.notify_all();
        while (work()) {
        }
        while (done_.load(std::memory_order_acquire) != count) pause();
    }

   private:
    // A ticket is the job's number and how many of its pieces nobody has claimed. Claiming is one compare
    // and swap: a worker that slept through a job cannot claim a piece of it any more, and the job's own
    // data stay valid as long as a claimed piece is not done.
    bool work() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (static_cast<uint32_t>(ticket) != 0) {
            if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) {
                call_(context_, static_cast<int64_t>(static_cast<uint32_t>(ticket)) - 1);
                done_.fetch_add(1, std::memory_order_release);
                return true;
            }
        }
        return false;
    }

    void serve() {
        int idle = 0;
        while (!stop_) {
            const uint64_t seen = ticket_.load(std::memory_order_acquire);
            if (work()) {
                idle = 0;
            } else if (++idle < kSpins) {
                pause();
            } else {
                ticket_.wait(seen);
                idle = 0;
            }
        }
    }

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }

    std::vector<std::thread> workers_;
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    void (*call_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
};

Pool pool;

// One tile of y = x w^T: ROWS rows of x times PANELS neighbouring panels. A word of a panel holds two
// columns, `kLanes` apart: the low half is one bfloat16, the high half the other.
template <int ROWS, int PANELS>
inline void tile(const float* x, int64_t k_size, const uint32_t* w, const float* bias, float* y,
                 int64_t y_stride, int64_t columns) {
    Floats sums[ROWS][PANELS][2] = {};
    for (int64_t k = 0; k < k_size; k++) {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) {
            const Words word = *reinterpret_cast<const Words*>(w + (p * k_size + k) * kLanes);
            const Floats low = reinterpret_cast<Floats>(word << 16);
            const Floats high = reinterpret_cast<Floats>(word & 0xffff0000u);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                const float value = x[r * k_size + k];
                sums[r][p][0] += value * low;
                sums[r][p][1] += value * high;
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int p = 0; p < PANELS; p++) {
            float out[kPanel];
            std::memcpy(out, sums[r][p], sizeof out);
            const int64_t first = p * kPanel;
            const int64_t count = columns - first < kPanel ? columns - first : kPanel;
            for (int64_t c = 0; c < count; c++) {
                y[r * y_stride + first + c] = out[c] + (bias ? bias[first + c] : 0.f);
            }
        }
    }
}

template <int ROWS>
inline void rows_of(int64_t rows, const float* x, int64_t k_size, const uint32_t* w, const float* bias, float* y,
                    int64_t y_stride, int64_t columns) {
    if (rows == ROWS) {
        tile<ROWS, 1>(x, k_size, w, bias, y, y_stride, columns);
    } else if constexpr (ROWS > 1) {
        rows_of<ROWS - 1>(rows, x, k_size, w, bias, y, y_stride, columns);
    }
}

// y [ROWS, one panel] (+)= x [ROWS, k_size] w [k_size, one panel], all float32.
template <int ROWS>
inline void float_tile(const float* x, int64_t x_stride, int64_t k_size, const float* w, int64_t w_stride, float* y,
                       int64_t y_stride, bool add) {
    Floats sums[ROWS][2] = {};
    if (add) {
        for (int r = 0; r < ROWS; r++) {
            sums[r][0] = *reinterpret_cast<const Floats*>(y + r * y_stride);
            sums[r][1] = *reinterpret_cast<const Floats*>(y + r * y_stride + kLanes);
        }
    }
    for (int64_t k = 0; k < k_size; k++) {
        const Floats low = *reinterpret_cast<const Floats*>(w + k * w_stride);
        const Floats high = *reinterpret_cast<const Floats*>(w + k * w_stride + kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const float value = x[r * x_stride + k];
            sums[r][0] += value * low;
            sums[r][1] += value * high;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        *reinterpret_cast<Floats*>(y + r * y_stride) = sums[r][0];
        *reinterpret_cast<Floats*>(y + r * y_stride + kLanes) = sums[r][1];
    }
}

template <int ROWS>
inline void float_rows(int64_t rows, const float* x, int64_t x_stride, int64_t k_size, const float* w, int64_t w_stride,
                       float* y, int64_t y_stride, bool add) {
    if (rows == ROWS) {
        float_tile<ROWS>(x, x_stride, k_size, w, w_stride, y, y_stride, add);
    } else if constexpr (ROWS > 1) {
        float_rows<ROWS - 1>(rows, x, x_stride, k_size, w, w_stride, y, y_stride, add);
    }
}

// y [rows, columns] (+)= x [rows, k_size] w [k_size, columns]; columns in whole panels.
inline void float_product(int64_t rows, const float* x, int64_t x_stride, int64_t k_size, const float* w,
                          int64_t w_stride, int64_t columns, float* y, int64_t y_stride, bool add) {
    for (int64_t c = 0; c < columns; c += kPanel) {
        for (int64_t r = 0; r < rows; r += kRows) {
            float_rows<kRows>(rows - r < kRows ? rows - r : kRows, x + r * x_stride, x_stride, k_size, w + c, w_stride,
                              y + r * y_stride + c, y_stride, add);
        }
    }
}

// e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of r (Cephes' coefficients); 0 for -inf.
inline float fast_exp(float x) {
    x = x > 88.f ? 88.f : (x < -87.f ? -87.f : x);
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

inline float dot(const float* a, const float* b, int64_t size) {
    Floats sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
        for (int c = 0; c < 4; c++) {
            sums[c] += *reinterpret_cast<const Floats*>(a + i + c * kLanes) *
                       *reinterpret_cast<const Floats*>(b + i + c * kLanes);
        }
    }
    const Floats all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float lanes[kLanes];
    std::memcpy(lanes, &all, sizeof lanes);
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    }
    float sum = lanes[0];
    for (; i < size; i++) sum += a[i] * b[i];
    return sum;
}

// out [size] = sum over j of weights[j] * (rows[j] + offset)[0:size].
inline void weighted_sum(const float* weights, const float* const* rows, int64_t offset, int64_t count, int64_t size,
                         float* out) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
        Floats sums[4] = {};
        for (int64_t j = 0; j < count; j++) {
            const float* row = rows[j] + offset + i;
            for (int c = 0; c < 4; c++) sums[c] += weights[j] * *reinterpret_cast<const Floats*>(row + c * kLanes);
        }
        std::memcpy(out + i, sums, sizeof sums);
    }
    for (; i < size; i++) {
        float sum = 0.f;
        for (int64_t j = 0; j < count; j++) sum += weights[j] * rows[j][offset + i];
        out[i] = sum;
    }
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

extern "C" {

int64_t fl_panel() { return kPanel; }

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

// y = x / rms(x) * w over rows of k elements, `stride` apart in x, one after the other in y.
void fl_rms_norm(const float* x, int64_t rows, int64_t k_size, int64_t stride, const float* w, float eps, float* y) {
    pool.run(rows, rows * k_size > kParallelWork, [&](int64_t r) {
        const float* in = x + r * stride;
        float* out = y + r * k_size;
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < k_size; k++) sum += in[k] * in[k];
        const float scale = 1.f / std::sqrt(sum / k_size + eps);
#pragma omp simd
        for (int64_t k = 0; k < k_size; k++) out[k] = in[k] * scale * w[k];
    });
}

// x [rows, 2 n] -> y [rows, n]: silu(first half) * second half.
void fl_silu_mul(const float* x, int64_t rows, int64_t n, float* y) {
    pool.run(rows, rows * n > kParallelWork, [&](int64_t r) {
        const float *gate = x + r * 2 * n, *up = gate + n;
        float* out = y + r * n;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) out[c] = gate[c] / (1.f + fast_exp(-gate[c])) * up[c];
    });
}

// Rotates x [rows, heads, d] in place (rows `stride` apart); table [positions, 2, d / 2].
void fl_rotate(float* x, int64_t rows, int64_t heads, int64_t d, int64_t stride, const float* table,
               const int64_t* positions) {
    const int64_t half = d / 2;
    pool.run(rows, rows * heads * d > kParallelWork, [&](int64_t r) {
        const float *cos = table + positions[r] * d, *sin = cos + half;
        for (int64_t h = 0; h < heads; h++) {
            float *first = x + r * stride + h * d, *second = first + half;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                const float a = first[i], b = second[i];
                first[i] = a * cos[i] - b * sin[i];
                second[i] = b * cos[i] + a * sin[i];
            }
        }
    });
}

// Copies keys and values [rows, kv_heads * d] (rows `stride` apart) to their slots of the cache [slots, 2, kv_heads * d].
void fl_write_cache(const float* k, const float* v, int64_t rows, int64_t size, int64_t k_stride, int64_t v_stride,
                    const int64_t* slots, float* cache) {
    for (int64_t r = 0; r < rows; r++) {
        std::memcpy(cache + slots[r] * 2 * size, k + r * k_stride, size * sizeof(float));
        std::memcpy(cache + (slots[r] * 2 + 1) * size, v + r * v_stride, size * sizeof(float));
    }
}

// One token of each of `rows` sequences attends to its sequence; grouped queries share what is read.
// q [rows, kv_heads * group, d] (rows `stride` apart), cache [blocks, block_size, 2, kv_heads, d],
// tables [rows, width], out [rows, kv_heads * group, d]. window 0 = all; softcap 0 = none.
void fl_attend_decodes(const float* q, int64_t rows, int64_t stride, int64_t kv_heads, int64_t group, int64_t d,
                       const float* cache, int64_t block_size, const int64_t* tables, int64_t width,
                       const int64_t* lengths, float scale, int64_t window, float softcap, float* out) {
    const int64_t token = 2 * kv_heads * d;
    pool.run(rows * kv_heads, true, [&](int64_t task) {
        const int64_t r = task / kv_heads, h = task % kv_heads;
        const int64_t length = lengths[r], begin = window && length > window ? length - window : 0;
        const int64_t count = length - begin;
        thread_local std::vector<const float*> keys;
        thread_local std::vector<float> scores;
        keys.clear();
        for (int64_t at = begin; at < length;) {
            const float* block = cache + tables[r * width + at / block_size] * block_size * token + h * d;
            const int64_t end = (at / block_size + 1) * block_size < length ? (at / block_size + 1) * block_size : length;
            for (int64_t offset = at % block_size; at < end; at++, offset++) keys.push_back(block + offset * token);
        }
        scores.resize(count);
        for (int64_t g = 0; g < group; g++) {
            const float* query = q + r * stride + (h * group + g) * d;
            float highest = -INFINITY, sum = 0.f;
            for (int64_t j = 0; j < count; j++) {
                float score = dot(query, keys[j], d) * scale;
                if (softcap > 0.f) score = softcap * std::tanh(score / softcap);
                scores[j] = score;
                highest = score > highest ? score : highest;
            }
            float* score = scores.data();
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < count; j++) {
                score[j] = fast_exp(score[j] - highest);
                sum += score[j];
            }
            const float inverse = 1.f / sum;
            for (int64_t j = 0; j < count; j++) score[j] *= inverse;
            weighted_sum(score, keys.data(), kv_heads * d, count, d, out + ((r * kv_heads + h) * group + g) * d);
        }
    });
}

// The tokens of one prompt chunk attend to their sequence: the last `count` of its `context` tokens.
// q [count, kv_heads * group, d] (tokens `stride` apart), table [blocks of the context], out like q without gaps.
//
// Flash attention (Dao et al. 2022): a tile of query rows (tokens times group) meets the keys panel by panel
// with a running maximum and sum. Panels begin at multiples of their width, whatever the chunk, so that a
// token's result does not depend on how the prompt was cut.
void fl_attend_prefill(const float* q, int64_t count, int64_t stride, int64_t kv_heads, int64_t group, int64_t d,
                       const float* cache, int64_t block_size, const int64_t* table, int64_t context, float scale,
                       int64_t window, float softcap, float* out) {
    constexpr int64_t kTokens = 8;
    const int64_t token = 2 * kv_heads * d, padded = (d + kPanel - 1) / kPanel * kPanel;
    const int64_t tiles = (count + kTokens - 1) / kTokens;
    pool.run(tiles * kv_heads, true, [&](int64_t task) {
        const int64_t first = task / kv_heads * kTokens, h = task % kv_heads;
        const int64_t tokens = count - first < kTokens ? count - first : kTokens, rows = tokens * group;
        const int64_t own = context - count + first;  // position of the tile's first token
        std::vector<float> queries(rows * d), keys(d * kPanel), values(kPanel * padded), scores(rows * kPanel);
        std::vector<float> sums(rows * padded), total(rows), highest(rows, -1e30f);
        for (int64_t r = 0; r < rows; r++) {
            const float* from = q + (first + r / group) * stride + (h * group + r % group) * d;
            for (int64_t i = 0; i < d; i++) queries[r * d + i] = from[i] * scale;
        }
        const int64_t begin = window && own >= window ? (own - window + 1) / kPanel * kPanel : 0;
        for (int64_t at = begin; at < own + tokens; at += kPanel) {
            const int64_t width = own + tokens - at < kPanel ? own + tokens - at : kPanel;
            for (int64_t j = 0; j < kPanel; j++) {
                if (j >= width) {
                    for (int64_t i = 0; i < d; i++) keys[i * kPanel + j] = values[j * padded + i] = 0.f;
                    continue;
                }
                const int64_t slot = table[(at + j) / block_size] * block_size + (at + j) % block_size;
                const float *key = cache + slot * token + h * d, *value = key + kv_heads * d;
                for (int64_t i = 0; i < d; i++) keys[i * kPanel + j] = key[i];
                std::memcpy(&values[j * padded], value, d * sizeof(float));
            }
            float_product(rows, queries.data(), d, d, keys.data(), kPanel, kPanel, scores.data(), kPanel, false);
            for (int64_t r = 0; r < rows; r++) {
                float* score = &scores[r * kPanel];
                const int64_t position = own + r / group;
                const int64_t low = window && position - window + 1 > at ? position - window + 1 - at : 0;
                const int64_t high = position - at + 1 < kPanel ? position - at + 1 : kPanel;
                if (softcap > 0.f) {
                    for (int64_t j = low; j < high; j++) score[j] = softcap * std::tanh(score[j] / softcap);
                }
                float peak = highest[r], sum = 0.f;
                for (int64_t j = low; j < high; j++) peak = score[j] > peak ? score[j] : peak;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < kPanel; j++) {
                    score[j] = j >= low && j < high ? fast_exp(score[j] - peak) : 0.f;
                    sum += score[j];
                }
                const float fade = fast_exp(highest[r] - peak);
                highest[r] = peak;
                total[r] = total[r] * fade + sum;
                for (int64_t i = 0; i < padded; i++) sums[r * padded + i] *= fade;
            }
            float_product(rows, scores.data(), kPanel, kPanel, values.data(), padded, padded, sums.data(), padded, true);
        }
        for (int64_t r = 0; r < rows; r++) {
            float* to = out + ((first + r / group) * kv_heads * group + h * group + r % group) * d;
            const float inverse = 1.f / total[r];
            for (int64_t i = 0; i < d; i++) to[i] = sums[r * padded + i] * inverse;
        }
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
