// Everything of a decoder layer on a CPU that is not a matrix product, over a ragged batch of windows; and all layers
// in one call, where their products are of linear.cpp.
//
// A decode step of a small model is a few hundred tiny operations; each costs microseconds of dispatch when it
// is a call of its own. Here a layer has four: norm, rope + KV write + attention, norm, gate.
// Activations are float32, row-major and contiguous. Compiled for the host by paceline/native.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// One sequence's part of the step. Its keys and values go to positions start, start + 1, … of its slab
// [layers, kv_heads, room, dim]; `row` is its first row in the step. The slab is float32, or int8 with scales
// [layers, room, kv_heads]: a key is scale times what is stored.
struct Window {
  int64_t row, start, rows;
  void* keys;
  void* values;
  float* key_scales;  // null: the slab is float32
  float* value_scales;
  int64_t room;
};

struct Heads {
  int64_t heads, kv_heads, dim, rotary_dim;
  float scale, norm_eps;
  const float* q_norm;  // RMS norm weights over a head, or null
  const float* k_norm;
  int64_t sliding_window;  // 0: none
};

// y = x W^T + b, x and y [rows, ·]; the matrix is what it was made for.
using Product = void (*)(const void* matrix, const float* x, int64_t rows, float* y);

// Sums x [n] over all ranks, in place; anything but 0: they did not all come.
using Sum = int64_t (*)(void* group, float* x, int64_t n);

struct Layer {
  const void* qkv;
  const void* out;
  const void* gate_up;
  const void* down;
  const float* attention_norm;
  const float* mlp_norm;
  const Heads* heads;
  int64_t rotates, width;  // width: of the MLP between its projections
};

namespace {

// Lanes of a vector register, and how many registers across a tile of a product is: with 6 rows its sums fill the
// register file.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAcross = 4;
#define INTERLEAVE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define INTERLEAVE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
constexpr int kLanes = 8, kAcross = 2;
#define INTERLEAVE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define INTERLEAVE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#if defined(__aarch64__)
constexpr int kLanes = 4, kAcross = 4;
#else
constexpr int kLanes = 4, kAcross = 2;
#endif
#define INTERLEAVE_LOW 0, 4, 1, 5
#define INTERLEAVE_HIGH 2, 6, 3, 7
#endif
constexpr int kTileRows = 6;
constexpr int64_t kBlock = 64;        // keys brought into cache, transposed and attended to at a time
constexpr int64_t kSplit = 512;       // keys after which a new softmax begins; all are merged in the end
constexpr int64_t kRowBlock = 32;     // rows of a long window that one thread takes at a time
constexpr int64_t kWidestHead = 256;  // that is attended to as it is stored
constexpr float kNothing = -1e29f, kHidden = -1e30f;  // the top of no scores; a score that no query may see

using vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using ivec = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline vec load(const float* from) {
  vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline vec load(const int8_t* from) {
  ivec whole;
#if defined(__AVX512F__)
  whole = reinterpret_cast<ivec>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  whole = reinterpret_cast<ivec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  for (int i = 0; i < kLanes; ++i) whole[i] = from[i];
#endif
  return __builtin_convertvector(whole, vec);
}

inline void store(float* to, vec v) { std::memcpy(to, &v, sizeof v); }

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
inline vec low(vec a, vec b) { return __builtin_shufflevector(a, b, INTERLEAVE_LOW); }
inline vec high(vec a, vec b) { return __builtin_shufflevector(a, b, INTERLEAVE_HIGH); }
#else
inline vec low(vec a, vec b) { return __builtin_shuffle(a, b, ivec{INTERLEAVE_LOW}); }
inline vec high(vec a, vec b) { return __builtin_shuffle(a, b, ivec{INTERLEAVE_HIGH}); }
#endif

// A square of kLanes x kLanes numbers: interleaving its halves log2(kLanes) times.
inline void transpose(vec* a) {
  vec b[kLanes];
#pragma GCC unroll 4
  for (int step = kLanes; step > 1; step /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      b[2 * i] = low(a[i], a[i + kLanes / 2]);
      b[2 * i + 1] = high(a[i], a[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) a[i] = b[i];
  }
}

inline vec larger(vec a, vec b) { return a > b ? a : b; }

inline float max_of(vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = std::max(top, v[i]);
  return top;
}

inline float sum_of(vec v) {
  float sum = 0.f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// e^x within 2 units in the last place: x = n ln 2 + r, e^r by its series (Cephes' expf). Below -87 it is 0.
inline vec exp_of(vec given) {
  const vec x = larger(given < 88.f ? given : vec{} + 88.f, vec{} - 87.f);
  const ivec whole = __builtin_convertvector(x * 1.44269504f + (x < 0.f ? vec{} - 0.5f : vec{} + 0.5f), ivec);
  const vec n = __builtin_convertvector(whole, vec);
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const ivec bits = (whole + 127) << 23;
  vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return given < -87.f ? vec{} : p * scale;
}

inline float exp_of(float x) { return exp_of(vec{} + x)[0]; }

// The first rotary_dim elements turn, halves against each other; the rest stay.
inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  float* y = x + half;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = y[i];
    x[i] = a * cos[i] - b * sin[i];
    y[i] = b * cos[i] + a * sin[i];
  }
}

inline void norm_head(float* x, const float* weight, const Heads& h) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < h.dim; ++i) sum += x[i] * x[i];
  const float scale = 1.f / std::sqrt(sum / h.dim + h.norm_eps);
  for (int64_t i = 0; i < h.dim; ++i) x[i] *= scale * weight[i];
}

// Symmetric, so that zero stays zero: the largest magnitude becomes 127.
inline void quantize(const float* x, int8_t* out, float* scale, int64_t dim) {
  float top = 0.f;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < dim; ++i) top = std::max(top, std::fabs(x[i]));
  *scale = top / 127.f;
  const float inverse = top > 0.f ? 127.f / top : 0.f;
  for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(x[i] * inverse)));
}

// One layer's keys, or its values: where position j of KV head kv lies.
struct Slab {
  void* numbers;
  float* scales;
  int64_t room, kv_heads, dim;

  float* floats(int64_t kv, int64_t j) const { return static_cast<float*>(numbers) + (kv * room + j) * dim; }
  int8_t* bytes(int64_t kv, int64_t j) const { return static_cast<int8_t*>(numbers) + (kv * room + j) * dim; }

  void write(int64_t kv, int64_t j, const float* x) const {
    if (scales)
      quantize(x, bytes(kv, j), scales + j * kv_heads + kv, dim);
    else
      std::memcpy(floats(kv, j), x, dim * sizeof(float));
  }

  // Positions [first, end) as float32 [·, wide], without their scales; from `at` on zeros before them, whose memory
  // may hold anything.
  const float* block(int64_t kv, int64_t at, int64_t first, int64_t end, int64_t wide, float* scratch) const {
    if (!scales && dim == wide && first <= at) return floats(kv, at);
    for (int64_t j = at; j < end; ++j) {
      float* to = scratch + (j - at) * wide;
      int64_t i = 0;
      if (j >= first && scales) {
        const int8_t* from = bytes(kv, j);
        for (; i + kLanes <= dim; i += kLanes) store(to + i, load(from + i));
        for (; i < dim; ++i) to[i] = from[i];
      } else if (j >= first) {
        std::memcpy(to, floats(kv, j), dim * sizeof(float));
        i = dim;
      }
      for (; i < wide; ++i) to[i] = 0.f;
    }
    return scratch;
  }

  // The scales of the same positions, or null.
  const float* block_scales(int64_t kv, int64_t at, int64_t first, int64_t end, float* scratch) const {
    if (!scales) return nullptr;
    const int64_t begin = std::max<int64_t>(first - at, 0), count = end - at;
    const float* from = scales + at * kv_heads + kv;
    std::fill(scratch, scratch + begin, 0.f);
    for (int64_t j = begin; j < count; ++j) scratch[j] = from[j * kv_heads];
    std::fill(scratch + count, scratch + kBlock, 0.f);
    return scratch;
  }
};

Slab keys_of(const Window& w, const Heads& h, int64_t layer) {
  const int64_t skipped = layer * h.kv_heads * w.room, size = w.key_scales ? 1 : sizeof(float);
  return {static_cast<char*>(w.keys) + skipped * h.dim * size, w.key_scales ? w.key_scales + skipped : nullptr, w.room,
          h.kv_heads, h.dim};
}

Slab values_of(const Window& w, const Heads& h, int64_t layer) {
  const int64_t skipped = layer * h.kv_heads * w.room, size = w.value_scales ? 1 : sizeof(float);
  return {static_cast<char*>(w.values) + skipped * h.dim * size, w.value_scales ? w.value_scales + skipped : nullptr,
          w.room, h.kv_heads, h.dim};
}

// Rotate one row's queries in place, and write its keys and values as later steps will read them.
void prepare_row(float* row, const float* cos, const float* sin, const Slab& keys, const Slab& values, int64_t position,
                 const Heads& h) {
  for (int64_t n = 0; n < h.heads + h.kv_heads; ++n) {
    float* x = row + n * h.dim;
    const float* weight = n < h.heads ? h.q_norm : h.k_norm;
    if (weight) norm_head(x, weight, h);
    if (cos) rotate(x, cos, sin, h.rotary_dim / 2);
  }
  const float* k = row + h.heads * h.dim;
  for (int64_t kv = 0; kv < h.kv_heads; ++kv) {
    keys.write(kv, position, k + kv * h.dim);
    values.write(kv, position, k + (h.kv_heads + kv) * h.dim);
  }
}

// c = c * keep + a b, or a b if keep is null: a [M, depth], b [depth, N * kLanes], keep [M].
template <int M, int N, typename T>
inline void product(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t depth, const float* keep,
                    float* c, int64_t c_stride) {
  vec sums[M][N] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vec row[N];
    for (int n = 0; n < N; ++n) row[n] = load(b + k * b_stride + n * kLanes);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sums[m][n] += a[m * a_stride + k] * row[n];
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float* to = c + m * c_stride + n * kLanes;
      store(to, keep ? load(to) * keep[m] + sums[m][n] : sums[m][n]);
    }
}

// The products of M queries with keys [kBlock, dim] as they are stored, each summed in the order of `product` over
// transposed ones. Words of four bytes are transposed as if they were numbers. `values` are needed next.
template <int M, typename T>
inline void score(const float* q, const T* keys, const T* values, int64_t dim, float* scores) {
  constexpr int kPacked = sizeof(float) / sizeof(T);
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    // Numbers are read in one go, in the order of addresses: from memory, that is nearly twice as fast as a square at
    // a time. Bytes are in that order anyway, and so few that the hardware foresees too little of them.
    const T* rows = keys + j * dim;
    alignas(64) T copied[kPacked == 1 ? kLanes * kWidestHead : 1];
    if constexpr (kPacked == 1) {
      for (int64_t i = 0; i < kLanes * dim; i += kLanes) store(copied + i, load(rows + i));
      rows = copied;
    } else {
      for (int64_t i = 0; i < kLanes * dim; i += 64) {
        __builtin_prefetch(rows + kLanes * dim + i);
        __builtin_prefetch(values + j * dim + i);
      }
    }
    vec sums[M] = {};
    for (int64_t d = 0; d < dim; d += kLanes * kPacked) {
      vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) std::memcpy(&square[i], rows + i * dim + d, sizeof(vec));
      transpose(square);
      for (int i = 0; i < kLanes; ++i) {
        if constexpr (kPacked == 1) {
          for (int m = 0; m < M; ++m) sums[m] += q[m * dim + d + i] * square[i];
        } else {
          ivec word;
          std::memcpy(&word, &square[i], sizeof word);
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) {
            const vec number = __builtin_convertvector((word << (24 - 8 * b)) >> 24, vec);
            for (int m = 0; m < M; ++m) sums[m] += q[m * dim + d + 4 * i + b] * number;
          }
        }
      }
    }
    for (int m = 0; m < M; ++m) store(scores + m * kBlock + j, sums[m]);
  }
}

// Softmax in progress (2205.14135): the largest score so far, the sum of weights and the weighted sum of values,
// both relative to it. One per query; out is [queries, wide].
struct Softmax {
  float* top;
  float* sum;
  float* out;
};

// Queries of one KV head, [queries, dim], scaled; query n belongs to row n / group of those from position start on.
struct Queries {
  const float* q;
  int64_t count, start, group, dim, wide, sliding_window;

  int64_t last_seen(int64_t n) const { return start + n / group; }
  int64_t first_seen(int64_t n) const {
    return sliding_window ? std::max<int64_t>(0, last_seen(n) - sliding_window + 1) : 0;
  }
};

// Keys and values of one block, from position `at` on. Either float32, the keys transposed: [dim, kBlock] and
// [kBlock, wide]; or as stored, in `numbers` and `values` of T [kBlock, dim]. Scales [kBlock] or null.
template <typename T>
struct Block {
  int64_t at, count;
  const T* keys;
  const T* values;
  const float* key_scales;
  const float* value_scales;
  bool transposed;
};

// M queries from number n on, and a block.
template <int M, typename T>
void attend_tile(const Queries& queries, int64_t n, const Block<T>& block, const Softmax& state) {
  constexpr int kWidth = kAcross * kLanes;
  const int64_t dim = queries.dim, wide = queries.wide, at = block.at;
  alignas(64) float scores[M][kBlock];
  float keep[M];
  const float* q = queries.q + n * dim;
  if (!block.transposed)
    score<M>(q, block.keys, block.values, dim, scores[0]);
  else
    for (int64_t j = 0; j < kBlock; j += kWidth)
      product<M, kAcross>(q, dim, block.keys + j, kBlock, dim, nullptr, scores[0] + j, kBlock);
  for (int m = 0; m < M; ++m) {
    float* s = scores[m];
    const int64_t begin = std::min(std::max<int64_t>(queries.first_seen(n + m) - at, 0), kBlock);
    const int64_t end = std::max<int64_t>(std::min(queries.last_seen(n + m) + 1 - at, kBlock), 0);
    if (block.key_scales)
      for (int64_t j = 0; j < kBlock; j += kLanes) store(s + j, load(s + j) * load(block.key_scales + j));
    for (int64_t j = 0; j < begin; ++j) s[j] = kHidden;
    for (int64_t j = end; j < kBlock; ++j) s[j] = kHidden;
    vec tops = vec{} + state.top[n + m], sums = {};
    for (int64_t j = 0; j < kBlock; j += kLanes) tops = larger(tops, load(s + j));
    const float top = max_of(tops);
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      const vec weights = exp_of(load(s + j) - top);
      store(s + j, block.value_scales ? weights * load(block.value_scales + j) : weights);
      sums += weights;
    }
    keep[m] = exp_of(state.top[n + m] - top);
    state.top[n + m] = top;
    state.sum[n + m] = state.sum[n + m] * keep[m] + sum_of(sums);
  }
  float* out = state.out + n * wide;
  int64_t i = 0;
  for (; i + kWidth <= wide; i += kWidth)
    product<M, kAcross>(scores[0], kBlock, block.values + i, wide, block.count, keep, out + i, wide);
  for (; i < wide; i += kLanes)
    product<M, 1>(scores[0], kBlock, block.values + i, wide, block.count, keep, out + i, wide);
}

template <typename T>
void attend_block(const Queries& queries, const Block<T>& block, const Softmax& state) {
  static_assert(kTileRows == 6);
  // Queries are in the order of their rows: those of rows before the block see nothing of it.
  int64_t n = std::max<int64_t>(0, block.at - queries.start) * queries.group;
  for (; n < queries.count; n += kTileRows) {
    switch (std::min<int64_t>(kTileRows, queries.count - n)) {
      case 1: attend_tile<1>(queries, n, block, state); break;
      case 2: attend_tile<2>(queries, n, block, state); break;
      case 3: attend_tile<3>(queries, n, block, state); break;
      case 4: attend_tile<4>(queries, n, block, state); break;
      case 5: attend_tile<5>(queries, n, block, state); break;
      default: attend_tile<6>(queries, n, block, state);
    }
  }
}

// into and more become one, in into.
void merge(const Softmax& into, const Softmax& more, int64_t count, int64_t wide) {
  for (int64_t n = 0; n < count; ++n) {
    const float top = std::max(into.top[n], more.top[n]);
    const float kept = exp_of(into.top[n] - top), added = exp_of(more.top[n] - top);
    into.top[n] = top;
    into.sum[n] = into.sum[n] * kept + more.sum[n] * added;
    float* to = into.out + n * wide;
    const float* from = more.out + n * wide;
#pragma omp simd
    for (int64_t i = 0; i < wide; ++i) to[i] = to[i] * kept + from[i] * added;
  }
}

Softmax empty_softmax(float* memory, int64_t count, int64_t wide) {
  float* top = memory + count * wide;
  std::fill(memory, top, 0.f);
  std::fill(top, top + count, kNothing);
  std::fill(top + count, top + 2 * count, 0.f);
  return {top, top + count, memory};
}

// Some rows of a window, one KV head, some splits of the keys: what one thread does at a time. Blocks and splits
// begin at multiples of their size, and splits are merged in their order: a row's result does not depend on which
// rows it came with, nor on the number of threads, to the last bit.
struct Task {
  const Window* window;
  int64_t kv, row, rows, split, splits;
  int64_t partial;  // where its softmax lies among those that others complete, or -1: it is the whole

  int64_t queries(const Heads& h) const { return rows * (h.heads / h.kv_heads); }
};

int64_t padded(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// [rows, group, dim] of out, divided by the sums.
void write_out(const Task& task, const Softmax& state, const Heads& h, float* out) {
  const int64_t group = h.heads / h.kv_heads, wide = padded(h.dim);
  for (int64_t n = 0; n < task.rows * group; ++n) {
    const int64_t row = task.window->row + task.row + n / group, head = task.kv * group + n % group;
    float* to = out + (row * h.heads + head) * h.dim;
    const float scale = 1.f / state.sum[n];
    for (int64_t i = 0; i < h.dim; ++i) to[i] = state.out[n * wide + i] * scale;
  }
}

// A task's queries, scaled: [rows, group, dim].
void copy_queries(const Task& task, const float* qkv, const Heads& h, float* q) {
  const int64_t group = h.heads / h.kv_heads, row_size = (h.heads + 2 * h.kv_heads) * h.dim;
  for (int64_t r = 0; r < task.rows; ++r) {
    const float* from = qkv + (task.window->row + task.row + r) * row_size + task.kv * group * h.dim;
    for (int64_t i = 0; i < group * h.dim; ++i) q[r * group * h.dim + i] = from[i] * h.scale;
  }
}

// [count, wide] to [wide, kBlock], with zeros up to the next multiple of kLanes.
void transpose_keys(const float* keys, int64_t count, int64_t wide, float* out) {
  for (int64_t j = 0; j < count; j += kLanes)
    for (int64_t i = 0; i < wide; i += kLanes) {
      vec square[kLanes] = {};
      for (int n = 0; n < kLanes && j + n < count; ++n) square[n] = load(keys + (j + n) * wide + i);
      transpose(square);
      for (int n = 0; n < kLanes; ++n) store(out + (i + n) * kBlock + j, square[n]);
    }
}

// Some keys and values of one KV head, block after block.
struct Stretch {
  const Slab& keys;
  const Slab& values;
  int64_t kv, first, begin, end;  // of those from begin to end, the first that any row sees

  // `scratch` is [3 wide + 2, kBlock], aligned.
  void attend(const Queries& queries, const Softmax& state, float* scratch) const {
    const int64_t dim = queries.dim, wide = queries.wide;
    float* copied = scratch + kBlock * wide;
    float* scales = copied + 2 * kBlock * wide;
    // One tile of queries works on what is stored; more are worth a transposed copy.
    const bool squares = dim % (kLanes * (keys.scales ? 4 : 1)) == 0 && dim <= kWidestHead;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t until = std::min(at + kBlock, end);
      const float* by_key = keys.block_scales(kv, at, first, until, scales);
      const float* by_value = values.block_scales(kv, at, first, until, scales + kBlock);
      if (queries.count > kTileRows || !squares || at < first || at + kBlock > end) {
        transpose_keys(keys.block(kv, at, first, until, wide, copied), until - at, wide, scratch);
        const float* v = values.block(kv, at, first, until, wide, copied + kBlock * wide);
        attend_block(queries, Block<float>{at, until - at, scratch, v, by_key, by_value, true}, state);
      } else if (by_key) {
        const Block<int8_t> block{at, kBlock, keys.bytes(kv, at), values.bytes(kv, at), by_key, by_value, false};
        attend_block(queries, block, state);
      } else {
        const Block<float> block{at, kBlock, keys.floats(kv, at), values.floats(kv, at), nullptr, nullptr, false};
        attend_block(queries, block, state);
      }
    }
  }
};

void run_task(const Task& task, const float* qkv, int64_t layer, const Heads& h, float* partials, float* out) {
  const Window& w = *task.window;
  const int64_t wide = padded(h.dim), group = h.heads / h.kv_heads, count = task.queries(h);
  const int64_t scratch_size = kBlock * (3 * wide + 2), state_size = count * (2 + wide);
  std::vector<float> memory(16 + scratch_size + count * h.dim + 2 * state_size);
  float* scratch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  float* q = scratch + scratch_size;
  float* states = q + count * h.dim;
  copy_queries(task, qkv, h, q);
  const Queries queries{q, count, w.start + task.row, group, h.dim, wide, h.sliding_window};
  const Slab keys = keys_of(w, h, layer), values = values_of(w, h, layer);
  const int64_t first = queries.first_seen(0), end = queries.last_seen(count - 1) + 1;
  const Softmax whole = empty_softmax(task.partial < 0 ? states : partials + task.partial, count, wide);
  for (int64_t split = task.split; split < task.split + task.splits; ++split) {
    const Softmax part = empty_softmax(states + state_size, count, wide);
    const int64_t from = std::max(split * kSplit, first / kBlock * kBlock), to = std::min((split + 1) * kSplit, end);
    Stretch{keys, values, task.kv, first, from, to}.attend(queries, part, scratch);
    merge(whole, part, count, wide);
  }
  if (task.partial < 0) write_out(task, whole, h, out);
}

struct Plan {
  std::vector<Task> tasks;
  std::vector<Task> merges;  // of windows whose splits are tasks of their own: the first, with all splits
  int64_t partials = 0;      // numbers that their softmaxes take
};

// Long windows are divided by rows, short ones with much before them by keys.
Plan plan(const Window* windows, int64_t count, const Heads& h) {
  Plan made;
  for (int64_t i = 0; i < count; ++i) {
    const Window& w = windows[i];
    for (int64_t row = 0; row < w.rows; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, w.rows - row), position = w.start + row;
      const int64_t first = h.sliding_window ? std::max<int64_t>(0, position - h.sliding_window + 1) : 0;
      const int64_t split = first / kSplit, splits = (position + rows - 1) / kSplit + 1 - split;
      for (int64_t kv = 0; kv < h.kv_heads; ++kv) {
        Task task{&w, kv, row, rows, split, splits, -1};
        if (splits == 1 || w.rows > kRowBlock) {
          made.tasks.push_back(task);
          continue;
        }
        task.partial = made.partials;
        made.merges.push_back(task);
        for (task.splits = 1; task.split < split + splits; ++task.split) {
          task.partial = made.partials;
          made.tasks.push_back(task);
          made.partials += task.queries(h) * (2 + padded(h.dim));
        }
      }
    }
  }
  return made;
}

void run_merge(const Task& task, const Heads& h, float* partials, float* out) {
  const int64_t count = task.queries(h), wide = padded(h.dim), size = count * (2 + wide);
  const auto state = [&](int64_t n) {
    float* at = partials + task.partial + n * size;
    return Softmax{at + count * wide, at + count * (wide + 1), at};
  };
  for (int64_t n = 1; n < task.splits; ++n) merge(state(0), state(n), count, wide);
  write_out(task, state(0), h, out);
}

}  // namespace

extern "C" {

// x += y * y_scale, unless y is null; out = x / rms(x) * weight. All [rows, width], weight [width].
void add_rms_norm(float* x, const float* y, float y_scale, const float* weight, float eps, float* out, int64_t rows,
                  int64_t width) {
#pragma omp parallel for if (rows > 8)
  for (int64_t r = 0; r < rows; ++r) {
    float* xr = x + r * width;
    float sum = 0.f;
    if (y) {
      const float* yr = y + r * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) xr[i] += yr[i] * y_scale;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += xr[i] * xr[i];
    const float scale = 1.f / std::sqrt(sum / width + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[r * width + i] = xr[i] * scale * weight[i];
  }
}

// out = silu(gate) * up, from [rows, 2 * width] to [rows, width].
void silu_mul(const float* gate_up, float* out, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows > 8)
  for (int64_t r = 0; r < rows; ++r) {
    const float* gate = gate_up + r * 2 * width;
    const float* up = gate + width;
    float* to = out + r * width;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const vec g = load(gate + i);
      store(to + i, g / (exp_of(-g) + 1.f) * load(up + i));
    }
    for (; i < width; ++i) to[i] = gate[i] / (1.f + exp_of(-gate[i])) * up[i];
  }
}

// Rotate queries and keys, write keys and values into the slabs of layer `layer`, attend.
// qkv [rows, heads + 2 kv_heads, dim], left rotated; cos and sin [rows, rotary_dim / 2], null: no rotation;
// out [rows, heads, dim].
void attention(float* qkv, const float* cos, const float* sin, const Window* windows, int64_t count, int64_t layer,
               const Heads* heads, float* out) {
  const Heads& h = *heads;
  std::vector<const Window*> window_of;
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) {
    window_of.insert(window_of.end(), windows[i].rows, windows + i);
    work += windows[i].rows * (windows[i].start + windows[i].rows);
  }
  const int64_t rows = window_of.size(), row_size = (h.heads + 2 * h.kv_heads) * h.dim, half = h.rotary_dim / 2;
  const Plan planned = plan(windows, count, h);
  std::vector<float> partials(planned.partials);
#pragma omp parallel if (work > 512)
  {
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      const Window& w = *window_of[r];
      prepare_row(qkv + r * row_size, cos ? cos + r * half : nullptr, sin ? sin + r * half : nullptr,
                  keys_of(w, h, layer), values_of(w, h, layer), w.start + r - w.row, h);
    }
    const int64_t tasks = planned.tasks.size(), merges = planned.merges.size();
    // The last rows of a long window see the most: they begin, so that no thread ends long after the others.
#pragma omp for schedule(dynamic)
    for (int64_t t = tasks - 1; t >= 0; --t) run_task(planned.tasks[t], qkv, layer, h, partials.data(), out);
#pragma omp for
    for (int64_t t = 0; t < merges; ++t) run_merge(planned.merges[t], h, partials.data(), out);
  }
}

// All layers and the norm after them: x [rows, hidden] in and left changed, h [rows, hidden] out. `scratch` holds
// [rows, widest], widest being what a layer's qkv and attention, or its gate, up and gated, take side by side, and
// hidden. Window numbers are rows of x. With `sum`, layers are a rank's share, and what comes of `out` and of `down` is
// summed over all ranks; returns what a sum that failed does, else 0.
int64_t run_layers(const Layer* layers, int64_t count, Product product, const float* final_norm, float eps,
                float residual_scale, float* x, float* h, int64_t rows, int64_t hidden, const float* cos,
                const float* sin, const Window* windows, int64_t window_count, float* scratch, Sum sum, void* group) {
  float* y = scratch;
  float* wide = y + rows * hidden;
  add_rms_norm(x, nullptr, residual_scale, layers[0].attention_norm, eps, h, rows, hidden);
  for (int64_t n = 0; n < count; ++n) {
    const Layer& layer = layers[n];
    const Heads& heads = *layer.heads;
    float* attended = wide + rows * (heads.heads + 2 * heads.kv_heads) * heads.dim;
    product(layer.qkv, h, rows, wide);
    attention(wide, layer.rotates ? cos : nullptr, layer.rotates ? sin : nullptr, windows, window_count, n, &heads,
              attended);
    product(layer.out, attended, rows, y);
    if (const int64_t failed = sum ? sum(group, y, rows * hidden) : 0) return failed;
    add_rms_norm(x, y, residual_scale, layer.mlp_norm, eps, h, rows, hidden);
    float* gated = wide + rows * 2 * layer.width;
    product(layer.gate_up, h, rows, wide);
    silu_mul(wide, gated, rows, layer.width);
    product(layer.down, gated, rows, y);
    if (const int64_t failed = sum ? sum(group, y, rows * hidden) : 0) return failed;
    add_rms_norm(x, y, residual_scale, n + 1 < count ? layers[n + 1].attention_norm : final_norm, eps, h, rows,
                 hidden);
  }
  return 0;
}
}
