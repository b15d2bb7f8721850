// Chooses a row's next token from its logits: what is asked of it is applied, the tokens that may be drawn are cut out
// without sorting the vocabulary, and one is drawn. torch_engine/core/sampling.py has the definition and the same in PyTorch.
//
// Tokens have the order (value descending, id ascending), which is that of their keys: 64-bit numbers, the value's
// order-preserving bits above the id's complement. A cut is a key: what is not below it may be drawn.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 64;    // values with one maximum: blocks below a cut are not looked into
constexpr int64_t kPart = 1024;   // tokens that are drawn from together
constexpr int64_t kShort = 256;   // candidates that are tried for a nucleus before all tokens are weighed
constexpr int kBinBits = 13;      // of a value's ordered bits: 16 bins for each power of two
constexpr uint32_t kTokenStream = 0, kPartStream = 1;
constexpr float kInfinity = std::numeric_limits<float>::infinity(), kMost = std::numeric_limits<float>::max();

// What is asked of one token, and what the sequence has said before. Mirrored in native.py.
struct SamplingRow {
    const uint32_t* allowed;  // a bit for each token that may come next; null = all may
    const uint8_t* seen;  // a bit for each token of prompt and output; null = no repetition penalty
    const int32_t* generated;
    const float* amounts;  // subtracted from the logits of `generated`
    int64_t num_generated;
    const int32_t* bias_ids;
    const float* biases;
    int64_t num_biases;
    const int32_t* banned;  // never
    int64_t num_banned;
    const int32_t* matched;  // not now: bad words of which only these are missing
    int64_t num_matched;
    const int32_t* ends;  // not before position `ends_from`
    int64_t num_ends, ends_from;
    uint64_t seed;
    int64_t top_k;     // 0 = no limit
    int64_t num_top;   // log-probabilities of so many likely tokens; -1 = not even the chosen one's
    double temperature;  // 0 = greedy
    double top_p;        // 1 = no limit
    double least;        // min-p: how far below the highest logit a token may be; -inf = no limit
    float repetition;
};

constexpr int kHalf = kLanes / 2;  // doubles in a vector
typedef float Narrow __attribute__((vector_size(kHalf * 4), aligned(4)));
typedef double Doubles __attribute__((vector_size(kHalf * 8), aligned(8)));
typedef int64_t Longs __attribute__((vector_size(kHalf * 8), aligned(8)));

// e^x in double precision for x <= 0 (below -700: e^-700), as fast_exp with Taylor's polynomial.
__attribute__((always_inline)) inline Doubles exact_exp(Doubles x) {
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
    const Doubles least = Doubles{} - 700.0;
    x = x < least ? least : x;
    const Doubles shifted = x * 1.4426950408889634 + kRound, n = shifted - kRound;
    const Doubles r = x - n * 0.693145751953125 - n * 1.42860682030941723212e-6;
    constexpr double kFactors[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                                   1. / 720,       1. / 120,      1. / 24,      1. / 6,      1. / 2,     1., 1.};
    Doubles p = Doubles{};
#pragma GCC unroll 16
    for (double factor : kFactors) p = p * r + factor;
    const Longs power = ((Longs)shifted << 52) + (int64_t{1023} << 52);
    return p * (Doubles)power;
}

inline uint32_t ordered(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float from_ordered(uint32_t bits) {
    bits = bits & 0x80000000u ? bits ^ 0x80000000u : ~bits;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint64_t key_of(float value, int64_t id) {
    return uint64_t{ordered(value)} << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(id));
}

inline float value_of(uint64_t key) { return from_ordered(key >> 32); }
inline int64_t id_of(uint64_t key) { return static_cast<uint32_t>(~static_cast<uint32_t>(key)); }

const uint64_t kFinite = key_of(-kMost, 0xffffffff);  // the cut that leaves every finite value

// Words of Philox-4x32-10 (Salmon et al. 2011) for the tokens or parts 4 * block to 4 * block + 3.
inline void philox(uint64_t seed, uint32_t block, uint32_t position, uint32_t stream, uint32_t* out) {
    uint32_t c0 = block, c1 = position, c2 = stream, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t a = uint64_t{c0} * 0xD2511F53u, b = uint64_t{c2} * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(a);
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

inline double gumbel(uint32_t word) {
    const float v = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
    return -std::log(-std::log1p(-static_cast<double>(std::min(v, 1.f - 0x1p-24f))));
}

constexpr double kMostNoise = 22.88;

// Logarithms of weights that are added up in single precision, and not at all, beside a sum of at least 1: of a
// vocabulary of a million tokens this leaves out no more than double precision does.
constexpr double kLittle = -28, kNothing = -52;

// Noise of one stream; ids that come in ascending order cost a generator's call for each four.
class Noise {
   public:
    Noise(uint64_t seed, int64_t position, uint32_t stream)
        : seed_(seed), position_(static_cast<uint32_t>(position)), stream_(stream) {}

    double of(int64_t number) { return gumbel(word(number)); }

    uint32_t word(int64_t number) {
        if (number / 4 != block_) {
            block_ = number / 4;
            philox(seed_, static_cast<uint32_t>(block_), position_, stream_, words_);
        }
        return words_[number % 4];
    }

   private:
    uint64_t seed_;
    uint32_t position_, stream_;
    int64_t block_ = -1;
    uint32_t words_[4];
};

struct Weighed {
    uint64_t key;
    double weight;
};

// A thread's memory, kept from row to row.
struct Scratch {
    std::vector<float> raw, highest, sorted, values;
    std::vector<int32_t> ids;
    std::vector<double> bins, scores;
    std::vector<uint64_t> keys;
    std::vector<int64_t> begins;
    std::vector<Weighed> weighed;
};

// A row of logits with the highest of each block.
class Logits {
   public:
    Logits(float* x, int64_t n, Scratch& scratch) : x_(x), n_(n), scratch_(scratch) {
        scratch.highest.resize((n + kBlock - 1) / kBlock);
    }

    // Finds what is highest; before it and after every change nothing else may be asked. In place: NaN becomes -inf,
    // +inf the largest number, -0 0.
    void survey() {
        const Floats lowest = Floats{} - kInfinity, most = Floats{} + kMost;
        float* x = x_;
        max_ = -kInfinity;
        for (int64_t b = 0; b < blocks(); b++) {
            const int64_t begin = b * kBlock, end = std::min(n_, begin + kBlock);
            Floats high = lowest;
            int64_t i = begin;
            for (; i + kLanes <= end; i += kLanes) {
                Floats v = *reinterpret_cast<Floats*>(x + i);
                v = v == v ? v : lowest;
                v = v > most ? most : v;
                const Words bits = (Words)v;
                v = (Floats)(bits == 0x80000000u ? Words{} : bits);
                *reinterpret_cast<Floats*>(x + i) = v;
                high = v > high ? v : high;
            }
            float highest = -kInfinity;
            for (int lane = 0; lane < kLanes; lane++) highest = high[lane] > highest ? high[lane] : highest;
            for (; i < end; i++) {
                uint32_t bits;
                std::memcpy(&bits, x + i, 4);
                if (std::isnan(x[i])) x[i] = -kInfinity;
                if (x[i] > kMost) x[i] = kMost;
                if (bits == 0x80000000u) std::memset(x + i, 0, 4);
                highest = x[i] > highest ? x[i] : highest;
            }
            scratch_.highest[b] = highest;
            max_ = highest > max_ ? highest : max_;
        }
    }

    float max() const { return max_; }

    int64_t argmax() const {
        for (size_t b = 0; b < scratch_.highest.size(); b++) {
            if (scratch_.highest[b] != max_) continue;
            int64_t i = b * kBlock;
            while (x_[i] != max_) i++;
            return i;
        }
        return -1;
    }

    // log sum e^x.
    double log_sum() const {
        double sum = 0;
        for (int64_t begin = 0; begin < n_; begin += kPart) {
            sum += sum_exp(x_ + begin, std::min(kPart, n_ - begin), max_, 1.f);
        }
        return max_ + std::log(sum);
    }

    // Calls body(id, value) for all tokens not below the cut, ids ascending.
    template <class Body>
    void above(uint64_t cut, const Body& body) const {
        const float least = value_of(cut);
        for (size_t b = 0; b < scratch_.highest.size(); b++) {
            if (scratch_.highest[b] < least) continue;
            const int64_t begin = b * kBlock, end = std::min(n_, begin + kBlock);
            for (int64_t i = begin; i < end; i++) {
                if (x_[i] >= least && key_of(x_[i], i) >= cut) body(i, x_[i]);
            }
        }
    }

    // The same as two lists. Without a branch for each token, since of flat rows any may be kept.
    void collect(uint64_t cut, std::vector<float>& values, std::vector<int32_t>& ids) const {
        const float least = value_of(cut);
        const int64_t last = id_of(cut);
        values.resize(n_ + 1), ids.resize(n_ + 1);
        float* value = values.data();
        int32_t* id = ids.data();
        int64_t count = 0;
        for (size_t b = 0; b < scratch_.highest.size(); b++) {
            if (scratch_.highest[b] < least) continue;
            const int64_t begin = b * kBlock, end = std::min(n_, begin + kBlock);
            for (int64_t i = begin; i < end; i++) {
                value[count] = x_[i];
                id[count] = static_cast<int32_t>(i);
                count += (x_[i] > least) | ((x_[i] == least) & (i <= last));
            }
        }
        values.resize(count), ids.resize(count);
    }

    // A cut that leaves at least `count` tokens, or all finite ones, and seldom many more; count <= blocks.
    uint64_t roughly(int64_t count) const {
        auto& sorted = scratch_.sorted;
        sorted = scratch_.highest;
        std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<float>());
        const float value = sorted[count - 1];
        return value == -kInfinity ? kFinite : key_of(value, 0xffffffff);
    }

    float highest(int64_t block) const { return scratch_.highest[block]; }
    int64_t blocks() const { return scratch_.highest.size(); }
    const float* data() const { return x_; }
    int64_t size() const { return n_; }

    // Sum of e^((x - max) / temperature) for all n values.
    static double sum_exp(const float* x, int64_t n, float max, float temperature) {
        Floats sums = {};
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            sums += fast_exp((*reinterpret_cast<const Floats*>(x + i) - max) / temperature);
        }
        double sum = 0;
        for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
        for (; i < n; i++) sum += std::exp((x[i] - max) / temperature);
        return sum;
    }

   private:
    float* x_;
    int64_t n_;
    Scratch& scratch_;
    float max_ = -kInfinity;
};

// The cut among `tokens` that leaves those before which, from the highest on, there is less than `target` weight; the
// first stays in any case. `before` is what tokens have that are higher than all of these. Changes their order.
uint64_t weighed_cut(std::vector<Weighed>& tokens, double before, double target) {
    auto begin = tokens.begin(), end = tokens.end();
    uint64_t cut = ~uint64_t{0};
    const auto higher = [](const Weighed& a, const Weighed& b) { return a.key > b.key; };
    while (end - begin > 32) {
        const uint64_t first = begin->key, middle = begin[(end - begin) / 2].key, last = end[-1].key;
        const uint64_t pivot = std::max(std::min(first, middle), std::min(std::max(first, middle), last));
        const auto split = std::partition(begin, end, [&](const Weighed& token) { return token.key > pivot; });
        double weight = before;
        for (auto token = begin; token != split; token++) weight += token->weight;
        if (weight >= target) {
            end = split;
        } else {
            // The pivot follows next: taken out, so that every round ends with fewer tokens.
            for (auto token = split; token != end; token++) {
                if (token->key == pivot) {
                    std::swap(*token, *split);
                    break;
                }
            }
            cut = pivot;
            before = weight + split->weight;
            begin = split + 1;
            if (before >= target) return cut;
        }
    }
    std::sort(begin, end, higher);
    for (auto token = begin; token != end; token++) {
        if (before >= target && cut != ~uint64_t{0}) break;
        cut = token->key;
        before += token->weight;
    }
    return cut;
}

// The same cut among all tokens: `weights(i)` are those of the kHalf tokens from i on, `weight(i)` is one's.
template <class Weights, class Weight>
uint64_t binned_cut(const Logits& logits, double target, Scratch& scratch, const Weights& weights, const Weight& weight) {
    constexpr int64_t kBins = int64_t{1} << kBinBits;
    constexpr int kShift = 32 - kBinBits;
    const float* x = logits.data();
    const int64_t n = logits.size(), whole = n / kHalf * kHalf;
    scratch.bins.assign(kBins, 0);
    double* bins = scratch.bins.data();
    for (int64_t i = 0; i < whole; i += kHalf) {
        const Doubles each = weights(i);
        for (int lane = 0; lane < kHalf; lane++) bins[ordered(x[i + lane]) >> kShift] += each[lane];
    }
    for (int64_t i = whole; i < n; i++) bins[ordered(x[i]) >> kShift] += weight(i);
    const int64_t last = ordered(-kMost) >> kShift;  // of finite values
    int64_t bin = kBins - 1;
    double before = 0;
    while (bin > last && before + bins[bin] < target) before += bins[bin--];
    auto& tokens = scratch.weighed;
    tokens.clear();
    const uint64_t low = std::max(static_cast<uint64_t>(bin) << (64 - kBinBits), kFinite);
    logits.above(low, [&](int64_t id, float value) {
        if (ordered(value) >> kShift == bin) tokens.push_back({key_of(value, id), weight(id)});
    });
    return tokens.empty() ? low : weighed_cut(tokens, before, target);
}

// The first top_k tokens.
uint64_t top_k_cut(const Logits& logits, int64_t top_k, Scratch& scratch) {
    if (top_k > logits.blocks()) {
        return binned_cut(
            logits, top_k, scratch, [](int64_t) { return Doubles{} + 1.0; }, [](int64_t) { return 1.0; });
    }
    auto& tokens = scratch.weighed;
    tokens.clear();
    logits.above(logits.roughly(top_k), [&](int64_t id, float value) { tokens.push_back({key_of(value, id), 1}); });
    return weighed_cut(tokens, 0, top_k);
}

// The smallest set with at least top_p of the mass that `cut` left.
uint64_t top_p_cut(const Logits& logits, uint64_t cut, double temperature, double top_p, Scratch& scratch) {
    auto& tokens = scratch.weighed;
    const float* x = logits.data();
    const double max = logits.max(), factor = 1 / temperature;
    const auto weights = [&](int64_t i) {
        const Narrow values = *reinterpret_cast<const Narrow*>(x + i);
        return exact_exp((__builtin_convertvector(values, Doubles) - max) * factor);
    };
    const auto weight = [&](int64_t i) { return std::exp((x[i] - max) * factor); };
    const auto collect = [&](uint64_t from) {
        double mass = 0;
        tokens.clear();
        logits.above(from, [&](int64_t id, float value) {
            tokens.push_back({key_of(value, id), weight(id)});
            mass += tokens.back().weight;
        });
        return mass;
    };
    if (cut != kFinite) {
        const double mass = collect(cut);
        return weighed_cut(tokens, 0, top_p * mass);
    }
    const int64_t n = logits.size();
    Doubles sums = {};
    double mass = 0;
    for (int64_t b = 0; b < logits.blocks(); b++) {
        const int64_t begin = b * kBlock, end = std::min(n, begin + kBlock);
        const double high = (logits.highest(b) - max) * factor;
        if (high < kNothing) continue;
        if (high < kLittle) {
            mass += Logits::sum_exp(x + begin, end - begin, logits.max(), static_cast<float>(temperature));
            continue;
        }
        int64_t i = begin;
        for (; i + kHalf <= end; i += kHalf) sums += weights(i);
        for (; i < end; i++) mass += weight(i);
    }
    for (int lane = 0; lane < kHalf; lane++) mass += sums[lane];
    const double target = top_p * mass;
    const uint64_t likely = logits.roughly(std::min(kShort, logits.blocks()));
    return collect(likely) < target ? binned_cut(logits, target, scratch, weights, weight)
                                    : weighed_cut(tokens, 0, target);
}

// Where score(i) + noise is highest, i in [0, count); -1 if there is no finite score.
template <class Score, class Number>
inline int64_t noisiest(int64_t count, Noise noise, const Score& score, const Number& number) {
    int64_t best = -1;
    double highest = -kInfinity;
    for (int64_t i = 0; i < count; i++) {
        const double value = score(i);
        if (!(value + kMostNoise > highest) || value == -kInfinity) continue;
        const double noisy = value + noise.of(number(i));
        if (noisy > highest) highest = noisy, best = i;
    }
    return best;
}

// Draws a token not below the cut: a part by its mass, then a token of it (Gumbel-max, twice).
int64_t draw(const Logits& logits, uint64_t cut, const SamplingRow& row, int64_t position, Scratch& scratch) {
    auto& values = scratch.values;
    auto& ids = scratch.ids;
    const float max = logits.max(), temperature = static_cast<float>(row.temperature);
    auto& begins = scratch.begins;
    auto& scores = scratch.scores;
    begins.clear(), scores.clear();
    const float* x = logits.data();
    int64_t count = logits.size();
    const bool all = cut == kFinite;
    if (all) {
        for (int64_t begin = 0; begin < count; begin += kPart) begins.push_back(begin);
    } else {
        logits.collect(cut, values, ids);
        x = values.data();
        count = values.size();
        if (count == 1) return ids[0];
        for (int64_t i = 0; i < count; i++) {
            if (i == 0 || ids[i] / kPart != ids[i - 1] / kPart) begins.push_back(i);
        }
    }
    begins.push_back(count);
    const int64_t parts = begins.size() - 1;
    for (int64_t p = 0; p < parts; p++) {
        const float* from = x + begins[p];
        const int64_t size = begins[p + 1] - begins[p];
        float high = -kInfinity;
#pragma omp simd reduction(max : high)
        for (int64_t i = 0; i < size; i++) high = from[i] > high ? from[i] : high;
        scores.push_back(high == -kInfinity ? -kInfinity
                                            : (double{high} - max) / row.temperature +
                                                  std::log(Logits::sum_exp(from, size, high, temperature)));
    }
    const auto id = [&](int64_t i) { return all ? i : int64_t{ids[i]}; };
    const int64_t part = noisiest(
        parts, Noise(row.seed, position, kPartStream), [&](int64_t p) { return scores[p]; },
        [&](int64_t p) { return id(begins[p]) / kPart; });
    const int64_t begin = begins[part];
    const int64_t token = noisiest(
        begins[part + 1] - begin, Noise(row.seed, position, kTokenStream),
        [&](int64_t i) { return (double{x[begin + i]} - max) / row.temperature; },
        [&](int64_t i) { return id(begin + i); });
    return id(begin + token);
}

inline void ban(float* x, int64_t n, const int32_t* ids, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < n) x[ids[i]] = -kInfinity;
    }
}

bool adjusts(const SamplingRow& row, int64_t position) {
    return row.num_biases || row.seen || row.num_generated || row.num_banned || row.num_matched ||
           (row.num_ends && position < row.ends_from) || row.allowed;
}

// Leaves only what a grammar allows.
void mask(float* x, int64_t n, const uint32_t* allowed) {
    for (int64_t from = 0; from < n; from += 32) {
        const uint32_t bits = allowed[from / 32];
        const int64_t end = std::min(n, from + 32);
        if (bits == 0) {
            std::fill(x + from, x + end, -kInfinity);
        } else if (bits != 0xffffffffu) {
            for (int64_t i = from; i < end; i++) x[i] = bits >> (i - from) & 1 ? x[i] : -kInfinity;
        }
    }
}

// Bias, penalties, bans and the mask, in place.
void adjust(float* x, int64_t n, const SamplingRow& row, int64_t position) {
    for (int64_t i = 0; i < row.num_biases; i++) {
        if (row.bias_ids[i] < n) x[row.bias_ids[i]] += row.biases[i];
    }
    if (row.seen) {
        const auto punish = [&](int64_t id) {
            const float value = x[id] > kMost ? kMost : x[id];
            x[id] = value > 0 ? value / row.repetition : value * row.repetition;
        };
        for (int64_t from = 0; from < n; from += 64) {
            uint64_t bits;  // `seen` has whole words
            std::memcpy(&bits, row.seen + from / 8, 8);
            for (; bits; bits &= bits - 1) punish(from + __builtin_ctzll(bits));
        }
    }
    for (int64_t i = 0; i < row.num_generated; i++) x[row.generated[i]] -= row.amounts[i];
    ban(x, n, row.banned, row.num_banned);
    ban(x, n, row.matched, row.num_matched);
    if (position < row.ends_from) ban(x, n, row.ends, row.num_ends);
    if (row.allowed) mask(x, n, row.allowed);
}

// The lowest value that is not more than -least below max, in double precision; 0 and not -0.
float lowest_within(float max, double least) {
    float value = static_cast<float>(max + least);
    while (double{value} - max < least) value = std::nextafter(value, kInfinity);
    for (float lower; double{lower = std::nextafter(value, -kInfinity)} - max >= least;) value = lower;
    return value == 0 ? 0.f : value;
}

uint64_t cut_of(const Logits& logits, const SamplingRow& row, Scratch& scratch) {
    uint64_t cut = kFinite;
    if (row.top_k) cut = std::max(cut, top_k_cut(logits, row.top_k, scratch));
    if (row.top_p < 1) cut = std::max(cut, top_p_cut(logits, cut, row.temperature, row.top_p, scratch));
    if (row.least > -kInfinity) cut = std::max(cut, key_of(lowest_within(logits.max(), row.least), 0xffffffff));
    return cut;
}

// The next token of logits x [n], which are changed; -1 if none is finite. Log-probabilities, where they are asked for,
// are of the logits as they came: the chosen token's, and of the most likely ones, the likeliest first.
int64_t choose(float* x, int64_t n, const SamplingRow& row, int64_t position, float* log_prob, int32_t* top_ids,
               float* top_log_probs) {
    thread_local Scratch scratch;
    Logits logits(x, n, scratch);
    const bool adjusted = adjusts(row, position), told = row.num_top >= 0;
    const float* raw = x;
    double normaliser = 0;
    if (told) {
        logits.survey();
        if (logits.max() == -kInfinity) return -1;
        normaliser = logits.log_sum();
        if (row.num_top) {
            auto& keys = scratch.keys;
            keys.clear();
            logits.above(top_k_cut(logits, row.num_top, scratch),
                         [&](int64_t id, float value) { keys.push_back(key_of(value, id)); });
            std::sort(keys.begin(), keys.end(), std::greater<uint64_t>());
            for (uint64_t key : keys) {
                *top_ids++ = static_cast<int32_t>(id_of(key));
                *top_log_probs++ = static_cast<float>(value_of(key) - normaliser);
            }
        }
        if (adjusted) {
            scratch.raw.assign(x, x + n);
            raw = scratch.raw.data();
        }
    }
    if (adjusted) adjust(x, n, row, position);
    if (adjusted || !told) logits.survey();
    if (logits.max() == -kInfinity) return -1;
    int64_t token;
    if (row.temperature == 0) {
        token = logits.argmax();
    } else {
        token = draw(logits, cut_of(logits, row, scratch), row, position, scratch);
    }
    *log_prob = told ? static_cast<float>(raw[token] - normaliser) : 0.f;
    return token;
}

}  // namespace
