// Every schema of the native library. Implementations register themselves beside their code.
//
// Autograd and fake (meta) functions live in Python: the stable ABI has neither.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(llm2clip_native, m) {
  m.def(
      "similarity_distill_forward(Tensor x, Tensor y, float scale, Tensor p, Tensor q, float teacher_scale,"
      " bool columns, int diagonal, int tile)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "similarity_distill_backward(Tensor g_row, Tensor g_col, Tensor g_pos, Tensor g_cross_row,"
      " Tensor g_cross_col, Tensor x, Tensor y, float scale, Tensor p, Tensor q, float teacher_scale,"
      " Tensor row_lse, Tensor col_lse, Tensor teacher_row, Tensor teacher_col, Tensor low, int diagonal,"
      " bool need_x, bool need_y, bool need_scale, int tile) -> (Tensor, Tensor, Tensor)");
  m.def(
      "similarity_lse_forward(Tensor x, Tensor y, float scale, bool columns, int diagonal,"
      " Tensor(a!) cache, Tensor x_groups, Tensor y_groups, int tile) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "similarity_lse_backward(Tensor g_row, Tensor g_col, Tensor g_pos, Tensor x, Tensor y, float scale,"
      " Tensor row_lse, Tensor col_lse, Tensor low, Tensor cache, int diagonal, Tensor x_groups,"
      " Tensor y_groups, bool need_x, bool need_y, bool need_scale, int tile) -> (Tensor, Tensor, Tensor)");
  m.def("pair_scores(Tensor x, Tensor y, Tensor rows, Tensor cols) -> Tensor");
  m.def(
      "similarity_rank_count(Tensor x, Tensor y, Tensor row_best, Tensor col_best, float tolerance, int tile)"
      " -> (Tensor, Tensor)");
  m.def(
      "similarity_topk_update(Tensor x, Tensor y, Tensor scores, Tensor indices, int first_index, Tensor x_groups,"
      " Tensor y_groups, int tile) -> (Tensor, Tensor)");
  m.def("lse_from_slabs(Tensor slabs, Tensor shift, Tensor(a!) flag) -> Tensor");
  m.def(
      "sigmoid_loss(Tensor x, Tensor y, float scale, float bias, Tensor x_groups, Tensor y_groups, int diagonal,"
      " Tensor weight, bool need_x, bool need_y, bool need_scale, bool need_bias, int tile)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_capability() -> str");
  m.def("use_instruction_set(str name) -> ()");
  m.def("use_gemm(str name) -> ()");
  m.def("gemm_in_use() -> str");
  m.def("tile_product(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()");
  m.def("dropout_rows_(Tensor(a!) t, int seed, int first_row, float p) -> ()");
  m.def(
      "packed_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal, int window,"
      " float scale) -> Tensor");
  m.def(
      "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal,"
      " int window, float scale, bool need_q, bool need_k, bool need_v) -> (Tensor, Tensor, Tensor)");
  m.def("l2_normalize_forward(Tensor x, float eps, bool to_bfloat16) -> (Tensor, Tensor)");
  m.def(
      "l2_normalize_backward(Tensor g, Tensor saved, Tensor norm, float eps, bool saved_is_unit,"
      " bool to_bfloat16) -> Tensor");
  m.def(
      "segment_mean_forward(Tensor hidden, Tensor start, Tensor stop, bool normalize, float eps)"
      " -> (Tensor, Tensor)");
  m.def(
      "segment_mean_backward(Tensor g, Tensor unit, Tensor norm, Tensor start, Tensor stop, Tensor cu_seqlens,"
      " int tokens, float eps, bool to_bfloat16) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, bool to_bfloat16) -> Tensor");
  m.def(
      "layer_norm_backward(Tensor x, Tensor weight, Tensor bias, float eps, Tensor(a!) dh, Tensor dy,"
      " bool keep_output, bool need_x, bool need_weight, bool need_bias, bool need_dy_sum)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("bias_gelu(Tensor pre, Tensor bias, Tensor seed, float p, Tensor(a!) out) -> ()");
  m.def(
      "bias_gelu_backward(Tensor pre, Tensor bias, Tensor seed, float p, Tensor(a!) gradient,"
      " bool keep_output, bool need_bias) -> (Tensor, Tensor)");
}
