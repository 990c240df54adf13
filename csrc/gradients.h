// Both gradients of a product x·yᵀ from the tiles of G = dL/d(x·yᵀ): dx = G·y, dy = Gᵀ·x.

#pragma once

#include <vector>

#include "tiles.h"

namespace llm2clip {

struct Gradients {
  const Tensor &x, &y;
  Tensor dx, dy;  // empty where they are not wanted

  Gradients(const Tensor& x, const Tensor& y, const Tiles& tiles, bool need_x, bool need_y)
      : x(x),
        y(y),
        dx(rows_like(x, need_x)),
        dy(rows_like(y, need_y)),
        // rows are shared by all workers of a stripe
        row_parts_(worker_buffers(x, need_x && tiles.workers > 1 ? tiles.workers : 0, tiles.height * x.size(1))) {}

  // adds what the tile t of G, (t.m, t.n), makes of them
  void add(const Tile& t, const Tensor& g) const {
    if (dx.numel() > 0) {
      const Tensor to = row_parts_.empty() ? product_view(dx, t.r, t.m) : as_matrix(row_parts_[t.worker], t.m, x.size(1));
      multiply(to, g, product_view(y, t.c, t.n), !t.first);
    }
    if (dy.numel() > 0) {
      multiply(product_view(dy, t.c, t.n), torch::stable::transpose(g, 0, 1), product_view(x, t.r, t.m), t.r > 0);
    }
  }

  // to be called when the stripe of rows [r, r + m) is complete
  void end_stripe(int64_t r, int64_t m) const {
    if (!row_parts_.empty()) add_workers(product_view(dx, r, m), row_parts_);
  }

  void scale_by(double factor) const {
    if (dx.numel() > 0) multiply_by(dx, factor);
    if (dy.numel() > 0) multiply_by(dy, factor);
  }

 private:
  static Tensor rows_like(const Tensor& t, bool wanted) {
    return on_huge_pages(torch::stable::new_empty(t, {wanted ? t.size(0) : 0, t.size(1)}, ScalarType::Float));
  }

  std::vector<Tensor> row_parts_;
};

}  // namespace llm2clip
