// similarity_topk on the CPU: the k best columns of every row of x·yᵀ, by tiles, exactly.
//
// A tile's fp32 products only say who might be among the best; those few are scored again in double and inserted
// in order (higher score first, then lower index). So the result does not depend on tiles, threads or chunks.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "retrieval.h"

namespace llm2clip {
namespace {

// the k best of some rows so far
struct Best {
  int64_t k;
  double* scores;
  int64_t* indices;
};

void clear(const Best& best, int64_t rows) {
  std::fill_n(best.scores, rows * best.k, -std::numeric_limits<double>::infinity());
  std::fill_n(best.indices, rows * best.k, int64_t{-1});
}

void merge(const Best& into, const Best& from, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t place = i * from.k; place < (i + 1) * from.k && from.indices[place] >= 0; ++place) {
      insert_best(into.scores + i * into.k, into.indices + i * into.k, into.k, from.scores[place],
                  from.indices[place]);
    }
  }
}

const int64_t* ids(const Tensor& t) {
  return t.numel() > 0 ? static_cast<const int64_t*>(t.data_ptr()) : nullptr;
}

// scores (M, k) float64 and indices (M, k) after seeing y as the columns first, first + 1, ...
std::tuple<Tensor, Tensor> update(const Tensor& x, const Tensor& y, const Tensor& scores, const Tensor& indices,
                                  int64_t first_index, const Tensor& x_groups, const Tensor& y_groups,
                                  int64_t tile_size) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && y.scalar_type() == ScalarType::Float && x.dim() == 2 &&
                      y.dim() == 2 && x.size(1) == y.size(1) && x.is_contiguous() && y.is_contiguous(),
                  "similarity_topk: x (M, D) and y (N, D) float32, contiguous");
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Double && indices.scalar_type() == ScalarType::Long &&
                      scores.dim() == 2 && scores.size(0) == x.size(0) && scores.is_contiguous() &&
                      indices.is_contiguous() && indices.numel() == scores.numel() && scores.size(1) > 0,
                  "similarity_topk: scores (M, k) float64 and indices (M, k) int64");
  STD_TORCH_CHECK(x_groups.numel() == 0 || (x_groups.numel() == x.size(0) && y_groups.numel() == y.size(0) &&
                                            x_groups.scalar_type() == ScalarType::Long &&
                                            y_groups.scalar_type() == ScalarType::Long),
                  "similarity_topk: groups (M,) and (N,) int64, or empty");
  const Tiles tiles(x, y, tile_size);
  const Features features(x, y);
  const int64_t k = scores.size(1);
  const Tensor out_scores = torch::stable::clone(scores);
  const Tensor out_indices = torch::stable::clone(indices);
  const Best out{k, static_cast<double*>(out_scores.data_ptr()), static_cast<int64_t*>(out_indices.data_ptr())};
  const int64_t* of_x = ids(x_groups);
  const int64_t* of_y = ids(y_groups);
  const std::vector<Tensor> buffers = worker_buffers(x, tiles.workers, tiles.height * tiles.width);
  // a stripe's rows belong to every worker, so each has a list of its own
  std::vector<double> worker_scores(tiles.workers * tiles.height * k);
  std::vector<int64_t> worker_indices(worker_scores.size());
  const auto of_worker = [&](int64_t w) {
    return Best{k, worker_scores.data() + w * tiles.height * k, worker_indices.data() + w * tiles.height * k};
  };
  const Best every{k, worker_scores.data(), worker_indices.data()};
  clear(every, tiles.workers * tiles.height);
  tiles.each(
      [&](const Tile& t) {
        const Tensor dots = as_matrix(buffers[t.worker], t.m, t.n);
        multiply_tile(dots, x, y, t);
        const Best mine = of_worker(t.worker);
        for_each_block(t.m, [&](int64_t, int64_t first, int64_t height) {
          TopRows a{};
          a.tile = features.tile(data(dots), t, first, height);
          a.k = k;
          a.scores = mine.scores + first * k;
          a.indices = mine.indices + first * k;
          a.first = first_index + t.c;
          a.x_groups = of_x == nullptr ? nullptr : of_x + t.r + first;
          a.y_groups = of_x == nullptr ? nullptr : of_y + t.c;
          kernels<RetrievalKernels>().top(a);
        });
      },
      [&](int64_t r, int64_t m) {
        for (int64_t w = 0; w < tiles.workers; ++w) {
          merge({k, out.scores + r * k, out.indices + r * k}, of_worker(w), m);
        }
        clear(every, tiles.workers * tiles.height);
      });
  return {out_scores, out_indices};
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("similarity_topk_update", TORCH_BOX(&llm2clip::update));
}
