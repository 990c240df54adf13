// segment_mean on the CPU: one read of the token states forward, one write of their gradients backward.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "instruction_set.h"
#include "segment_mean_rows.h"
#include "tiles.h"

namespace llm2clip {
namespace {

const int64_t* integers(const Tensor& t) {
  return static_cast<const int64_t*>(t.data_ptr());
}

// The mean (B, H) of rows [start, stop) of hidden (T, H), unit length where asked, and the norms of the means (B,).
std::tuple<Tensor, Tensor> forward(const Tensor& hidden, const Tensor& start, const Tensor& stop, bool normalize,
                                   double eps) {
  const int64_t cols = hidden.size(1);
  const int64_t segments = start.size(0);
  Tensor mean = torch::stable::new_empty(hidden, {segments, cols}, ScalarType::Float);
  Tensor norm = flat_floats(hidden, normalize ? segments : 0);
  torch::stable::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(cols);
    kernels<SegmentMeanKernels>().forward({elements_of(hidden), cols, integers(start), integers(stop), normalize, eps,
                                           data(mean), data(norm), scratch.data()},
                                          begin, end);
  });
  return {mean, norm};
}

// Gradient (T, H) of the token states: g / count inside a span, zero outside. unit (B, H) and norm (B,) are the
// normalised means and their norms before, or empty.
Tensor backward(const Tensor& g, const Tensor& unit, const Tensor& norm, const Tensor& start, const Tensor& stop,
                const Tensor& cu_seqlens, int64_t tokens, double eps, bool to_bfloat16) {
  const int64_t cols = g.size(1);
  const int64_t segments = g.size(0);
  const bool normalize = norm.numel() > 0;
  Tensor out = torch::stable::new_empty(g, {tokens, cols}, to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  torch::stable::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(cols);
    kernels<SegmentMeanKernels>().backward(
        {data(g), normalize ? data(unit) : nullptr, data(norm), cols, integers(start), integers(stop),
         integers(cu_seqlens), eps, elements_of(out), scratch.data()},
        begin, end);
  });
  return out;
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("segment_mean_forward", TORCH_BOX(&llm2clip::forward));
  m.impl("segment_mean_backward", TORCH_BOX(&llm2clip::backward));
}
