// Everything of a decoder layer on a CPU that is not a matrix product, over a ragged batch of windows.
//
// A decode step of a small model is a few hundred tiny operations; each costs microseconds of dispatch when it
// is a call of its own. Here a layer has four: norm, rope + KV write + attention, norm, gate.
// All tensors are float32, row-major and contiguous. Compiled for the host by paceline/engine/native.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// One sequence's part of the step. Its keys and values go to positions start, start + 1, … of its slab
// [layers, kv_heads, room, dim]; `row` is its first row in the step.
struct Window {
  int64_t row, start, rows;
  float* keys;
  float* values;
  int64_t room;
  int64_t attend;  // 0: only rotate and write, the caller attends (long windows)
};

struct Heads {
  int64_t heads, kv_heads, dim, rotary_dim;
  float scale, norm_eps;
  const float* q_norm;  // RMS norm weights over a head, or null
  const float* k_norm;
  int64_t sliding_window;  // 0: none
};

namespace {

// e^x within 2 units in the last place, in a form every compiler vectorizes: x = n ln 2 + r, e^r by its series
// (Cephes' expf). Below -87 it is as good as 0.
inline float exp_of(float x) {
  x = std::min(std::max(x, -87.f), 88.f);
  const float n = static_cast<float>(static_cast<int32_t>(x * 1.44269504f + (x < 0.f ? -0.5f : 0.5f)));
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// The first rotary_dim elements turn, halves against each other; the rest pass.
inline void rotate(const float* in, float* out, const float* cos, const float* sin, const Heads& h) {
  const int64_t half = cos ? h.rotary_dim / 2 : 0;
  for (int64_t i = 0; i < half; ++i) {
    const float a = in[i], b = in[i + half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + half] = b * cos[i] + a * sin[i];
  }
  for (int64_t i = 2 * half; i < h.dim; ++i) out[i] = in[i];
}

inline void norm_head(float* x, const float* weight, const Heads& h) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < h.dim; ++i) sum += x[i] * x[i];
  const float scale = 1.f / std::sqrt(sum / h.dim + h.norm_eps);
  for (int64_t i = 0; i < h.dim; ++i) x[i] *= scale * weight[i];
}

template <int64_t Dim>  // 0: known only at run time
void attend(const float* q, const Window& w, const Heads& h, const float* keys, const float* values, float* out,
            int64_t out_stride) {
  const int64_t dim = Dim ? Dim : h.dim, group = h.heads / h.kv_heads, queries = group * w.rows;
  const int64_t end = w.start + w.rows;
  const int64_t first = h.sliding_window ? std::max<int64_t>(0, w.start - h.sliding_window + 1) : 0;
  const int64_t span = end - first;
  std::vector<float> scores(queries * span);
  for (int64_t j = first; j < end; ++j) {
    const float* k = keys + j * dim;
    for (int64_t n = 0; n < queries; ++n) {
      const float* qn = q + n * dim;
      float dot = 0.f;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < dim; ++i) dot += qn[i] * k[i];
      scores[n * span + j - first] = dot;
    }
  }
  for (int64_t n = 0; n < queries; ++n) {
    // Row n / group stands at this position: it sees what lies before it and inside its sliding window.
    const int64_t last = w.start + n / group - first + 1;
    const int64_t begin = h.sliding_window ? std::max<int64_t>(0, last - h.sliding_window) : 0;
    float* s = &scores[n * span];
    float top = s[begin], sum = 0.f;
#pragma omp simd reduction(max : top)
    for (int64_t j = begin; j < last; ++j) top = std::max(top, s[j]);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < last; ++j) {
      s[j] = exp_of(s[j] - top);
      sum += s[j];
    }
    std::fill(s, s + begin, 0.f);
    std::fill(s + last, s + span, 0.f);
    const float scale = 1.f / sum;
    for (int64_t j = begin; j < last; ++j) s[j] *= scale;
  }
  std::vector<float> sums(queries * dim, 0.f);
  for (int64_t j = first; j < end; ++j) {
    const float* v = values + j * dim;
    for (int64_t n = 0; n < queries; ++n) {
      const float p = scores[n * span + j - first];
      float* o = &sums[n * dim];
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) o[i] += p * v[i];
    }
  }
  for (int64_t r = 0; r < w.rows; ++r)
    std::memcpy(out + r * out_stride, &sums[r * group * dim], group * dim * sizeof(float));
}

// One window, one KV head: rotate, write keys and values, attend with the query heads that share it.
void window_head(float* qkv, const float* cos, const float* sin, const Window& w, int64_t kv, const Heads& h,
                 float* out) {
  const int64_t group = h.heads / h.kv_heads, dim = h.dim, row_size = (h.heads + 2 * h.kv_heads) * dim;
  const int64_t half = h.rotary_dim / 2;
  float* keys = w.keys + kv * w.room * dim;
  float* values = w.values + kv * w.room * dim;
  std::vector<float> queries(w.attend ? group * w.rows * dim : dim);
  for (int64_t r = 0; r < w.rows; ++r) {
    float* row = qkv + (w.row + r) * row_size;
    const float* c = cos ? cos + (w.row + r) * half : nullptr;
    const float* s = cos ? sin + (w.row + r) * half : nullptr;
    float* k = row + (h.heads + kv) * dim;
    if (h.k_norm) norm_head(k, h.k_norm, h);
    rotate(k, keys + (w.start + r) * dim, c, s, h);
    std::memcpy(values + (w.start + r) * dim, k + h.kv_heads * dim, dim * sizeof(float));
    for (int64_t g = 0; g < group; ++g) {
      float* q = row + (kv * group + g) * dim;
      if (h.q_norm) norm_head(q, h.q_norm, h);
      float* turned = w.attend ? &queries[(r * group + g) * dim] : queries.data();
      rotate(q, turned, c, s, h);
      if (w.attend)
        for (int64_t i = 0; i < dim; ++i) turned[i] *= h.scale;
      else
        std::memcpy(q, turned, dim * sizeof(float));
    }
  }
  if (!w.attend) return;
  float* to = out + w.row * h.heads * dim + kv * group * dim;
  switch (dim) {
    case 64: return attend<64>(queries.data(), w, h, keys, values, to, h.heads * dim);
    case 128: return attend<128>(queries.data(), w, h, keys, values, to, h.heads * dim);
    default: return attend<0>(queries.data(), w, h, keys, values, to, h.heads * dim);
  }
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
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[r * width + i] = gate[i] / (1.f + exp_of(-gate[i])) * gate[width + i];
  }
}

// Rotate queries and keys, write keys and values into the slabs of layer `layer`, attend.
// qkv [rows, heads + 2 kv_heads, dim]; cos and sin [rows, rotary_dim / 2], null: no rotation;
// out [rows, heads, dim]. Queries of windows with attend == 0 are left rotated in qkv.
void attention(float* qkv, const float* cos, const float* sin, const Window* windows, int64_t count, int64_t layer,
               const Heads* heads, float* out) {
  const Heads& h = *heads;
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) work += windows[i].rows * (windows[i].start + windows[i].rows);
#pragma omp parallel for schedule(dynamic) if (work > 512)
  for (int64_t t = 0; t < count * h.kv_heads; ++t) {
    Window w = windows[t / h.kv_heads];
    w.keys += layer * h.kv_heads * w.room * h.dim;
    w.values += layer * h.kv_heads * w.room * h.dim;
    window_head(qkv, cos, sin, w, t % h.kv_heads, h, out);
  }
}
}
