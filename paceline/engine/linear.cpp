// Matrix products over weights of 4 or 8 bits and activations of 16 or 8 or floats, for linear layers on a CPU.
//
// A decode step reads every weight once, so bytes are time. Weights lie in groups of 32 consecutive inputs that
// share a scale d and, at 4 bits, an offset m: itself fp16, as d is (GGUF's Q4_1 and Q4_0), or a zero point z times
// -d (GPTQ, AWQ), which takes more bits than fp16 has. At 8 bits d is a float (GGUF's Q8_0).
//
//   w[o, i] = m[o, g] + d[o, g] q[o, i]       q in 0..15, or m = 0 and q in -128..127; i in group g
//
// Activations are rounded, row by row and group by group, to x = s x', x' of 16 bits (1.5e-5 of the group's largest) or
// of 8 (4e-3). Sums of q x' over a group are integers, hence exact, and rows never meet: a row's result has the same
// bits in every batch, on any number of threads.
//
//   y[r, o] = b[o] + sum over g of d[o, g] s[r, g] (sum of q x') + m[o, g] s[r, g] (sum of x')
//
// Or they stay floats, with s = 1 and x' = x, all of its bits or those of a bfloat16. Then sums round, in an order that
// does not depend on the batch either.
//
// Layout: panels of 16 outputs, zero-padded. A panel is its groups, a group 64 bytes of scales (16 d and 16 m or -z in
// fp16; at 8 bits 16 d in fp32), then its q. A 32-bit word holds 8 (or 4) inputs of one output, 16 words the same inputs of
// all outputs, so that a shift and a mask make pairs of 16-bit integers, which the CPU multiplies and adds by pairs, or
// fours of 8-bit ones, by fours:
//
//   4 bits   word w of a group: inputs 8w + (0, 2, 4, 6) in the low half, lowest first; 8w + (1, 3, 5, 7) in the high
//   8 bits   word w of a group: inputs 4w + (0, 2, 1, 3), lowest byte first
//
// Compiled for the host by paceline/native.py, without flags that let sums be reordered.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#else
#define LANES 0
#endif

#if LANES
#include <immintrin.h>
#endif

extern "C" {

// A packed weight [outputs, inputs]; `bias` is padded to whole panels, or null.
struct Matrix {
  const uint8_t* packed;
  const float* bias;
  int64_t bits, offsets, activations, outputs, inputs;
};

// What the offsets of 4-bit weights are stored as, and what activations are rounded to.
enum Offsets : int64_t { kOffsets = 0, kZeroPoints = 1 };
enum ActivationType : int64_t { kInt16 = 0, kInt8 = 1, kFloat32 = 2, kBfloat16 = 3 };

// Outputs computed side by side; 0 where the CPU has none of the instructions needed.
int64_t lanes() { return LANES; }

// Whether activations of 8 bits can meet weights of so many.
int64_t takes_bytes(int64_t bits) {
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512BW__))
  return bits > 0;
#else
  return LANES && bits == 4;  // two products of unsigned bytes overflow 16 bits
#endif
}
}

#if LANES

namespace {

constexpr int64_t kPanel = 16, kGroup = 32;
template <typename T>
constexpr float kLargest = sizeof(T) == 1 ? 127.f : 32767.f;
constexpr float kSmallest = 1e-30f;  // what is smaller has no finite inverse, and counts as 0
constexpr int64_t kAhead = 8192;  // bytes asked for early; the CPU's own prefetch stops at the end of a page
#if LANES == 16
constexpr int kRows = 8;  // rows computed together: their sums of integers and of floats are 16 of 32 registers
#else
constexpr int kRows = 4;
#endif

// ---- the instructions, 16 or 8 lanes wide -------------------------------------------------------------------------

#if LANES == 16
using Ints = __m512i;
using Floats = __m512;
inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline Ints zero() { return _mm512_setzero_si512(); }
inline Ints add_pairs(Ints sum, Ints w, Ints x) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, w, x);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
#endif
}
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
// Of each lane four unsigned bytes of w times four signed ones of x; w is at most 15 where there is no VNNI.
inline Ints add_fours(Ints sum, Ints w, Ints x) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, w, x);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
#endif
}
inline Ints low_nibbles(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Ints high_nibbles(Ints v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
inline Ints plus_128(Ints v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
inline Ints all_ints(int32_t v) { return _mm512_set1_epi32(v); }
template <int K>
inline Ints nibbles(Ints v) {
  if constexpr (K == 3) return _mm512_srli_epi16(v, 12);
  const Ints mask = _mm512_set1_epi16(15);
  return _mm512_and_si512(K == 0 ? v : _mm512_srli_epi16(v, 4 * K), mask);
}
template <int K>
inline Ints bytes(Ints v) {
  return _mm512_srai_epi16(K == 0 ? _mm512_slli_epi16(v, 8) : v, 8);
}
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats all(float v) { return _mm512_set1_ps(v); }
inline Floats widened(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Ints low_halves(Ints v) { return _mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16); }
inline Ints high_halves(Ints v) { return _mm512_srai_epi32(v, 16); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#else
using Ints = __m256i;
using Floats = __m256;
inline Ints load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Ints zero() { return _mm256_setzero_si256(); }
inline Ints add_pairs(Ints sum, Ints w, Ints x) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sum, w, x);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
#endif
}
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints add_fours(Ints sum, Ints w, Ints x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, w, x);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
#endif
}
inline Ints low_nibbles(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Ints high_nibbles(Ints v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
inline Ints plus_128(Ints v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }
inline Ints all_ints(int32_t v) { return _mm256_set1_epi32(v); }
template <int K>
inline Ints nibbles(Ints v) {
  if constexpr (K == 3) return _mm256_srli_epi16(v, 12);
  const Ints mask = _mm256_set1_epi16(15);
  return _mm256_and_si256(K == 0 ? v : _mm256_srli_epi16(v, 4 * K), mask);
}
template <int K>
inline Ints bytes(Ints v) {
  return _mm256_srai_epi16(K == 0 ? _mm256_slli_epi16(v, 8) : v, 8);
}
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats all(float v) { return _mm256_set1_ps(v); }
inline Floats widened(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Floats floats(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Ints low_halves(Ints v) { return _mm256_srai_epi32(_mm256_slli_epi32(v, 16), 16); }
inline Ints high_halves(Ints v) { return _mm256_srai_epi32(v, 16); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#endif

// Two activations of 16 bits, or four of 8, in every lane.
inline Ints everywhere(const void* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof word);
  return all_ints(word);
}

// ---- layout -------------------------------------------------------------------------------------------------------

template <int Bits>
struct Layout {
  static constexpr int64_t kInputs = 32 / Bits;                     // in a word
  static constexpr int64_t kWords = kGroup / kInputs;               // of one output in one group
  static constexpr int64_t kGroupBytes = 64 + kWords * kPanel * 4;  // of 16 outputs
};

template <int Bits>
int64_t panel_bytes(int64_t inputs) {
  return inputs / kGroup * Layout<Bits>::kGroupBytes;
}

inline int64_t panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// The bit at which input `j` of a word begins.
template <int Bits>
constexpr int place(int64_t j) {
  return static_cast<int>(j % 2 * 16 + j / 2 * Bits);
}

inline float rounded_half(float v) { return _cvtsh_ss(_cvtss_sh(v, 0)); }

// ---- packing ------------------------------------------------------------------------------------------------------

struct Grid {
  float scale = 0.f, offset = 0.f, zero = 0.f;  // offset = zero * scale if offsets are zero points
  int8_t q[kGroup] = {};
};

constexpr float kFurthestZero = 2048.f;  // fp16 holds integers up to here

inline bool reproduces(const Grid& grid, const float* w) {
  bool same = true;
  for (int64_t i = 0; i < kGroup; ++i) same &= std::fma(grid.scale, static_cast<float>(grid.q[i]), grid.offset) == w[i];
  return same;
}

// The nearest steps from `offset`, kept in 0..15.
inline void steps(Grid& grid, const float* w) {
  if (grid.scale == 0.f) return;
  const float inverse = 1.f / grid.scale;
  for (int64_t i = 0; i < kGroup; ++i) {
    const float step = (w[i] - grid.offset) * inverse + 0.5f;
    grid.q[i] = static_cast<int8_t>(std::min(std::max(0.f, step), 15.f));
  }
}

// Whether 32 weights from `low` to `high` are a grid of this scale, `levels` steps apart at most.
inline bool grid_from(const float* w, float low, float high, float scale, int levels, Offsets offsets, Grid& grid) {
  if (offsets == kZeroPoints) {
    grid.scale = scale;
    grid.zero = std::floor(low / scale + 0.5f);
    grid.offset = grid.zero * scale;
    if (!(std::fabs(grid.zero) <= kFurthestZero)) return false;
    steps(grid, w);
    return reproduces(grid, w);
  }
  for (const float sign : {1.f, -1.f})
    for (int first = 0; first + levels <= 15; ++first) {
      grid.scale = sign * scale;
      grid.offset = rounded_half((sign > 0 ? low : high) - grid.scale * first);
      steps(grid, w);
      if (reproduces(grid, w)) return true;
    }
  return false;
}

// Of 32 equal weights.
bool find_constant(const float* w, Offsets offsets, Grid& grid) {
  grid = {};
  if (offsets == kOffsets) {
    grid.offset = rounded_half(*w);
    return reproduces(grid, w);
  }
  if (*w == 0.f) return true;
  for (int zero = 1; zero <= 255; ++zero) {  // as far as a zero point of 8 bits is from any step
    grid.scale = rounded_half(*w / zero);
    grid.zero = static_cast<float>(zero);
    grid.offset = grid.zero * grid.scale;
    if (grid.scale != 0.f && reproduces(grid, w)) return true;
  }
  return false;
}

// Whether 32 weights are a 16-level grid, and which. Its ends need not be used: the range may be any number of
// levels, from any first one, counted from the lower or (negative scale) the upper end.
bool find_grid(const float* w, Offsets offsets, Grid& grid) {
  const auto [low, high] = std::minmax_element(w, w + kGroup);
  if (!(std::fabs(*low) <= 65504.f && std::fabs(*high) <= 65504.f)) return false;
  if (*low == *high) return find_constant(w, offsets, grid);
  for (int levels = 15; levels >= 1; --levels) {
    const float scale = rounded_half((*high - *low) / levels);
    if (scale == 0.f) continue;
    const float inverse = 1.f / scale;
    bool near = true;
    for (int64_t i = 0; i < kGroup && near; ++i) {
      const float step = (w[i] - *low) * inverse;
      near = std::fabs(step - std::floor(step + 0.5f)) < 0.01f;
    }
    if (near && grid_from(w, *low, *high, scale, levels, offsets, grid)) return true;
  }
  return false;
}

// Nearest steps on both sides of 0; whether they are the weights.
inline bool symmetric(const float* w, float scale, Grid& grid) {
  grid = {};
  grid.scale = scale;
  bool same = true;
  const float inverse = scale < kSmallest ? 0.f : 1.f / scale;
  for (int64_t i = 0; i < kGroup; ++i) {
    const float step = std::min(std::max(-128.f, w[i] * inverse), 127.f);
    const auto q = static_cast<int32_t>(step + (step < 0.f ? -0.5f : 0.5f));
    grid.q[i] = static_cast<int8_t>(q);
    same &= scale * static_cast<float>(q) == w[i];
  }
  return same;
}

// Of the consecutive inputs that weights which must be rounded share a scale with.
struct Range {
  float low, high;
};

inline Range range_of(const float* begin, const float* end) {
  const auto [low, high] = std::minmax_element(begin, end);
  return {*low, *high};
}

template <int Bits>
bool fit(const float* w, Offsets offsets, const Range* rounded, Grid& grid) {
  if constexpr (Bits == 4) {
    if (find_grid(w, offsets, grid)) return true;
    if (!rounded) return false;
    grid = {};
    grid.offset = rounded_half(rounded->low);
    grid.scale = rounded_half((rounded->high - rounded->low) / 15.f);
    steps(grid, w);
    return false;
  } else {
    const auto [low, high] = rounded ? *rounded : range_of(w, w + kGroup);
    const float largest = std::max(std::fabs(low), std::fabs(high));
    if (rounded) return symmetric(w, largest / 127.f, grid);
    // The largest may be at any level, as Q5_0's is at 16; at 128 only what is negative.
    for (int level = -low > high ? 128 : 127; level >= 1; --level)
      if (symmetric(w, largest / level, grid)) return true;
    return false;
  }
}

// How a weight is to be packed: `round` inputs, a multiple of 32, share the scale of what is on no grid; 0 rounds not.
struct Packing {
  Offsets offsets;
  int64_t round;
};

template <int Bits>
bool pack_output(const float* weight, int64_t inputs, int64_t lane, Packing how, uint8_t* panel) {
  bool exact = true;
  Range range{};
  for (int64_t i = 0; i < inputs; i += kGroup, panel += Layout<Bits>::kGroupBytes) {
    if (how.round && i % how.round == 0) range = range_of(weight + i, weight + std::min(i + how.round, inputs));
    Grid grid;
    exact &= fit<Bits>(weight + i, how.offsets, how.round ? &range : nullptr, grid);
    if (!exact && !how.round) return false;
    if constexpr (Bits == 4) {
      auto* halves = reinterpret_cast<uint16_t*>(panel);
      halves[lane] = _cvtss_sh(grid.scale, 0);
      halves[kPanel + lane] = _cvtss_sh(how.offsets == kZeroPoints ? grid.zero : grid.offset, 0);
    } else {
      reinterpret_cast<float*>(panel)[lane] = grid.scale;
    }
    auto* words = reinterpret_cast<uint32_t*>(panel + 64);
    for (int64_t w = 0; w < Layout<Bits>::kWords; ++w) {
      uint32_t word = 0;
      for (int64_t j = 0; j < Layout<Bits>::kInputs; ++j)
        word |= (grid.q[w * Layout<Bits>::kInputs + j] & ((1u << Bits) - 1)) << place<Bits>(j);
      words[w * kPanel + lane] = word;
    }
  }
  return exact;
}

template <int Bits>
bool pack_all(const float* weight, int64_t outputs, int64_t inputs, Packing how, uint8_t* packed) {
  std::atomic<bool> exact{true};
#pragma omp parallel for
  for (int64_t p = 0; p < panels(outputs); ++p) {
    uint8_t* panel = packed + p * panel_bytes<Bits>(inputs);
    std::memset(panel, 0, panel_bytes<Bits>(inputs));
    for (int64_t o = p * kPanel; o < std::min(outputs, (p + 1) * kPanel); ++o)
      if ((exact || how.round) && !pack_output<Bits>(weight + o * inputs, inputs, o % kPanel, how, panel))
        exact = false;
  }
  return exact;
}

template <int Bits>
void unpack_output(const Matrix& m, int64_t output, float* to) {
  const uint8_t* panel = m.packed + output / kPanel * panel_bytes<Bits>(m.inputs);
  const int64_t lane = output % kPanel;
  for (int64_t g = 0; g < m.inputs / kGroup; ++g, panel += Layout<Bits>::kGroupBytes) {
    const auto* halves = reinterpret_cast<const uint16_t*>(panel);
    const float scale = Bits == 4 ? _cvtsh_ss(halves[lane]) : reinterpret_cast<const float*>(panel)[lane];
    const float stored = Bits == 4 ? _cvtsh_ss(halves[kPanel + lane]) : 0.f;
    const float offset = m.offsets == kZeroPoints ? stored * scale : stored;
    const auto* words = reinterpret_cast<const uint32_t*>(panel + 64);
    for (int64_t w = 0; w < Layout<Bits>::kWords; ++w) {
      const uint32_t word = words[w * kPanel + lane];
      for (int64_t j = 0; j < Layout<Bits>::kInputs; ++j) {
        const uint32_t raw = word >> place<Bits>(j);
        const int q = Bits == 4 ? static_cast<int>(raw & 15) : static_cast<int8_t>(raw & 255);
        *to++ = std::fma(scale, static_cast<float>(q), offset);
      }
    }
  }
}

// ---- activations --------------------------------------------------------------------------------------------------

// Rows in blocks of kRows (the last may be smaller), a block's groups one after the other, a group's rows one after
// the other: x' [blocks][groups][rows of the block][32], s and s (sum of x') alike without the 32. x' of 8 bits lie in
// the order in which the bytes of a packed word meet them, and have their sum of integers too. `narrow` leaves floats as
// many bits as bfloat16 has.
template <typename T>
struct Activations {
  std::vector<T> x;
  std::vector<float> scale, sum;
  std::vector<int32_t> total;
  bool narrow = false;

  void make_room(int64_t rows, int64_t inputs) {
    const auto values = static_cast<size_t>(rows * inputs), groups = values / kGroup;
    if (x.size() < values) x.resize(values);
    if (scale.size() < groups) scale.resize(groups), sum.resize(groups), total.resize(groups);
  }
};

// Where input `i` of a group lies among the group's activations.
template <int Bits, typename T>
constexpr int64_t slot(int64_t i) {
  if constexpr (sizeof(T) > 1) return i;
  if constexpr (Bits == 8) return i / 4 * 4 + i % 2 * 2 + i % 4 / 2;
  // Inputs 0, 4, 1, 5 of a word are the low nibbles of its bytes, 2, 6, 3, 7 the high ones.
  return i / 8 * 8 + i % 4 / 2 * 4 + i % 2 * 2 + i % 8 / 4;
}

// What is not finite makes the scale not finite, and so every output of its row.
template <int Bits, typename T>
inline void quantize_group(const float* x, T* to, float* scale, float* sum, int32_t* whole, bool) {
  int32_t top = 0;
  for (int64_t i = 0; i < kGroup; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    top = std::max(top, bits & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &top, sizeof largest);
  const bool nothing = largest < kSmallest;
  const float inverse = nothing ? 0.f : kLargest<T> / largest;
  int32_t total = 0;
  T found[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) {
    const float v = x[i] * inverse;
    const auto n = static_cast<int32_t>(v + (v < 0.f ? -0.5f : 0.5f));
    found[i] = static_cast<T>(n);
    total += n;
  }
#pragma GCC unroll 32
  for (int64_t i = 0; i < kGroup; ++i) to[slot<Bits, T>(i)] = found[i];
  *scale = nothing ? 0.f : largest / kLargest<T>;
  *sum = *scale * static_cast<float>(total);
  *whole = total;
}

// The nearest bfloat16, ties to even.
inline float narrowed(float v) {
  if (!std::isfinite(v)) return v;
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  std::memcpy(&v, &bits, sizeof bits);
  return v;
}

template <int Bits>
inline void quantize_group(const float* x, float* to, float* scale, float* sum, int32_t*, bool narrow) {
  *scale = 1.f;
  *sum = 0.f;
  for (int64_t i = 0; i < kGroup; ++i) {
    to[i] = narrow ? narrowed(x[i]) : x[i];
    *sum += to[i];
  }
}

template <int Bits, typename T>
inline void quantize_row(const float* x, int64_t row, int64_t rows, int64_t inputs, Activations<T>& to) {
  const int64_t groups = inputs / kGroup, begin = row / kRows * kRows;
  const int64_t height = std::min<int64_t>(kRows, rows - begin);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = begin * groups + g * height + row - begin;
    const float* group = x + row * inputs + g * kGroup;
    quantize_group<Bits>(group, &to.x[at * kGroup], &to.scale[at], &to.sum[at], &to.total[at], to.narrow);
  }
}

// ---- the product --------------------------------------------------------------------------------------------------

// The integers of one group: sums of q x', in chains to be added up. Few rows sum in several, for latency.
template <int Bits, int Rows, int Chains>
inline void sum_group(const int16_t* x, const int32_t*, const uint32_t* words, Ints (&acc)[Rows][Chains]) {
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Chains; ++c) acc[r][c] = zero();
#pragma GCC unroll 8
  for (int w = 0; w < Layout<Bits>::kWords; ++w) {
    const Ints v = load(words + w * kPanel);
    const auto step = [&](Ints weights, int k) {
      const int16_t* at = x + (w * (Layout<Bits>::kInputs / 2) + k) * 2;
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
        acc[r][k % Chains] = add_pairs(acc[r][k % Chains], weights, everywhere(at + r * kGroup));
    };
    if constexpr (Bits == 4) {
      step(nibbles<0>(v), 0);
      step(nibbles<1>(v), 1);
      step(nibbles<2>(v), 2);
      step(nibbles<3>(v), 3);
    } else {
      step(bytes<0>(v), 0);
      step(bytes<1>(v), 1);
    }
  }
}

// Of 8 bits each. Unsigned weights are wanted: a signed q counts as q + 128, which adds 128 times the sum of x'.
template <int Bits, int Rows, int Chains>
inline void sum_group(const int8_t* x, const int32_t* total, const uint32_t* words, Ints (&acc)[Rows][Chains]) {
  for (int r = 0; r < Rows; ++r) {
    acc[r][0] = Bits == 8 ? all_ints(-128 * total[r]) : zero();
    for (int c = 1; c < Chains; ++c) acc[r][c] = zero();
  }
#pragma GCC unroll 8
  for (int w = 0; w < Layout<Bits>::kWords; ++w) {
    const Ints v = load(words + w * kPanel);
    const auto step = [&](Ints weights, int k) {
      const int8_t* at = x + w * Layout<Bits>::kInputs + 4 * k;
      const int c = (Bits == 4 ? k : w) % Chains;
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) acc[r][c] = add_fours(acc[r][c], weights, everywhere(at + r * kGroup));
    };
    if constexpr (Bits == 4) {
      step(low_nibbles(v), 0);
      step(high_nibbles(v), 1);
    } else {
      step(plus_128(v), 0);
    }
  }
}

// Of floats, in as many chains whatever the rows: the order of these sums shows in the result.
template <int Bits, int Rows>
inline void sum_group(const float* x, const int32_t*, const uint32_t* words, Floats (&acc)[Rows][2]) {
  for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = all(0.f);
#pragma GCC unroll 8
  for (int w = 0; w < Layout<Bits>::kWords; ++w) {
    const Ints v = load(words + w * kPanel);
    const auto step = [&](Ints pairs, int k) {
      const Floats low = floats(low_halves(pairs)), high = floats(high_halves(pairs));
      const float* at = x + w * Layout<Bits>::kInputs + 2 * k;
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        acc[r][0] = times_plus(low, all(at[r * kGroup]), acc[r][0]);
        acc[r][1] = times_plus(high, all(at[r * kGroup + 1]), acc[r][1]);
      }
    };
    if constexpr (Bits == 4) {
      step(nibbles<0>(v), 0);
      step(nibbles<1>(v), 1);
      step(nibbles<2>(v), 2);
      step(nibbles<3>(v), 3);
    } else {
      step(bytes<0>(v), 0);
      step(bytes<1>(v), 1);
    }
  }
}

inline Floats floats(Floats v) { return v; }

// What sums of q x' are kept in, and in how many chains.
template <int Rows, typename T>
struct Sums {
  static constexpr int kChains = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  Ints of[Rows][kChains];
};
template <int Rows>
struct Sums<Rows, float> {
  static constexpr int kChains = 2;
  Floats of[Rows][kChains];
};

// `Rows` rows of a block, from group `first` of the activations on, times `LANES` outputs of a panel.
template <int Bits, int Rows, typename T>
inline void multiply(const Activations<T>& a, int64_t first, const uint8_t* panel, int64_t lane, int64_t groups,
                     bool zero_points, const float* bias, float* const* out) {
  const T* x = &a.x[first * kGroup];
  Floats y[Rows];
  for (int r = 0; r < Rows; ++r) y[r] = bias ? load(bias) : all(0.f);
  for (int64_t g = 0; g < groups; ++g, panel += Layout<Bits>::kGroupBytes, x += Rows * kGroup) {
    for (int64_t line = 0; line < Layout<Bits>::kGroupBytes; line += 64) _mm_prefetch(panel + kAhead + line, _MM_HINT_T0);
    const int64_t at = first + g * Rows;
    Sums<Rows, T> sums;
    auto& acc = sums.of;
    sum_group<Bits, Rows>(x, &a.total[at], reinterpret_cast<const uint32_t*>(panel + 64) + lane, acc);
    const auto* halves = reinterpret_cast<const uint16_t*>(panel) + lane;
    const Floats d = Bits == 4 ? widened(halves) : load(reinterpret_cast<const float*>(panel) + lane);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      for (int c = 1; c < sums.kChains; ++c) acc[r][0] = add(acc[r][0], acc[r][c]);
      y[r] = times_plus(times(floats(acc[r][0]), all(a.scale[at + r])), d, y[r]);
    }
    if constexpr (Bits == 4) {
      const Floats stored = widened(halves + kPanel), m = zero_points ? times(stored, d) : stored;
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) y[r] = times_plus(m, all(a.sum[at + r]), y[r]);
    }
  }
  for (int r = 0; r < Rows; ++r) store(out[r], y[r]);
}

template <int Bits, int Rows, typename T>
void panel_times_block(const Matrix& m, const Activations<T>& a, int64_t panel, int64_t row, float* y) {
  const uint8_t* at = m.packed + panel * panel_bytes<Bits>(m.inputs);
  const int64_t groups = m.inputs / kGroup, column = panel * kPanel;
  const bool whole = column + kPanel <= m.outputs;
  float edge[Rows][kPanel];
  for (int64_t lane = 0; lane < kPanel; lane += LANES) {
    float* out[Rows];
    for (int r = 0; r < Rows; ++r) out[r] = whole ? y + (row + r) * m.outputs + column + lane : edge[r] + lane;
    const float* bias = m.bias ? m.bias + column + lane : nullptr;
    multiply<Bits, Rows, T>(a, row * groups, at, lane, groups, m.offsets == kZeroPoints, bias, out);
  }
  if (!whole)
    for (int r = 0; r < Rows; ++r)
      std::memcpy(y + (row + r) * m.outputs + column, edge[r], (m.outputs - column) * sizeof(float));
}

template <typename T>
using Block = void (*)(const Matrix&, const Activations<T>&, int64_t panel, int64_t row, float* y);

template <int Bits, typename T>
Block<T> block_of(int64_t rows) {
  static constexpr Block<T> blocks[] = {
      panel_times_block<Bits, 1, T>, panel_times_block<Bits, 2, T>,
      panel_times_block<Bits, 3, T>, panel_times_block<Bits, 4, T>,
#if LANES == 16
      panel_times_block<Bits, 5, T>, panel_times_block<Bits, 6, T>,
      panel_times_block<Bits, 7, T>, panel_times_block<Bits, 8, T>,
#endif
  };
  return blocks[rows - 1];
}

template <int Bits, typename T>
void multiply_all(const Matrix& m, const float* x, int64_t rows, float* y) {
  static thread_local Activations<T> kept;
  Activations<T>& a = kept;
  a.make_room(rows, m.inputs);
  a.narrow = m.activations == kBfloat16;
  const int64_t whole = rows / kRows * kRows;
  const Block<T> full = block_of<Bits, T>(kRows), rest = whole < rows ? block_of<Bits, T>(rows - whole) : nullptr;
  if (rows <= kRows)
    for (int64_t r = 0; r < rows; ++r) quantize_row<Bits>(x, r, rows, m.inputs, a);
#pragma omp parallel
  {
    if (rows > kRows) {
#pragma omp for
      for (int64_t r = 0; r < rows; ++r) quantize_row<Bits>(x, r, rows, m.inputs, a);
    }
#pragma omp for nowait
    for (int64_t p = 0; p < panels(m.outputs); ++p) {
      for (int64_t r = 0; r < whole; r += kRows) full(m, a, p, r, y);
      if (rest) rest(m, a, p, whole, y);
    }
  }
}

}  // namespace

extern "C" {

int64_t packed_bytes(int64_t bits, int64_t outputs, int64_t inputs) {
  return panels(outputs) * (bits == 4 ? panel_bytes<4>(inputs) : panel_bytes<8>(inputs));
}

// weight [outputs, inputs], float32, inputs a multiple of 32. Returns whether the packed form has the same weights to
// the last bit; if not and `round` is 0, `packed` is of no use, else weights that are on no grid are rounded to the
// nearest step of one that `round` consecutive inputs share.
int64_t pack(const float* weight, int64_t bits, int64_t offsets, int64_t outputs, int64_t inputs, int64_t round,
             uint8_t* packed) {
  const Packing how{static_cast<Offsets>(offsets), round};
  return bits == 4 ? pack_all<4>(weight, outputs, inputs, how, packed)
                   : pack_all<8>(weight, outputs, inputs, how, packed);
}

// Rows `ids` of the weight, in float32: to [count, inputs]. Returns 0, having done nothing, if there is no such row.
int64_t unpack_rows(const Matrix* m, const int64_t* ids, int64_t count, float* to) {
  if (std::any_of(ids, ids + count, [&](int64_t id) { return id < 0 || id >= m->outputs; })) return 0;
#pragma omp parallel for if (count > 64)
  for (int64_t i = 0; i < count; ++i)
    m->bits == 4 ? unpack_output<4>(*m, ids[i], to + i * m->inputs) : unpack_output<8>(*m, ids[i], to + i * m->inputs);
  return 1;
}

// x [rows, inputs], y [rows, outputs], float32.
void product(const Matrix* m, const float* x, int64_t rows, float* y) {
  switch (m->activations) {
    case kInt8: return m->bits == 4 ? multiply_all<4, int8_t>(*m, x, rows, y) : multiply_all<8, int8_t>(*m, x, rows, y);
    case kInt16:
      return m->bits == 4 ? multiply_all<4, int16_t>(*m, x, rows, y) : multiply_all<8, int16_t>(*m, x, rows, y);
    default: return m->bits == 4 ? multiply_all<4, float>(*m, x, rows, y) : multiply_all<8, float>(*m, x, rows, y);
  }
}
}

#endif
