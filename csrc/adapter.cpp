// The row operations of the adapter on the CPU, between torch's GEMMs: LayerNorm, bias + GELU + dropout, and their
// gradients. Each is one sweep; sums over rows are added by blocks of a fixed size, in order.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "adapter_rows.h"
#include "instruction_set.h"
#include "tiles.h"

namespace llm2clip {
namespace {

const float* values_or_null(const Tensor& t) {
  return t.numel() > 0 ? data(t) : nullptr;
}

// sums over rows: partial (blocks, cols), one row a block, added in order
struct ColumnSums {
  int64_t cols;
  std::vector<float> partial;

  ColumnSums(bool wanted, int64_t rows, int64_t cols)
      : cols(cols), partial(wanted ? (rows + kBlock - 1) / kBlock * cols : 0, 0.0f) {}

  float* block(int64_t b) { return partial.empty() ? nullptr : partial.data() + b * cols; }

  Tensor total(const Tensor& like) const {
    const int64_t count = partial.empty() ? 0 : cols;
    Tensor out = flat_floats(like, count);
    std::vector<double> sums(count, 0.0);
    for (size_t i = 0; i < partial.size(); ++i) sums[i % cols] += partial[i];
    for (int64_t j = 0; j < count; ++j) data(out)[j] = static_cast<float>(sums[j]);
    return out;
  }
};

// (rows, cols) -> the same, float32 or bfloat16; weight and bias (cols,) or empty
Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool to_bfloat16) {
  const int64_t rows = x.size(0);
  const int64_t cols = x.size(1);
  Tensor out = torch::stable::new_empty(x, {rows, cols}, to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  const LayerNormRows a{elements_of(x), cols, values_or_null(weight), values_or_null(bias), eps, elements_of(out)};
  for_each_block(rows, [&](int64_t, int64_t first, int64_t count) {
    kernels<AdapterKernels>().layer_norm(a, first, count);
  });
  return out;
}

// dx = LayerNorm's gradient + dy, with the column sums of the three gradients in the same sweep. `dh` is replaced by
// LayerNorm's output where keep_output, which the gradient of the next weight needs.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& x, const Tensor& weight,
                                                               const Tensor& bias, double eps, Tensor dh,
                                                               const Tensor& dy, bool keep_output, bool need_x,
                                                               bool need_weight, bool need_bias, bool need_dy_sum) {
  const int64_t rows = x.size(0);
  const int64_t cols = x.size(1);
  const bool residual = dy.numel() > 0;
  Tensor dx = torch::stable::new_empty(x, {need_x ? rows : 0, cols}, x.scalar_type());
  ColumnSums d_weight(need_weight, rows, cols);
  ColumnSums d_bias(need_bias, rows, cols);
  ColumnSums dy_sum(need_dy_sum && residual, rows, cols);
  for_each_block(rows, [&](int64_t block, int64_t first, int64_t count) {
    LayerNormGradRows a{};
    a.x = elements_of(x);
    a.cols = cols;
    a.weight = values_or_null(weight);
    a.bias = values_or_null(bias);
    a.eps = eps;
    a.dh = elements_of(dh);
    a.keep_output = keep_output;
    a.dy = residual ? dy.data_ptr() : nullptr;
    a.dx = need_x ? dx.data_ptr() : nullptr;
    a.weight_sum = d_weight.block(block);
    a.bias_sum = d_bias.block(block);
    a.dy_sum = dy_sum.block(block);
    kernels<AdapterKernels>().layer_norm_grad(a, first, count);
  });
  return {dx, d_weight.total(x), d_bias.total(x), dy_sum.total(x)};
}

// seed: one int64, or none where p is zero
GeluRows gelu_rows(const Tensor& pre, const Tensor& bias, const Tensor& seed, double p, void* out) {
  const int64_t bits = seed.numel() > 0 ? *static_cast<const int64_t*>(seed.data_ptr()) : 0;
  return {elements_of(pre), pre.size(1), values_or_null(bias), dropout_of(bits, p), out};
}

// out = dropout(gelu(pre + bias)); out may be pre
void bias_gelu(const Tensor& pre, const Tensor& bias, const Tensor& seed, double p, Tensor out) {
  const GeluRows a = gelu_rows(pre, bias, seed, p, out.data_ptr());
  for_each_block(pre.size(0), [&](int64_t, int64_t first, int64_t count) {
    kernels<AdapterKernels>().gelu(a, first, count);
  });
}

// `gradient` (of the dropped-out GELU) becomes that of pre + bias; returns the GELU's output again where keep_output,
// and the column sums of the gradient
std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& pre, const Tensor& bias, const Tensor& seed, double p,
                                              Tensor gradient, bool keep_output, bool need_bias) {
  const int64_t rows = pre.size(0);
  const int64_t cols = pre.size(1);
  Tensor out = torch::stable::new_empty(pre, {keep_output ? rows : 0, cols}, pre.scalar_type());
  ColumnSums d_bias(need_bias, rows, cols);
  const GeluRows gelu = gelu_rows(pre, bias, seed, p, keep_output ? out.data_ptr() : nullptr);
  for_each_block(rows, [&](int64_t block, int64_t first, int64_t count) {
    kernels<AdapterKernels>().gelu_grad({gelu, gradient.data_ptr(), d_bias.block(block)}, first, count);
  });
  return {out, d_bias.total(pre)};
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&llm2clip::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&llm2clip::layer_norm_backward));
  m.impl("bias_gelu", TORCH_BOX(&llm2clip::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&llm2clip::bias_gelu_backward));
}
