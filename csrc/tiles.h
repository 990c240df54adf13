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

// rows of a tile handled at a time
constexpr int64_t kBlock = 64;
// columns of the narrowest tile that the GEMM multiplies at its full rate
constexpr int64_t kNarrowest = 256;

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

// One tile of a product x·yᵀ: rows [r, r + m), columns [c, c + n).
struct Tile {
  int64_t worker;  // whose buffers it uses
  bool first;      // whether it is its worker's first tile of this stripe
  int64_t r, m, c, n;
};

// How a product x·yᵀ (rows, cols) is cut: stripes of rows one after the other, a stripe's tiles shared among workers.
//
// A worker is one thread with its own tile, so nobody waits inside a tile; only a stripe's end is a meeting point.
// Within a stripe every column belongs to one worker: sums along columns need no merging, sums along rows do.
// With a single worker the GEMM and for_each_block use all threads themselves.
struct Tiles {
  int64_t rows, cols, height, width, workers;

  Tiles(const Tensor& x, const Tensor& y, int64_t tile) : rows(x.size(0)), cols(y.size(0)), height(std::min(tile, rows)) {
    const int64_t threads = torch::stable::get_num_threads();
    // a tile for every thread, but none so narrow that the GEMM suffers
    const int64_t share = (cols + threads * kBlock - 1) / (threads * kBlock) * kBlock;
    width = std::min({tile, std::max(share, kNarrowest), cols});
    const int64_t across = (cols + width - 1) / width;
    workers = std::min(threads, across);
    // threads without a tile help inside the others' GEMM instead
    if (2 * workers < threads) workers = 1;
  }

  int64_t blocks() const { return (height + kBlock - 1) / kBlock; }

  // body(const Tile&) for every tile, then after(r, m) when the stripe at row r is complete
  template <class Body, class After>
  void each(const Body& body, const After& after) const {
    const int64_t across = (cols + width - 1) / width;
    for (int64_t r = 0; r < rows; r += height) {
      const int64_t m = std::min(height, rows - r);
      const auto work = [&](int64_t worker) {
        const int64_t begin = across * worker / workers;
        const int64_t end = across * (worker + 1) / workers;
        for (int64_t t = begin; t < end; ++t) {
          body(Tile{worker, t == begin, r, m, t * width, std::min(width, cols - t * width)});
        }
      };
      if (workers == 1) {
        work(0);
      } else {
        torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
          for (int64_t w = begin; w < end; ++w) work(w);
        });
      }
      after(r, m);
    }
  }

  template <class Body>
  void each(const Body& body) const {
    each(body, [](int64_t, int64_t) {});
  }
};

// A (height, width) buffer of floats for every worker.
inline std::vector<Tensor> worker_buffers(const Tensor& like, int64_t workers, int64_t floats) {
  std::vector<Tensor> out;
  for (int64_t w = 0; w < workers; ++w) out.push_back(flat_floats(like, floats));
  return out;
}

// to (rows, dim) = sum of the workers' partial sums, in the workers' order
inline void add_workers(const Tensor& to, const std::vector<Tensor>& partial) {
  const int64_t dim = to.size(1);
  for_each_block(to.size(0), [&](int64_t, int64_t first, int64_t count) {
    float* out = data(to) + first * dim;
    for (size_t w = 0; w < partial.size(); ++w) {
      const float* in = data(partial[w]) + first * dim;
      if (w == 0) {
        std::copy(in, in + count * dim, out);
      } else {
        for (int64_t k = 0; k < count * dim; ++k) out[k] += in[k];
      }
    }
  });
}

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
