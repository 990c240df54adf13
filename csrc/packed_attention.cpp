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
#include <tuple>
#include <vector>

#include "attention_tasks.h"
#include "instruction_set.h"

namespace llm2clip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Task = void (*)(const AttentionProblem&, int64_t, int64_t, float*);

// every task once, the next one to whichever worker is free: sequences differ in length by two orders of magnitude
void run(const AttentionProblem& p, Task task, const Tensor& like) {
  int64_t longest = 0;
  for (int64_t s = 0; s < p.sequences; ++s) longest = std::max(longest, p.edges[s + 1] - p.edges[s]);
  const int64_t tasks = p.sequences * p.key_heads;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), tasks));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const Tensor workspace = torch::stable::new_empty(like, {attention_workspace(p, longest)}, ScalarType::Float);
    float* const floats = static_cast<float*>(workspace.data_ptr());
    for (int64_t w = begin; w < end; ++w) {
      for (int64_t t = next++; t < tasks; t = next++) {
        const int64_t sequence = t / p.key_heads;
        if (p.edges[sequence + 1] > p.edges[sequence]) task(p, sequence, t % p.key_heads, floats);
      }
    }
  });
}

Tensor like(const Tensor& t, bool wanted) {
  return torch::stable::new_empty(
      t, wanted ? std::vector<int64_t>{t.size(0), t.size(1), t.size(2)} : std::vector<int64_t>{0});
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

AttentionProblem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& edges, bool causal,
                         int64_t window, double scale) {
  check(q, k, v, edges);
  AttentionProblem p{};
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
  AttentionProblem p = problem(q, k, v, edges, causal, window, scale);
  Tensor out = like(q, true);
  p.out = static_cast<float*>(out.data_ptr());
  run(p, kernels<AttentionKernels>().forward, q);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& edges, bool causal, int64_t window, double scale,
                                            bool need_q, bool need_k, bool need_v) {
  AttentionProblem p = problem(q, k, v, edges, causal, window, scale);
  check(grad, k, v, edges);
  p.grad = static_cast<const float*>(grad.data_ptr());
  Tensor dq = like(q, need_q), dk = like(k, need_k), dv = like(v, need_v);
  if (need_q) p.dq = static_cast<float*>(dq.data_ptr());
  if (need_k) p.dk = static_cast<float*>(dk.data_ptr());
  if (need_v) p.dv = static_cast<float*>(dv.data_ptr());
  run(p, kernels<AttentionKernels>().backward, q);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&llm2clip::forward));
  m.impl("packed_attention_backward", TORCH_BOX(&llm2clip::backward));
}
