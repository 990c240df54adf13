// Dropout of a matrix in place, by the mask of dropout.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "dropout.h"

namespace llm2clip {
namespace {

using torch::stable::Tensor;

constexpr int64_t kRows = 16;

// elements as bit patterns: zero has the same one in every float type
template <class Bits>
void drop_all(const Tensor& t, const Dropout& dropout, int64_t first_row) {
  const int64_t rows = t.size(0);
  const int64_t cols = t.size(1);
  Bits* values = static_cast<Bits*>(t.data_ptr());
  torch::stable::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    run_simd([&]() __attribute__((always_inline)) {
      for (int64_t i = begin * kRows; i < std::min(end * kRows, rows); ++i) {
        const uint32_t key = dropout.row_key(first_row + i);
        Bits* row = values + i * cols;
        for (int64_t j = 0; j < cols; ++j) {
          row[j] = dropout.keeps(key, static_cast<uint32_t>(j)) ? row[j] : Bits{0};
        }
      }
    });
  });
}

// zeroes the share p of a contiguous (rows, cols) matrix in place; its first row counts as `first_row`
void dropout_rows(Tensor t, int64_t seed, int64_t first_row, double p) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous(), "dropout_rows_: a contiguous matrix is needed");
  const Dropout dropout(seed, p);
  switch (t.element_size()) {
    case 2:
      return drop_all<uint16_t>(t, dropout, first_row);
    case 4:
      return drop_all<uint32_t>(t, dropout, first_row);
    case 8:
      return drop_all<uint64_t>(t, dropout, first_row);
    default:
      STD_TORCH_CHECK(false, "dropout_rows_: elements of 2, 4 or 8 bytes are needed");
  }
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("dropout_rows_", TORCH_BOX(&llm2clip::dropout_rows));
}
