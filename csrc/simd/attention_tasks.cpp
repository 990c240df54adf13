// Softmax attention of one key head of one sequence. Captions are short, so its keys, values and logits stay in the
// cache, and blocks of logits that are hidden are not computed. The backward makes the weights again.

#include "../attention_tasks.h"

#include "exp.h"

namespace llm2clip {
namespace {

// A block of a product: so many rows and registers of columns that its sums stay in registers, beside operands.
#if defined(__AVX512F__)
constexpr int64_t kBlockQueryRows = 8;
#else
constexpr int64_t kBlockQueryRows = 6;
#endif
constexpr int64_t kBlockRegisters = 2;

// a matrix whose elements need not lie side by side
struct Strided {
  const float* data;
  int64_t row, col;

  LLM2CLIP_INLINE Strided from(int64_t first) const { return {data + first * row, row, col}; }
};

// out (R, V registers) (+)= a (R, depth) · b (depth, V registers)
template <int64_t R, int64_t V, bool accumulate>
LLM2CLIP_INLINE void product_block(const Strided& a, const float* b, int64_t ldb, int64_t depth, float* out,
                                   int64_t ldo) {
  FloatRegister total[R][V];
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < V; ++v) {
      total[r][v] = accumulate ? load_lanes<FloatRegister>(out + r * ldo + v * kRegisterLanes) : FloatRegister{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    FloatRegister right[V];
    for (int64_t v = 0; v < V; ++v) right[v] = load_lanes<FloatRegister>(b + k * ldb + v * kRegisterLanes);
    for (int64_t r = 0; r < R; ++r) {
      const float left = a.data[r * a.row + k * a.col];
      for (int64_t v = 0; v < V; ++v) total[r][v] += left * right[v];
    }
  }
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t v = 0; v < V; ++v) store_lanes(out + r * ldo + v * kRegisterLanes, total[r][v]);
  }
}

// V registers of columns of a product, kBlockQueryRows rows at a time, and the rest in one or two smaller blocks
template <int64_t V, bool accumulate>
LLM2CLIP_INLINE void product_columns(const Strided& a, int64_t rows, int64_t depth, const float* b, int64_t ldb,
                                     float* out, int64_t ldo) {
  int64_t r = 0;
  for (; r + kBlockQueryRows <= rows; r += kBlockQueryRows) {
    product_block<kBlockQueryRows, V, accumulate>(a.from(r), b, ldb, depth, out + r * ldo, ldo);
  }
  if (r + 4 <= rows) {
    product_block<4, V, accumulate>(a.from(r), b, ldb, depth, out + r * ldo, ldo);
    r += 4;
  }
  if (rows - r == 3) product_block<3, V, accumulate>(a.from(r), b, ldb, depth, out + r * ldo, ldo);
  if (rows - r == 2) product_block<2, V, accumulate>(a.from(r), b, ldb, depth, out + r * ldo, ldo);
  if (rows - r == 1) product_block<1, V, accumulate>(a.from(r), b, ldb, depth, out + r * ldo, ldo);
}

// out (rows, cols) (+)= a (rows, depth) · b (depth, cols); cols a multiple of 16
template <bool accumulate>
LLM2CLIP_INLINE void product(const Strided& a, int64_t rows, int64_t depth, const float* b, int64_t ldb,
                             int64_t cols, float* out, int64_t ldo) {
  constexpr int64_t step = kBlockRegisters * kRegisterLanes;
  int64_t c = 0;
  for (; c + step <= cols; c += step) {
    product_columns<kBlockRegisters, accumulate>(a, rows, depth, b + c, ldb, out + c, ldo);
  }
  if constexpr (step > kLanes) {
    if (c < cols) product_columns<1, accumulate>(a, rows, depth, b + c, ldb, out + c, ldo);
  }
}

// Memory given out piece by piece.
struct Workspace {
  float* next;

  LLM2CLIP_INLINE float* take(int64_t count) {
    float* const piece = next;
    next += count;
    return piece;
  }
};

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

LLM2CLIP_INLINE void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// row: logits -> exp(logit - largest), 0 outside of [first, last); returns 1 / their sum
LLM2CLIP_INLINE float exponentials(float* row, int64_t count, int64_t first, int64_t last) {
  constexpr float kHidden = -__builtin_inff();
  fill(row, first, kHidden);
  fill(row + last, count - last, kHidden);
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

  LLM2CLIP_INLINE Block(const AttentionProblem& p, int64_t length, int64_t start)
      : start(start), stop(smaller(length, start + kQueryRows)) {
    low = p.window < 0 ? 0 : larger(0, start - p.window) / kLanes * kLanes;
    high = p.causal ? stop : p.window < 0 ? length : smaller(length, stop + p.window);
  }
  LLM2CLIP_INLINE int64_t rows() const { return stop - start; }
  LLM2CLIP_INLINE int64_t columns() const { return whole_vectors(high - low); }
};

// unnormalised weights (rows, columns) of the block, and what to multiply each row with
//
// Queries are scaled before the product, logits would take another pass.
LLM2CLIP_INLINE void weights_of(const AttentionProblem& p, const Block& b, int64_t length, const float* q,
                                const float* keys_t, int64_t padded, float* scaled, float* weights, float* inverse) {
  const int64_t stride = p.query_heads * p.width, wide = whole_vectors(p.width);
  copy_rows(q + b.start * stride, stride, b.rows(), p.width, wide, p.scale, scaled);
  product<false>({scaled, wide, 1}, b.rows(), p.width, keys_t + b.low, padded, b.columns(), weights, b.columns());
  for (int64_t i = b.start; i < b.stop; ++i) {
    const int64_t first = p.window < 0 ? 0 : larger(0, i - p.window);
    const int64_t last = p.causal ? i + 1 : p.window < 0 ? length : smaller(length, i + p.window + 1);
    inverse[i - b.start] =
        exponentials(weights + (i - b.start) * b.columns(), b.columns(), first - b.low, last - b.low);
  }
}

void forward_task(const AttentionProblem& p, int64_t sequence, int64_t head, float* workspace) {
  Workspace space{workspace};
  const int64_t begin = p.edges[sequence], length = p.edges[sequence + 1] - begin;
  const int64_t group = p.query_heads / p.key_heads;
  const int64_t key_stride = p.key_heads * p.width, query_stride = p.query_heads * p.width;
  const int64_t padded = whole_vectors(length), wide = whole_vectors(p.width);
  const float* k = p.k + begin * key_stride + head * p.width;
  const float* v = p.v + begin * key_stride + head * p.width;
  float* keys_t = space.take(p.width * padded);
  float* values = space.take(length * wide);
  transpose_rows(k, key_stride, length, p.width, padded, keys_t);
  copy_rows(v, key_stride, length, p.width, wide, 1.0f, values);
  float* weights = space.take(kQueryRows * padded);
  float* scaled = space.take(kQueryRows * wide);
  float* result = space.take(kQueryRows * wide);
  float inverse[kQueryRows];
  for (int64_t g = 0; g < group; ++g) {
    const int64_t offset = begin * query_stride + (head * group + g) * p.width;
    for (int64_t start = 0; start < length; start += kQueryRows) {
      const Block b(p, length, start);
      weights_of(p, b, length, p.q + offset, keys_t, padded, scaled, weights, inverse);
      product<false>({weights, b.columns(), 1}, b.rows(), b.high - b.low, values + b.low * wide, wide, wide, result,
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

void backward_task(const AttentionProblem& p, int64_t sequence, int64_t head, float* workspace) {
  Workspace space{workspace};
  const int64_t begin = p.edges[sequence], length = p.edges[sequence + 1] - begin;
  const int64_t group = p.query_heads / p.key_heads;
  const int64_t key_stride = p.key_heads * p.width, query_stride = p.query_heads * p.width;
  const int64_t padded = whole_vectors(length), wide = whole_vectors(p.width);
  const int64_t key_offset = begin * key_stride + head * p.width;
  float* keys_t = space.take(p.width * padded);
  float* values_t = space.take(p.width * padded);
  float* keys = space.take(length * wide);
  transpose_rows(p.k + key_offset, key_stride, length, p.width, padded, keys_t);
  transpose_rows(p.v + key_offset, key_stride, length, p.width, padded, values_t);
  copy_rows(p.k + key_offset, key_stride, length, p.width, wide, 1.0f, keys);
  float* sum_k = space.take(length * wide);
  float* sum_v = space.take(length * wide);
  fill(sum_k, length * wide, 0.0f);
  fill(sum_v, length * wide, 0.0f);
  float* weights = space.take(kQueryRows * padded);
  float* inner = space.take(kQueryRows * padded);
  float* rows_q = space.take(kQueryRows * wide);
  float* rows_g = space.take(kQueryRows * wide);
  float* result = space.take(kQueryRows * wide);
  float inverse[kQueryRows];
  for (int64_t g = 0; g < group; ++g) {
    const int64_t offset = begin * query_stride + (head * group + g) * p.width;
    for (int64_t start = 0; start < length; start += kQueryRows) {
      const Block b(p, length, start);
      const int64_t rows = b.rows(), columns = b.columns(), reach = b.high - b.low;
      weights_of(p, b, length, p.q + offset, keys_t, padded, rows_q, weights, inverse);
      for (int64_t i = 0; i < rows; ++i) multiply_row(weights + i * columns, columns, inverse[i]);
      const float* grad = p.grad + offset + b.start * query_stride;
      if (p.dv != nullptr) {
        copy_rows(grad, query_stride, rows, p.width, wide, 1.0f, rows_g);
        product<true>({weights, 1, columns}, reach, rows, rows_g, wide, wide, sum_v + b.low * wide, wide);
      }
      if (p.dq == nullptr && p.dk == nullptr) continue;
      product<false>({grad, query_stride, 1}, rows, p.width, values_t + b.low, padded, columns, inner, columns);
      for (int64_t i = 0; i < rows; ++i) {
        softmax_gradient_row(weights + i * columns, inner + i * columns, columns);
      }
      if (p.dq != nullptr) {
        product<false>({inner, columns, 1}, rows, reach, keys + b.low * wide, wide, wide, result, wide);
        for (int64_t i = 0; i < rows; ++i) {
          copy_row(result + i * wide, p.width, p.scale, p.dq + offset + (b.start + i) * query_stride);
        }
      }
      if (p.dk != nullptr) {
        // rows_q still holds the queries times the scale
        product<true>({inner, 1, columns}, reach, rows, rows_q, wide, wide, sum_k + b.low * wide, wide);
      }
    }
  }
  for (int64_t i = 0; i < length; ++i) {
    const int64_t at = key_offset + i * key_stride;
    if (p.dk != nullptr) copy_row(sum_k + i * wide, p.width, 1.0f, p.dk + at);
    if (p.dv != nullptr) copy_row(sum_v + i * wide, p.width, 1.0f, p.dv + at);
  }
}

}  // namespace

const AttentionKernels AttentionKernels::LLM2CLIP_INSTRUCTION_SET{forward_task, backward_task};

}  // namespace llm2clip
