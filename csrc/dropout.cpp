// Dropout of a matrix in place, by the mask of dropout.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "dropout_rows.h"
#include "instruction_set.h"

namespace llm2clip {
namespace {

using torch::stable::Tensor;

constexpr int64_t kRows = 16;

// zeroes the share p of a contiguous (rows, cols) matrix in place; its first row counts as `first_row`
void dropout_rows(Tensor t, int64_t seed, int64_t first_row, double p) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous(), "dropout_rows_: a contiguous matrix is needed");
  const int64_t bytes = t.element_size();
  STD_TORCH_CHECK(bytes == 2 || bytes == 4 || bytes == 8, "dropout_rows_: elements of 2, 4 or 8 bytes are needed");
  const Dropout dropout = dropout_of(seed, p);
  const int64_t rows = t.size(0);
  const int64_t cols = t.size(1);
  char* const values = static_cast<char*>(t.data_ptr());
  torch::stable::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kRows;
    const int64_t count = std::min(end * kRows, rows) - first;
    kernels<DropoutKernels>().rows({values + first * cols * bytes, bytes, count, cols, dropout, first_row + first});
  });
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("dropout_rows_", TORCH_BOX(&llm2clip::dropout_rows));
}
