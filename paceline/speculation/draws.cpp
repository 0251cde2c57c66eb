// The column of each row of logits that coupling.py draws: the argmax of score + Gumbel noise, or of the logits.
//
// The noise of a token is -log(-log1p(-u)), below -log u, so a total exceeds another, b, only if log u < score - b; and
// the bits of a float are its logarithm, 9% of a factor too low at most. So a vector of tokens costs its 64-bit hashes
// and one comparison, without a logarithm. The few tokens that pass are looked at one by one, in double.
//
// Top-k and min-p become a floor under the scores. Top-p is asked of the token drawn: it is inside the nucleus iff the
// mass above it is below top_p; if it is not, the floor goes above it and the row is drawn again.
//
// What another order of summing, or another library's logarithm, might decide otherwise is left to the reference, and
// so is a row that is no distribution. Compiled for the host by paceline/native.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

struct Row {
  uint64_t start;  // of the counter
  double top_p;
  int64_t top_k;      // 0: off
  float temperature;  // 0: greedy
  float log_min_p;
};

namespace {

#if defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int64_t kBlock = 64;  // tokens compared before anyone looks at the results
constexpr int64_t kUndecided = -1;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kMassError = 4e-6;    // of a sum of masses, relative: of ours and of the reference's together
constexpr double kTotalError = 1e-12;  // of a total, relative to itself or 1

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u, kMix1 = 0xBF58476D1CE4E5B9u, kMix2 = 0x94D049BB133111EBu;

using vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using ivec = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using lvec = uint64_t __attribute__((vector_size(kLanes * sizeof(uint64_t))));

template <typename V, typename T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline ivec bits_of(vec v) { return load<ivec>(&v); }

inline bool any(ivec mask) {
  uint64_t words[sizeof mask / sizeof(uint64_t)], all = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) all |= word;
  return all;
}

// SplitMix64's finalizer; of a number or of each lane.
template <typename T>
inline T mix(T x) {
  x = (x ^ (x >> 30)) * kMix1;
  x = (x ^ (x >> 27)) * kMix2;
  return x ^ (x >> 31);
}

inline int32_t float_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

double gumbel(uint64_t bits) {
  const double u = (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;
  return -std::log(-std::log1p(-u));
}

// Logits of one row, the temperature that makes them scores and, unless they are 0, 1, …, the ids they belong to.
struct Draw {
  const float* x;
  int64_t n;
  const int64_t* ids;
  uint64_t start;
  float temperature;
  float floor;  // what is below is not drawn

  int64_t best = kUndecided;
  double top = -std::numeric_limits<double>::infinity(), second = top;
  float slope = 0, offset = 0;  // u's float, of 31 bits, has bits below slope * x + offset if x may be the best

  uint64_t counter(int64_t i) const { return start + (static_cast<uint64_t>(ids ? ids[i] : i) + 1) * kGolden; }

  // log u < score - top, in units of a float's bits. Roundings to float, of which each is below 2^-23 of the score or
  // of 256, come to less than what is taken off the top.
  void aim() {
    constexpr double kPerNat = 0x1p23 / 0.6931471805599453, kWhole = (127.0 + 31.0) * 0x1p23;
    slope = static_cast<float>(kPerNat / temperature);
    offset = static_cast<float>(kWhole - (top - (std::abs(top) + 256) * 0x1p-20) * kPerNat);
  }

  // False if the row is none that this can draw.
  bool look(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t bits = mix(counter(i));
      if (float_bits(static_cast<float>(static_cast<int32_t>(bits >> 33))) >= slope * x[i] + offset) continue;
      const float score = x[i] / temperature;
      if (score == -kInfinity || x[i] < floor) continue;
      const double total = gumbel(bits) + score;
      if (!(total < kInfinity)) return false;
      if (total > top) {
        second = top, top = total, best = i;
        aim();
      } else {
        second = std::max(second, total);
      }
    }
    return true;
  }

  template <bool kIds>
  bool scan() {
    aim();
    lvec step;
    for (int lane = 0; lane < kLanes; ++lane) step[lane] = lane + 1;
    step = step * kGolden + start;
    int64_t at = 0;
    for (; at + kBlock <= n; at += kBlock) {
      ivec passed = {};
      for (int64_t i = at; i < at + kBlock; i += kLanes) {
        if (kIds) step = (load<lvec>(ids + i) + 1) * kGolden + start;
        const ivec u = __builtin_convertvector(mix(step) >> 33, ivec);
        const vec bits = __builtin_convertvector(bits_of(__builtin_convertvector(u, vec)), vec);
        const vec logits = load<vec>(x + i);
        passed |= ~(bits >= logits * slope + offset) & ~(logits < floor);
        if (!kIds) step += kLanes * kGolden;
      }
      if (any(passed) && !look(at, at + kBlock)) return false;
    }
    return look(at, n);
  }

  int64_t run() {
    if (!(ids ? scan<true>() : scan<false>()) || top - second <= kTotalError * (1 + std::abs(top))) return kUndecided;
    return best;
  }
};

inline vec larger(vec a, vec b) { return a > b ? a : b; }

float max_of(vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = std::max(top, v[i]);
  return top;
}

double sum_of(vec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

int64_t greedy(const float* x, int64_t n) {
  float top = -kInfinity;
  int64_t block = 0;
  ivec nan = {};
  for (int64_t at = 0; at < n; at += kBlock) {
    vec tops = vec{} - kInfinity;
    float highest = -kInfinity;
    if (at + kBlock <= n) {
      for (int64_t i = at; i < at + kBlock; i += kLanes) {
        const vec v = load<vec>(x + i);
        tops = larger(v, tops);
        nan |= v != v;
      }
      highest = max_of(tops);
    } else {
      for (int64_t i = at; i < n; ++i) {
        highest = std::max(highest, x[i]);
        nan |= ivec{} - (x[i] != x[i]);
      }
    }
    if (highest > top) top = highest, block = at;
  }
  if (any(nan) || top == -kInfinity) return kUndecided;
  return std::find(x + block, x + n, top) - x;
}

// e^x for x <= 0, within 2 units in the last place: x = n ln 2 + r, e^r by its series (Cephes' expf). 0 below -87.
inline vec exp_of(vec given) {
  const vec x = larger(given, vec{} - 87.f);
  const ivec whole = __builtin_convertvector(x * 1.44269504f - 0.5f, ivec);
  const vec n = __builtin_convertvector(whole, vec);
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const ivec bits = (whole + 127) << 23;
  return given < -87.f ? vec{} : p * load<vec>(&bits);
}

// Scores of a row, padded with -inf to a multiple of kBlock.
struct Scores {
  int64_t n, padded;
  std::unique_ptr<float[]> s;
  float top = -kInfinity;
  bool whole = true;  // no NaN

  Scores(const float* logits, int64_t n, float temperature)
      : n(n), padded((n + kBlock - 1) / kBlock * kBlock), s(new float[padded]) {
    for (int64_t i = 0; i < n; ++i) s[i] = logits[i] / temperature;
    std::fill(s.get() + n, s.get() + padded, -kInfinity);
    vec tops = vec{} - kInfinity;
    ivec nan = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const vec v = load<vec>(s.get() + i);
      tops = larger(v, tops);
      nan |= v != v;
    }
    top = max_of(tops);
    whole = !any(nan);
  }

  // Calls `visit`, which may raise the edge, with each block that has a score above it.
  template <typename Visit>
  void above(const float& edge, const Visit& visit) const {
    for (const float* at = s.get(); at < s.get() + padded; at += kBlock) {
      ivec found = {};
      for (int64_t i = 0; i < kBlock; i += kLanes) found |= load<vec>(at + i) > edge;
      if (any(found)) visit(at);
    }
  }

  // The sum of e^(s - top) over the scores above `edge`.
  double mass(float edge) const {
    double sum = 0;
    above(edge, [&](const float* at) {
      vec sums = {};
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        const vec v = load<vec>(at + i), masses = exp_of(v - top);
        sums += v > edge ? masses : vec{};
      }
      sum += sum_of(sums);
    });
    return sum;
  }

  // The k-th largest score, -inf if there are fewer. Whatever exceeds the k-th of those seen is gathered, and the
  // gathered are cut to their k largest now and then.
  float kth(int64_t k) const {
    std::vector<float> gathered(std::max<int64_t>(2 * k, 512) + kBlock);
    int64_t count = 0;
    float edge = -kInfinity;
    const auto cut = [&] {
      std::nth_element(gathered.begin(), gathered.begin() + k - 1, gathered.begin() + count, std::greater<float>());
      edge = gathered[k - 1];
      count = k;
    };
    above(edge, [&](const float* at) {
      for (int64_t i = 0; i < kBlock; ++i) {
        gathered[count] = at[i];
        count += at[i] > edge;
      }
      if (count + kBlock >= static_cast<int64_t>(gathered.size())) cut();
    });
    if (count >= k) cut();
    return edge;
  }
};

int64_t filtered(const float* logits, int64_t n, const int64_t* ids, const Row& row) {
  const Scores scores(logits, n, row.temperature);
  if (!scores.whole || !(std::abs(scores.top) < kInfinity)) return kUndecided;
  const float kth = row.top_k ? scores.kth(row.top_k) : -kInfinity;
  const double reach = row.top_p < 1 ? row.top_p * scores.mass(std::nextafter(kth, -kInfinity)) : kInfinity;
  float floor = std::max(kth, scores.top + row.log_min_p);
  for (;;) {
    const int64_t drawn = Draw{scores.s.get(), n, ids, row.start, 1.f, floor}.run();
    if (drawn == kUndecided || row.top_p >= 1) return drawn;
    const double above = scores.mass(scores.s[drawn]);
    if (std::abs(above - reach) <= kMassError * reach) return kUndecided;
    if (above < reach) return drawn;
    floor = std::nextafter(scores.s[drawn], kInfinity);
  }
}

int64_t draw(const float* logits, int64_t n, const int64_t* ids, const Row& row) {
  if (row.temperature == 0) return greedy(logits, n);
  if (row.top_k || row.top_p < 1 || row.log_min_p > -kInfinity) return filtered(logits, n, ids, row);
  return Draw{logits, n, ids, row.start, row.temperature, -kInfinity}.run();
}

}  // namespace

extern "C" {

// Of each row of logits, [rows, n] with that stride, the column drawn, or -1: the reference must say. `ids` [n] are the
// token ids of the columns, null for 0, 1, …. Returns how many rows are undecided.
int64_t draw_rows(const float* logits, int64_t rows, int64_t n, int64_t stride, const int64_t* ids,
                  const Row* params, int64_t* columns) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
  for (int64_t r = 0; r < rows; ++r) columns[r] = draw(logits + r * stride, n, ids, params[r]);
  return std::count(columns, columns + rows, kUndecided);
}
}
