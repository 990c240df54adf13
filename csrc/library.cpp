// Every schema of the native library. Implementations register themselves beside their code.
//
// Autograd and fake (meta) functions live in Python: the stable ABI has neither.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(llm2clip_native, m) {
  m.def(
      "similarity_lse_forward(Tensor x, Tensor y, float scale, bool columns, int diagonal,"
      " bool cached, Tensor x_groups, Tensor y_groups, int tile) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "similarity_lse_backward(Tensor g_row, Tensor g_col, Tensor g_pos, Tensor x, Tensor y, float scale,"
      " Tensor row_lse, Tensor col_lse, Tensor low, Tensor cache, int diagonal, Tensor x_groups,"
      " Tensor y_groups, bool need_x, bool need_y, bool need_scale, int tile) -> (Tensor, Tensor, Tensor)");
  m.def("lse_from_slabs(Tensor slabs, Tensor shift, Tensor(a!) flag) -> Tensor");
  m.def("cpu_capability() -> str");
}
