// l2_normalize on the CPU: rows to unit length and the gradient, one pass each, with the cast to another dtype.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "instruction_set.h"
#include "l2_normalize_rows.h"
#include "tiles.h"

namespace llm2clip {
namespace {

// y (rows, cols) and the norms (rows,)
std::tuple<Tensor, Tensor> forward(const Tensor& x, double eps, bool to_bfloat16) {
  const int64_t rows = x.size(0);
  const int64_t cols = x.size(1);
  Tensor y = torch::stable::new_empty(x, {rows, cols}, to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  Tensor norm = flat_floats(x, rows);
  const NormalizeRows a{elements_of(x), cols, eps, elements_of(y), data(norm)};
  for_each_block(rows, [&](int64_t, int64_t first, int64_t count) {
    kernels<NormalizeKernels>().forward(a, first, count);
  });
  return {y, norm};
}

// dx = (g - ŷ<g, ŷ>) / norm; g / eps where the norm is below eps. `saved` is y itself or x.
Tensor backward(const Tensor& g, const Tensor& saved, const Tensor& norm, double eps, bool saved_is_unit,
                bool to_bfloat16) {
  const int64_t rows = g.size(0);
  const int64_t cols = g.size(1);
  Tensor dx = torch::stable::new_empty(g, {rows, cols}, to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  const NormalizeGradRows a{elements_of(g), cols, eps, elements_of(saved), saved_is_unit, data(norm), elements_of(dx)};
  for_each_block(rows, [&](int64_t, int64_t first, int64_t count) {
    kernels<NormalizeKernels>().backward(a, first, count);
  });
  return dx;
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("l2_normalize_forward", TORCH_BOX(&llm2clip::forward));
  m.impl("l2_normalize_backward", TORCH_BOX(&llm2clip::backward));
}
