// packed_attention on the CPU: softmax attention inside each sequence of a pack, forward and backward, in fp32.
//
// One task is one key head of one sequence. Captions are short, so a task's keys, values and logits stay in the
// cache, nothing is padded to another caption's length, and blocks of logits that are hidden are not computed.
// The backward makes the weights again; no state but q, k and v is needed.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "instruction_set.h"
#include "simd_exp.h"

namespace llm2clip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// rows of a product computed at a time: as many as leave registers for the operands
constexpr int64_t kBlockRows_default = 4, kBlockRows_avx2 = 4, kBlockRows_avx512 = 8;
// query rows whose logits are held at a time
constexpr int64_t kRows = 64;

LLM2CLIP_INLINE int64_t rounded_up(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// a matrix whose elements need not lie side by side
struct Strided {
  const float* data;
  int64_t row, col;

  LLM2CLIP_INLINE Strided from(int64_t first) const { return {data + first * row, row, col}; }
};

// out (R, V vectors) (+)= a (R, depth) · b (depth, V vectors)
template <int64_t R, int64_t V, bool accumulate>
LLM2CLIP_INLINE void product_block(const Strided& a, const float* b, int64_t ldb, int64_t depth, float* out,
                                   int64_t ldo) {
  Floats total[R][V];
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < V; ++v) total[r][v] = accumulate ? load(out + r * ldo + v * kLanes) : Floats{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[V];
    for (int64_t v = 0; v < V; ++v) right[v] = load(b + k * ldb + v * kLanes);
    for (int64_t r = 0; r < R; ++r) {
      const float left = a.data[r * a.row + k * a.col];
      for (int64_t v = 0; v < V; ++v) total[r][v] += left * right[v];
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < V; ++v) store(out + r * ldo + v * kLanes, total[r][v]);
  }
}

// V vectors of columns of a product, `Rows` rows at a time, and the rest in one block of its own size
template <int64_t Rows, int64_t V, bool accumulate>
LLM2CLIP_INLINE void product_columns(const Strided& a, int64_t rows, int64_t depth, const float* b, int64_t ldb,
                                     float* out, int64_t ldo) {
  int64_t r = 0;
  for (; r + Rows <= rows; r += Rows) {
    product_block<Rows, V, accumulate>(a.from(r), b, ldb, depth, out + r * ldo, ldo);
  }
  if constexpr (Rows > 4) {
    if (r + 4 <= rows) {
      product_block<4, V, accumulate>(a.from(r), b, ldb, depth, out + r * ldo, ldo);
      r += 4;
    }
  }
  if (rows - r == 3) product_block<3, V, accumulate>(a.from(r), b, ldb, depth, out + r * ldo, ldo);
  if (rows - r == 2) product_block<2, V, accumulate>(a.from(r), b, ldb, depth, out + r * ldo, ldo);
  if (rows - r == 1) product_block<1, V, accumulate>(a.from(r), b, ldb, depth, out + r * ldo, ldo);
}

// out (rows, cols) (+)= a (rows, depth) · b (depth, cols); cols a multiple of 16
template <int64_t Rows, bool accumulate>
LLM2CLIP_INLINE void product(const Strided& a, int64_t rows, int64_t depth, const float* b, int64_t ldb,
                             int64_t cols, float* out, int64_t ldo) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= cols; c += 2 * kLanes) {
    product_columns<Rows, 2, accumulate>(a, rows, depth, b + c, ldb, out + c, ldo);
  }
  if (c < cols) product_columns<Rows, 1, accumulate>(a, rows, depth, b + c, ldb, out + c, ldo);
}

struct Problem {
  const float *grad, *q, *k, *v;
  float *out, *dq, *dk, *dv;  // null: not wanted
  const int64_t* edges;
  int64_t sequences, query_heads, key_heads, width;
  bool causal;
  int64_t window;  // -1: none
  float scale;
};

// What a task needs room for; grows to the longest sequence of its worker.
struct Scratch {
  std::vector<float> keys_t, values_t, keys, values, logits, inner, rows_q, rows_g, result, sum_k, sum_v;
};

LLM2CLIP_INLINE float* room(std::vector<float>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

// to = from · factor, `width` floats; library calls for rows this short take longer than their copies
LLM2CLIP_INLINE void copy_row(const float* from, int64_t width, float factor, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(to + d, load(from + d) * factor);
  for (; d < width; ++d) to[d] = from[d] * factor;
}

// (count, width) rows `stride` apart, times `factor` -> rows of `padded` floats, zeros at the end
LLM2CLIP_INLINE void copy_rows(const float* from, int64_t stride, int64_t count, int64_t width, int64_t padded,
                               float factor, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    copy_row(from + i * stride, width, factor, to + i * padded);
    for (int64_t d = width; d < padded; ++d) to[i * padded + d] = 0.0f;
  }
}

// (count, width) rows `stride` apart -> (width, padded), zeros at the end of each row
LLM2CLIP_INLINE void transpose_rows(const float* from, int64_t stride, int64_t count, int64_t width, int64_t padded,
                                    float* to) {
  for (int64_t d = 0; d < width; ++d) std::memset(to + d * padded + count, 0, (padded - count) * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; ++d) to[d * padded + i] = from[i * stride + d];
  }
}

LLM2CLIP_INLINE float largest_lane(Floats value) {
  float lanes[kLanes];
  store(lanes, value);
  float top = lanes[0];
  for (int64_t l = 1; l < kLanes; ++l) top = lanes[l] > top ? lanes[l] : top;
  return top;
}

// row: logits -> exp(logit - largest), 0 outside of [first, last); returns 1 / their sum
LLM2CLIP_INLINE float exponentials(float* row, int64_t count, int64_t first, int64_t last) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  std::fill(row, row + first, kHidden);
  std::fill(row + last, row + count, kHidden);
  Floats top = broadcast(kHidden);
  for (int64_t j = 0; j < count; j += kLanes) top = larger(top, load(row + j));
  const float shift = largest_lane(top);
  Floats total{};
  for (int64_t j = 0; j < count; j += kLanes) {
    const Floats e = exp(load(row + j) - shift);
    store(row + j, e);
    total += e;
  }
  return static_cast<float>(1.0 / sum(total));
}

LLM2CLIP_INLINE void multiply_row(float* row, int64_t count, float factor) {
  for (int64_t j = 0; j < count; j += kLanes) store(row + j, load(row + j) * factor);
}

// Query rows [start, stop) of a sequence of `length` tokens, and the keys [low, high) that they reach.
struct Block {
  int64_t start, stop, low, high;

  LLM2CLIP_INLINE Block(const Problem& p, int64_t length, int64_t start)
      : start(start), stop(std::min(length, start + kRows)) {
    low = p.window < 0 ? 0 : std::max<int64_t>(0, start - p.window) / kLanes * kLanes;
    high = p.causal ? stop : p.window < 0 ? length : std::min(length, stop + p.window);
  }
  LLM2CLIP_INLINE int64_t rows() const { return stop - start; }
  LLM2CLIP_INLINE int64_t columns() const { return rounded_up(high - low); }
};

// unnormalised weights (rows, columns) of the block, and what to multiply each row with
//
// Queries are scaled before the product, logits would take another pass.
template <int64_t Rows>
LLM2CLIP_INLINE void weights_of(const Problem& p, const Block& b, int64_t length, const float* q, const float* keys_t,
                                int64_t padded, float* scaled, float* weights, float* inverse) {
  const int64_t stride = p.query_heads * p.width, wide = rounded_up(p.width);
  copy_rows(q + b.start * stride, stride, b.rows(), p.width, wide, p.scale, scaled);
  product<Rows, false>({scaled, wide, 1}, b.rows(), p.width, keys_t + b.low, padded, b.columns(), weights, b.columns());
  for (int64_t i = b.start; i < b.stop; ++i) {
    const int64_t first = p.window < 0 ? 0 : std::max<int64_t>(0, i - p.window);
    const int64_t last = p.causal ? i + 1 : p.window < 0 ? length : std::min(length, i + p.window + 1);
    inverse[i - b.start] =
        exponentials(weights + (i - b.start) * b.columns(), b.columns(), first - b.low, last - b.low);
  }
}

template <int64_t Rows>
LLM2CLIP_INLINE void forward_task(const Problem& p, int64_t sequence, int64_t head, Scratch& s) {
  const int64_t begin = p.edges[sequence], length = p.edges[sequence + 1] - begin;
  const int64_t group = p.query_heads / p.key_heads;
  const int64_t key_stride = p.key_heads * p.width, query_stride = p.query_heads * p.width;
  const int64_t padded = rounded_up(length), wide = rounded_up(p.width);
  const float* k = p.k + begin * key_stride + head * p.width;
  const float* v = p.v + begin * key_stride + head * p.width;
  float* keys_t = room(s.keys_t, p.width * (padded));
  float* values = room(s.values, length * wide);
  transpose_rows(k, key_stride, length, p.width, padded, keys_t);
  copy_rows(v, key_stride, length, p.width, wide, 1.0f, values);
  float* weights = room(s.logits, kRows * padded);
  float* scaled = room(s.rows_q, kRows * wide);
  float* result = room(s.result, kRows * wide);
  float inverse[kRows];
  for (int64_t g = 0; g < group; ++g) {
    const int64_t offset = begin * query_stride + (head * group + g) * p.width;
    for (int64_t start = 0; start < length; start += kRows) {
      const Block b(p, length, start);
      weights_of<Rows>(p, b, length, p.q + offset, keys_t, padded, scaled, weights, inverse);
      product<Rows, false>({weights, b.columns(), 1}, b.rows(), b.high - b.low, values + b.low * wide, wide, wide, result,
                     wide);
      for (int64_t i = 0; i < b.rows(); ++i) {
        copy_row(result + i * wide, p.width, inverse[i], p.out + offset + (b.start + i) * query_stride);
      }
    }
  }
}

// ds = p ∘ (dp - Σ p dp), in place of dp
LLM2CLIP_INLINE void softmax_gradient_row(const float* weights, float* inner, int64_t count) {
  Floats dot{};
  for (int64_t j = 0; j < count; j += kLanes) dot += load(weights + j) * load(inner + j);
  const float mean = static_cast<float>(sum(dot));
  for (int64_t j = 0; j < count; j += kLanes) {
    store(inner + j, load(weights + j) * (load(inner + j) - mean));
  }
}

template <int64_t Rows>
LLM2CLIP_INLINE void backward_task(const Problem& p, int64_t sequence, int64_t head, Scratch& s) {
  const int64_t begin = p.edges[sequence], length = p.edges[sequence + 1] - begin;
  const int64_t group = p.query_heads / p.key_heads;
  const int64_t key_stride = p.key_heads * p.width, query_stride = p.query_heads * p.width;
  const int64_t padded = rounded_up(length), wide = rounded_up(p.width);
  const int64_t key_offset = begin * key_stride + head * p.width;
  float* keys_t = room(s.keys_t, p.width * (padded));
  float* values_t = room(s.values_t, p.width * (padded));
  float* keys = room(s.keys, length * wide);
  transpose_rows(p.k + key_offset, key_stride, length, p.width, padded, keys_t);
  transpose_rows(p.v + key_offset, key_stride, length, p.width, padded, values_t);
  copy_rows(p.k + key_offset, key_stride, length, p.width, wide, 1.0f, keys);
  float* sum_k = room(s.sum_k, length * wide);
  float* sum_v = room(s.sum_v, length * wide);
  std::fill(sum_k, sum_k + length * wide, 0.0f);
  std::fill(sum_v, sum_v + length * wide, 0.0f);
  float* weights = room(s.logits, kRows * padded);
  float* inner = room(s.inner, kRows * padded);
  float* rows_q = room(s.rows_q, kRows * wide);
  float* rows_g = room(s.rows_g, kRows * wide);
  float* result = room(s.result, kRows * wide);
  float inverse[kRows];
  for (int64_t g = 0; g < group; ++g) {
    const int64_t offset = begin * query_stride + (head * group + g) * p.width;
    for (int64_t start = 0; start < length; start += kRows) {
      const Block b(p, length, start);
      const int64_t rows = b.rows(), columns = b.columns(), reach = b.high - b.low;
      weights_of<Rows>(p, b, length, p.q + offset, keys_t, padded, rows_q, weights, inverse);
      for (int64_t i = 0; i < rows; ++i) multiply_row(weights + i * columns, columns, inverse[i]);
      const float* grad = p.grad + offset + b.start * query_stride;
      if (p.dv != nullptr) {
        copy_rows(grad, query_stride, rows, p.width, wide, 1.0f, rows_g);
        product<Rows, true>({weights, 1, columns}, reach, rows, rows_g, wide, wide, sum_v + b.low * wide, wide);
      }
      if (p.dq == nullptr && p.dk == nullptr) continue;
      product<Rows, false>({grad, query_stride, 1}, rows, p.width, values_t + b.low, padded, columns, inner, columns);
      for (int64_t i = 0; i < rows; ++i) {
        softmax_gradient_row(weights + i * columns, inner + i * columns, columns);
      }
      if (p.dq != nullptr) {
        product<Rows, false>({inner, columns, 1}, rows, reach, keys + b.low * wide, wide, wide, result, wide);
        for (int64_t i = 0; i < rows; ++i) {
          copy_row(result + i * wide, p.width, p.scale, p.dq + offset + (b.start + i) * query_stride);
        }
      }
      if (p.dk != nullptr) {
        // rows_q still holds the queries times the scale
        product<Rows, true>({inner, 1, columns}, reach, rows, rows_q, wide, wide, sum_k + b.low * wide, wide);
      }
    }
  }
  for (int64_t i = 0; i < length; ++i) {
    const int64_t at = key_offset + i * key_stride;
    if (p.dk != nullptr) copy_row(sum_k + i * wide, p.width, 1.0f, p.dk + at);
    if (p.dv != nullptr) copy_row(sum_v + i * wide, p.width, 1.0f, p.dv + at);
  }
}

using Task = void (*)(const Problem&, int64_t, int64_t, Scratch&);

struct Tasks {
  Task forward, backward;
};

#define LLM2CLIP_VARIANT(suffix, target)                                                        \
  target void forward_##suffix(const Problem& p, int64_t sequence, int64_t head, Scratch& s) {  \
    forward_task<kBlockRows_##suffix>(p, sequence, head, s);                                    \
  }                                                                                             \
  target void backward_##suffix(const Problem& p, int64_t sequence, int64_t head, Scratch& s) { \
    backward_task<kBlockRows_##suffix>(p, sequence, head, s);                                   \
  }                                                                                             \
  constexpr Tasks k_##suffix{forward_##suffix, backward_##suffix};

LLM2CLIP_FOR_EACH_INSTRUCTION_SET(LLM2CLIP_VARIANT)

// every task once, the next one to whichever worker is free: sequences differ in length by two orders of magnitude
void run(const Problem& p, Task task) {
  const int64_t tasks = p.sequences * p.key_heads;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), tasks));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t w = begin; w < end; ++w) {
      for (int64_t t = next++; t < tasks; t = next++) {
        const int64_t sequence = t / p.key_heads;
        if (p.edges[sequence + 1] > p.edges[sequence]) task(p, sequence, t % p.key_heads, scratch);
      }
    }
  });
}

Tensor like(const Tensor& t, bool wanted) {
  return torch::stable::new_empty(t, wanted ? std::vector<int64_t>{t.size(0), t.size(1), t.size(2)} : std::vector<int64_t>{0});
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& edges) {
  for (const Tensor* t : {&q, &k, &v}) {
    STD_TORCH_CHECK(t->dim() == 3 && t->is_contiguous() && t->scalar_type() == ScalarType::Float,
                    "packed_attention: q, k, v must be 3-D float32, contiguous");
  }
  STD_TORCH_CHECK(edges.dim() == 1 && edges.size(0) >= 1 && edges.is_contiguous() &&
                      edges.scalar_type() == ScalarType::Long,
                  "packed_attention: cu_seqlens must be 1-D int64, contiguous");
  const int64_t* at = static_cast<const int64_t*>(edges.data_ptr());
  STD_TORCH_CHECK(at[0] == 0 && at[edges.size(0) - 1] == q.size(0) && std::is_sorted(at, at + edges.size(0)),
                  "packed_attention: cu_seqlens must rise from 0 to the number of tokens");
}

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& edges, bool causal, int64_t window,
                double scale) {
  check(q, k, v, edges);
  Problem p{};
  p.q = static_cast<const float*>(q.data_ptr());
  p.k = static_cast<const float*>(k.data_ptr());
  p.v = static_cast<const float*>(v.data_ptr());
  p.edges = static_cast<const int64_t*>(edges.data_ptr());
  p.sequences = edges.size(0) - 1;
  p.query_heads = q.size(1);
  p.key_heads = k.size(1);
  p.width = q.size(2);
  p.causal = causal;
  p.window = window;
  p.scale = static_cast<float>(scale);
  return p;
}

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& edges, bool causal, int64_t window,
               double scale) {
  Problem p = problem(q, k, v, edges, causal, window, scale);
  Tensor out = like(q, true);
  p.out = static_cast<float*>(out.data_ptr());
  static const Tasks tasks = LLM2CLIP_FOR_THIS_PROCESSOR(k);
  run(p, tasks.forward);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& edges, bool causal, int64_t window, double scale,
                                            bool need_q, bool need_k, bool need_v) {
  Problem p = problem(q, k, v, edges, causal, window, scale);
  check(grad, k, v, edges);
  p.grad = static_cast<const float*>(grad.data_ptr());
  Tensor dq = like(q, need_q), dk = like(k, need_k), dv = like(v, need_v);
  if (need_q) p.dq = static_cast<float*>(dq.data_ptr());
  if (need_k) p.dk = static_cast<float*>(dk.data_ptr());
  if (need_v) p.dv = static_cast<float*>(dv.data_ptr());
  static const Tasks tasks = LLM2CLIP_FOR_THIS_PROCESSOR(k);
  run(p, tasks.backward);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&llm2clip::forward));
  m.impl("packed_attention_backward", TORCH_BOX(&llm2clip::backward));
}
