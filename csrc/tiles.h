// CPU tensors as matrices of floats, torch's own GEMM on them, and the walk over the tiles of a product x·yᵀ.

#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace llm2clip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// rows of a tile handled by one thread at a time; fixed, so results do not depend on the thread count
constexpr int64_t kBlock = 64;
inline Tensor product_view(const Tensor& t, int64_t start, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 0, start, count);
}

// out = a·b, or out += a·b
inline void multiply(Tensor out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), /*beta=*/1.0, /*alpha=*/1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

inline Tensor flat_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Float);
}

inline float* data(const Tensor& t) {
  return static_cast<float*>(t.data_ptr());
}

// the first rows·cols floats of `buffer` as a matrix
inline Tensor as_matrix(const Tensor& buffer, int64_t rows, int64_t cols) {
  return torch::stable::view(product_view(buffer, 0, rows * cols), {rows, cols});
}

template <class Body>
void for_each_block(int64_t rows, const Body& body) {
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b, b * kBlock, std::min(kBlock, rows - b * kBlock));
  });
}

struct Tiles {
  int64_t rows, cols, height, width;
  Tiles(const Tensor& x, const Tensor& y, int64_t tile)
      : rows(x.size(0)), cols(y.size(0)), height(std::min(tile, rows)), width(std::min(tile, cols)) {}

  template <class Body>
  void each(const Body& body) const {
    for (int64_t r = 0; r < rows; r += height) {
      for (int64_t c = 0; c < cols; c += width) {
        body(r, std::min(height, rows - r), c, std::min(width, cols - c));
      }
    }
  }
};

inline double weighted_dot(const Tensor& a, const Tensor& b) {
  const int64_t rows = a.size(0);
  const int64_t dim = a.size(1);
  std::vector<double> partial((rows + kBlock - 1) / kBlock, 0.0);
  for_each_block(rows, [&](int64_t block, int64_t first, int64_t count) {
    const float* p = data(a) + first * dim;
    const float* q = data(b) + first * dim;
    double total = 0;
    for (int64_t k = 0; k < count * dim; ++k) total += static_cast<double>(p[k]) * q[k];
    partial[block] = total;
  });
  double total = 0;
  for (double p : partial) total += p;
  return total;
}

inline void multiply_by(const Tensor& t, double factor) {
  const int64_t dim = t.size(1);
  for_each_block(t.size(0), [&](int64_t, int64_t first, int64_t count) {
    float* values = data(t) + first * dim;
    for (int64_t k = 0; k < count * dim; ++k) values[k] *= static_cast<float>(factor);
  });
}

}  // namespace llm2clip
