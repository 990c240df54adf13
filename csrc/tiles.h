// CPU tensors as matrices of floats, their product, and the walk over the tiles of a product x·yᵀ.

#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

#include "elements.h"
#include "gemm.h"

namespace llm2clip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of a tile handled at a time, and what sides of tiles are multiples of: whole strips and panels of our kernels.
constexpr int64_t kBlock = 48;
// columns of the narrowest tile that a GEMM multiplies at its full rate
constexpr int64_t kNarrowest = 192;

inline Tensor product_view(const Tensor& t, int64_t start, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(t), 0, start, count);
}

inline Tensor flat_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Float);
}

inline float* data(const Tensor& t) {
  return static_cast<float*>(t.data_ptr());
}

inline Elements elements_of(const Tensor& t) {
  const bool are_bfloat16 = t.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(are_bfloat16 || t.scalar_type() == ScalarType::Float, "rows must be float32 or bfloat16");
  return {t.data_ptr(), are_bfloat16};
}

// Tells the system that this memory, not yet touched, may come in huge pages: small ones of a matrix cost a page fault
// every 1024 floats, which takes longer than filling them.
inline const Tensor& on_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t start = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (start + t.numel() * t.element_size()) / kHugePage * kHugePage;
  // advice: where it is not taken nothing is lost
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

inline MatrixView view_of(const Tensor& t) {
  return {data(t), t.stride(0), t.stride(1)};
}

// out = a·b, or out += a·b, by our own kernel: on the threads that are free, each with a share of the longer side
inline void multiply_with(Gemm gemm, const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  const Product whole{out.size(0), out.size(1), a.size(1), view_of(a), view_of(b), data(out), out.stride(0), accumulate};
  const bool by_rows = whole.m >= whole.n;
  const int64_t units = ((by_rows ? whole.m : whole.n) + kBlock - 1) / kBlock;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t shares = std::min(units, threads);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = units * begin / shares * kBlock;
    const int64_t last = units * end / shares * kBlock;
    Product share = whole;
    if (by_rows) {
      share.m = std::min(last, whole.m) - first;
      share.a.data += first * whole.a.row_stride;
      share.out += first * whole.out_stride;
    } else {
      share.n = std::min(last, whole.n) - first;
      share.b.data += first * whole.b.col_stride;
      share.out += first;
    }
    const Tensor workspace = flat_floats(out, kGemmWorkspace);
    gemm(share, data(workspace));
  });
}

// out = a·b, or out += a·b
inline void multiply(Tensor out, const Tensor& a, const Tensor& b, bool accumulate) {
  const Gemm gemm = tile_gemm();
  if (gemm != nullptr) return multiply_with(gemm, out, a, b, accumulate);
  if (accumulate) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), /*beta=*/1.0, /*alpha=*/1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
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

// A length cut into parts as equal as whole units allow.
struct Cut {
  int64_t total, unit, units, parts;

  // parts of at most `limit`, their number a multiple of `multiple` where there are units enough
  Cut(int64_t total, int64_t limit, int64_t multiple)
      : total(total), unit(std::min(kBlock, limit)), units((total + unit - 1) / unit) {
    const int64_t most = limit / unit;
    const int64_t least = (units + most - 1) / most;
    parts = std::min((least + multiple - 1) / multiple * multiple, units);
  }

  int64_t begin(int64_t part) const { return std::min(units * part / parts * unit, total); }
  int64_t largest() const { return std::min((units + parts - 1) / parts * unit, total); }
};

// How a product x·yᵀ (rows, cols) is cut: stripes of rows one after the other, a stripe's tiles shared among workers.
//
// A worker is one thread with its own tile, so nobody waits inside a tile; only a stripe's end is a meeting point.
// Within a stripe every column belongs to one worker: sums along columns need no merging, sums along rows do.
// With a single worker the GEMM and for_each_block use all threads themselves.
struct Tiles {
  int64_t rows, cols, workers;
  Cut down, across;
  int64_t height, width;  // of the largest tile

  Tiles(const Tensor& x, const Tensor& y, int64_t tile)
      : rows(x.size(0)),
        cols(y.size(0)),
        workers(workers_for(cols, tile)),
        down(rows, tile, 1),
        across(cols, tile, workers),
        height(down.largest()),
        width(across.largest()) {
    workers = std::min(workers, across.parts);
  }

  static int64_t workers_for(int64_t cols, int64_t tile) {
    const int64_t threads = torch::stable::get_num_threads();
    // a tile for every thread, but none so narrow that the GEMM suffers
    const int64_t narrowest = std::min(tile, kNarrowest);
    const int64_t workers = std::min(threads, (cols + narrowest - 1) / narrowest);
    // threads without a tile help inside the others' GEMM instead
    return 2 * workers < threads ? 1 : workers;
  }

  int64_t blocks() const { return (height + kBlock - 1) / kBlock; }

  // body(const Tile&) for every tile, then after(r, m) when the stripe at row r is complete
  template <class Body, class After>
  void each(const Body& body, const After& after) const {
    for (int64_t stripe = 0; stripe < down.parts; ++stripe) {
      const int64_t r = down.begin(stripe);
      const int64_t m = down.begin(stripe + 1) - r;
      const auto work = [&](int64_t worker) {
        const int64_t first = across.parts * worker / workers;
        const int64_t last = across.parts * (worker + 1) / workers;
        for (int64_t t = first; t < last; ++t) {
          const int64_t c = across.begin(t);
          body(Tile{worker, t == first, r, m, c, across.begin(t + 1) - c});
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

// to (t.m, t.n) = the tile t of x·yᵀ
inline void multiply_tile(const Tensor& to, const Tensor& x, const Tensor& y, const Tile& t) {
  multiply(to, product_view(x, t.r, t.m), torch::stable::transpose(product_view(y, t.c, t.n), 0, 1), false);
}

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
