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
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 64;    // values with one maximum: blocks below a cut are not looked into
constexpr int64_t kPart = 1024;   // tokens that are drawn from together
constexpr int64_t kShort[] = {32, 256};  // candidates that are tried for a nucleus before all tokens are weighed
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

// A number in (0, 1).
inline float uniform(uint32_t word) {
    return std::min((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.f - 0x1p-24f);
}

// Not above -log of the uniform number.
inline double gumbel(uint32_t word) { return -std::log(-std::log1p(-static_cast<double>(uniform(word)))); }

// How far weights in single precision and their sums may be from those in double precision, as a share of them: fast_exp2
// has 18 bits, adding up kPart values loses at most 2^-17, and rounding x makes e^x wrong by x 2^-22 (where x is below -40,
// nothing depends on the weight).
constexpr double kSingle = 2e-5;

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
    std::vector<float> raw, highest, values, weights, bounds;
    std::vector<int32_t> ids;
    std::vector<uint64_t> keys;
    std::vector<Weighed> weighed;
};

// Calls body(i) for all i in [0, n) with least <= x[i] <= most, ascending.
template <class Body>
inline void each_within(const float* x, int64_t n, float least, float most, const Body& body) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Floats values = *reinterpret_cast<const Floats*>(x + i);
        uint32_t bits = at_least(values, least) & at_least(-values, -most);
        for (; bits; bits &= bits - 1) body(i + __builtin_ctz(bits));
    }
    for (; i < n; i++) {
        if (x[i] >= least && x[i] <= most) body(i);
    }
}

inline int64_t count_at_least(const float* x, int64_t n, float least) {
    int64_t i = 0, count = 0;
    for (; i + kLanes <= n; i += kLanes) {
        count += __builtin_popcount(at_least(*reinterpret_cast<const Floats*>(x + i), least));
    }
    for (; i < n; i++) count += x[i] >= least;
    return count;
}

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
        Words changed = {};
        max_ = -kInfinity;
        for (int64_t b = 0; b < blocks(); b++) {
            const int64_t begin = b * kBlock, end = std::min(n_, begin + kBlock);
            Floats high = lowest;
            int64_t i = begin;
            for (; i + kLanes <= end; i += kLanes) {
                const Floats v = *reinterpret_cast<Floats*>(x_ + i);
                Floats tidy = v == v ? v : lowest;
                tidy = tidy > most ? most : tidy;
                const Words bits = (Words)v;
                changed |= (Words)(bits == 0x80000000u) | (Words)(v != tidy);
                high = tidy > high ? tidy : high;
            }
            float highest = highest_of(high);
            for (; i < end; i++) {
                x_[i] = tidied(x_[i]);
                highest = x_[i] > highest ? x_[i] : highest;
            }
            scratch_.highest[b] = highest;
            max_ = highest > max_ ? highest : max_;
        }
        uint32_t any = 0;
        for (int lane = 0; lane < kLanes; lane++) any |= changed[lane];
        if (any) std::transform(x_, x_ + n_, x_, tidied);
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
            sum += sum_exp(x_ + begin, std::min(kPart, n_ - begin), max_);
        }
        return max_ + std::log(sum);
    }

    // Calls body(block) for those with a value not below `least`, ascending.
    template <class Body>
    void each_block(float least, const Body& body) const {
        each_within(highest(), blocks(), least, kInfinity, body);
    }

    // Calls body(id, value) for all tokens not below the cut, ids ascending.
    template <class Body>
    void above(uint64_t cut, const Body& body) const {
        each_block(value_of(cut), [&](int64_t block) { above(cut, block, body); });
    }

    // The same of one block.
    template <class Body>
    void above(uint64_t cut, int64_t block, const Body& body) const {
        const int64_t begin = block * kBlock, last = id_of(cut);
        const float* x = x_ + begin;
        const float least = value_of(cut);
        each_within(x, std::min(n_ - begin, kBlock), least, kInfinity, [&](int64_t i) {
            if (x[i] > least || begin + i <= last) body(begin + i, x[i]);
        });
    }

    // Writes a block's tokens that are not below the cut, ids ascending; returns how many.
    int64_t collect(uint64_t cut, int64_t block, float* values, int32_t* ids) const {
        const int64_t begin = block * kBlock, size = std::min(n_ - begin, kBlock);
        if (count(block, value_of(cut)) == size && begin + size - 1 <= id_of(cut)) {
            std::copy_n(x_ + begin, size, values);
            std::iota(ids, ids + size, static_cast<int32_t>(begin));
            return size;
        }
        int64_t found = 0;
        above(cut, block, [&](int64_t id, float value) {
            values[found] = value, ids[found++] = static_cast<int32_t>(id);
        });
        return found;
    }

    // Values of a block that are not below `least`.
    int64_t count(int64_t block, float least) const {
        const int64_t begin = block * kBlock;
        return count_at_least(x_ + begin, std::min(n_ - begin, kBlock), least);
    }

    // A cut that leaves at least `count` tokens, or all finite ones, and seldom many more; count <= blocks.
    uint64_t roughly(int64_t count) const {
        uint32_t low = ordered(-kMost), high = ordered(max_);
        while (high - low > 1) {
            const uint32_t middle = low + (high - low) / 2;
            const int64_t found = count_at_least(highest(), blocks(), from_ordered(middle));
            (found < count ? high : low) = middle;
            if (found >= count && found < 2 * count) break;
        }
        return key_of(from_ordered(low), 0xffffffff);
    }

    float highest(int64_t block) const { return scratch_.highest[block]; }
    const float* highest() const { return scratch_.highest.data(); }
    int64_t blocks() const { return scratch_.highest.size(); }
    const float* data() const { return x_; }
    int64_t size() const { return n_; }

    // Sum of e^(x - max) for all n values.
    static double sum_exp(const float* x, int64_t n, float max) {
        Floats sums = {};
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) sums += fast_exp(*reinterpret_cast<const Floats*>(x + i) - max);
        double sum = 0;
        for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
        for (; i < n; i++) sum += std::exp(x[i] - max);
        return sum;
    }

   private:
    static float tidied(float value) {
        if (std::isnan(value)) return -kInfinity;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return bits == 0x80000000u ? 0.f : std::min(value, kMost);
    }

    float* x_;
    int64_t n_;
    Scratch& scratch_;
    float max_ = -kInfinity;
};

struct Cut {
    uint64_t key;
    double weight;  // of all that is left
};

// The cut among `tokens` that leaves those before which, from the highest on, there is less than `target` weight; the
// first stays in any case. `before` is what tokens have that are higher than all of these. Changes their order.
Cut weighed_cut(std::vector<Weighed>& tokens, double before, double target) {
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
            if (before >= target) return {cut, before};
        }
    }
    std::sort(begin, end, higher);
    for (auto token = begin; token != end; token++) {
        if (before >= target && cut != ~uint64_t{0}) break;
        cut = token->key;
        before += token->weight;
    }
    return {cut, before};
}

// e^((x - max) / temperature) but for kSingle.
class Weigher {
   public:
    Weigher(float max, double temperature) : max_(max), factor_(static_cast<float>(1.4426950408889634 / temperature)) {}

    Floats of(Floats x) const { return fast_exp2((x - max_) * factor_); }

    // to [n] = the weights of x [n].
    void weigh(const float* x, int64_t n, float* to) const {
        map(x, x, n, to, [&](Floats values, Floats) { return of(values); });
    }

    double sum(const float* x, int64_t n) const {
        double sum = 0;
        for (int64_t begin = 0; begin < n; begin += kPart) {
            const int64_t end = std::min(n, begin + kPart);
            Floats sums = {}, last = Floats{} - kInfinity;
            int64_t i = begin;
            for (; i + kLanes <= end; i += kLanes) sums += of(*reinterpret_cast<const Floats*>(x + i));
            std::memcpy(&last, x + i, (end - i) * sizeof(float));
            sums += of(last);
            for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
        }
        return sum;
    }

   private:
    float max_, factor_;
};

// The weight of tokens above a value, in single precision.
double weight_above(const float* x, const float* weights, int64_t n, float value) {
    const Floats limit = Floats{} + value;
    double sum = 0;
    for (int64_t begin = 0; begin < n; begin += kPart) {
        const int64_t end = std::min(n, begin + kPart);
        Floats sums = {};
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) {
            const Floats weight = *reinterpret_cast<const Floats*>(weights + i);
            sums += *reinterpret_cast<const Floats*>(x + i) > limit ? weight : Floats{};
        }
        for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
        for (; i < end; i++) sum += x[i] > value ? weights[i] : 0;
    }
    return sum;
}

// The same cut among all tokens: between two values that halving finds by `singles` [n], weights in single precision.
// `weights(i)` are the kHalf ones from i on in double precision, `weight(i)` is one.
template <class Weights, class Weight>
uint64_t halved_cut(const Logits& logits, const std::vector<float>& singles, double target, Scratch& scratch,
                    const Weights& weights, const Weight& weight) {
    constexpr uint32_t kNear = 1 << 13;  // a difference of ordered values that few tokens share
    const float* x = logits.data();
    const int64_t n = logits.size();
    uint32_t low = ordered(-kMost), high = ordered(logits.max());  // the cut's value is in between
    while (high - low > kNear) {
        const uint32_t middle = low + (high - low) / 2;
        const double above = weight_above(x, singles.data(), n, from_ordered(middle));
        if (above * (1 + kSingle) < target) {
            high = middle;
        } else if (above * (1 - kSingle) >= target) {
            low = middle + 1;
        } else {
            break;
        }
    }
    const float most = from_ordered(high);
    Doubles sums = {};
    double before = 0;
    for (int64_t b = 0; b < logits.blocks(); b++) {
        if (logits.highest(b) <= most) continue;
        const int64_t end = std::min(n, (b + 1) * kBlock);
        int64_t i = b * kBlock;
        for (; i + kHalf <= end; i += kHalf) {
            const Narrow values = *reinterpret_cast<const Narrow*>(x + i);
            sums += __builtin_convertvector(values, Doubles) > double{most} ? weights(i) : Doubles{};
        }
        for (; i < end; i++) before += x[i] > most ? weight(i) : 0;
    }
    for (int lane = 0; lane < kHalf; lane++) before += sums[lane];
    auto& tokens = scratch.weighed;
    tokens.clear();
    const float least = from_ordered(low);
    logits.each_block(least, [&](int64_t b) {
        const int64_t begin = b * kBlock;
        each_within(x + begin, std::min(n - begin, kBlock), least, most, [&](int64_t i) {
            tokens.push_back({key_of(x[begin + i], begin + i), weight(begin + i)});
        });
    });
    return tokens.empty() ? key_of(least, 0xffffffff) : weighed_cut(tokens, before, target).key;
}

// The first top_k tokens.
uint64_t top_k_cut(const Logits& logits, int64_t top_k, Scratch& scratch) {
    if (top_k > logits.blocks()) {
        scratch.weights.assign(logits.size(), 1);
        return halved_cut(
            logits, scratch.weights, top_k, scratch, [](int64_t) { return Doubles{} + 1.0; },
            [](int64_t) { return 1.0; });
    }
    auto& tokens = scratch.weighed;
    tokens.clear();
    logits.above(logits.roughly(top_k), [&](int64_t id, float value) { tokens.push_back({key_of(value, id), 1}); });
    return weighed_cut(tokens, 0, top_k).key;
}

// The smallest set with at least top_p of the mass that `cut` left.
uint64_t top_p_cut(const Logits& logits, uint64_t cut, double temperature, double top_p, Scratch& scratch) {
    auto& tokens = scratch.weighed;
    const float* x = logits.data();
    const int64_t n = logits.size();
    const double max = logits.max(), factor = 1 / temperature;
    const auto weights = [&](int64_t i) {
        const Narrow values = *reinterpret_cast<const Narrow*>(x + i);
        return exact_exp((__builtin_convertvector(values, Doubles) - max) * factor);
    };
    const auto weight = [&](int64_t i) { return std::exp((x[i] - max) * factor); };
    double mass = 0;
    const auto collect = [&](uint64_t from) {
        tokens.clear(), mass = 0;
        logits.above(from, [&](int64_t id, float value) {
            tokens.push_back({key_of(value, id), weight(id)});
            mass += tokens.back().weight;
        });
    };
    if (cut != kFinite) {
        collect(cut);
        return weighed_cut(tokens, 0, top_p * mass).key;
    }
    // Mostly a few tokens and the mass in single precision are enough to be sure of the cut.
    const Weigher weigher(logits.max(), temperature);
    const double about = top_p * weigher.sum(x, n);
    for (int64_t count : kShort) {
        collect(logits.roughly(std::min(count, logits.blocks())));
        const Cut found = weighed_cut(tokens, 0, about * (1 - kSingle));
        if (found.weight >= about * (1 + kSingle)) return found.key;
    }
    mass = 0;
    Doubles sums = {};
    int64_t i = 0;
    for (; i + kHalf <= n; i += kHalf) sums += weights(i);
    for (; i < n; i++) mass += weight(i);
    for (int lane = 0; lane < kHalf; lane++) mass += sums[lane];
    scratch.weights.resize(n);
    weigher.weigh(x, n, scratch.weights.data());
    return halved_cut(logits, scratch.weights, top_p * mass, scratch, weights, weight);
}

// Where score(i) + noise of number(i) is highest, i in [0, count). bounds [count] are not below e^score, but for kSingle, and
// are changed: with -log of the uniform number as a bound of the noise they exclude almost all i without score or logarithm.
template <class Number, class Score>
int64_t noisiest(float* bounds, int64_t count, Noise noise, const Number& number, const Score& score) {
    for (int64_t i = 0; i < count; i++) bounds[i] /= uniform(noise.word(number(i)));
    const int64_t likely = std::max_element(bounds, bounds + count) - bounds;
    int64_t best = likely;
    double highest = -kInfinity, least = 0;  // e^highest
    const auto compare = [&](int64_t i) {
        const double noisy = score(i) + noise.of(number(i));
        if (!(noisy > highest)) return;
        best = i, highest = noisy, least = std::exp(noisy) * (1 - 2 * kSingle);
    };
    compare(likely);
    for (int64_t i = 0; i < count; i++) {
        if (bounds[i] >= least && i != likely) compare(i);
    }
    return best;
}

// Draws a token not below the cut: a part by its mass, then a token of it (Gumbel-max, twice).
int64_t draw(const Logits& logits, uint64_t cut, const SamplingRow& row, int64_t position, Scratch& scratch) {
    constexpr int64_t kBlocks = kPart / kBlock;
    auto& values = scratch.values;
    auto& ids = scratch.ids;
    auto& weights = scratch.weights;
    auto& bounds = scratch.bounds;
    const float max = logits.max(), temperature = static_cast<float>(row.temperature);
    const int64_t blocks = logits.blocks(), parts = (blocks + kBlocks - 1) / kBlocks;
    values.resize(kPart), ids.resize(kPart), weights.resize(std::max(blocks, kPart)), bounds.assign(parts, 0);
    // A part has no more mass than what is highest in its blocks allows.
    Weigher(max, row.temperature).weigh(logits.highest(), blocks, weights.data());
    logits.each_block(value_of(cut), [&](int64_t b) {
        bounds[b / kBlocks] += logits.count(b, value_of(cut)) * weights[b];
    });
    float high;
    int64_t count;
    const auto read = [&](int64_t part) {
        high = -kInfinity, count = 0;
        for (int64_t b = part * kBlocks; b < std::min(blocks, (part + 1) * kBlocks); b++) {
            if (logits.highest(b) < value_of(cut)) continue;
            const int64_t more = logits.collect(cut, b, &values[count], &ids[count]);
            if (more) high = std::max(high, logits.highest(b));
            count += more;
        }
    };
    const int64_t part = noisiest(
        bounds.data(), parts, Noise(row.seed, position, kPartStream), [](int64_t p) { return p; },
        [&](int64_t p) -> double {
            read(p);
            if (count == 0) return -kInfinity;
            map(values.data(), values.data(), count, weights.data(),
                [&](Floats each, Floats) { return (each - high) / temperature; });
            return (double{high} - max) / row.temperature + std::log(Logits::sum_exp(weights.data(), count, 0));
        });
    read(part);
    Weigher(high, row.temperature).weigh(values.data(), count, weights.data());
    return ids[noisiest(
        weights.data(), count, Noise(row.seed, position, kTokenStream), [&](int64_t i) { return int64_t{ids[i]}; },
        [&](int64_t i) { return (double{values[i]} - high) / row.temperature; })];
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
