// segment_mean on the CPU: one read of the token states forward, one write of their gradients backward.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "simd_io.h"
#include "tiles.h"

namespace llm2clip {
namespace {

// rows summed before they are added to the total: keeps the error of long fp32 sums down
constexpr int64_t kChunk = 32;

const int64_t* integers(const Tensor& t) {
  return static_cast<const int64_t*>(t.data_ptr());
}

// total (cols,) += rows [start, stop) of `from`
template <class T>
LLM2CLIP_INLINE void add_rows(const T* from, int64_t start, int64_t stop, int64_t cols, float* partial,
                              float* total) {
  for (int64_t chunk = start; chunk < stop; chunk += kChunk) {
    const int64_t end = std::min(chunk + kChunk, stop);
    std::memset(partial, 0, cols * sizeof(float));
    int64_t t = chunk;
    for (; t + 4 <= end; t += 4) {
      const T* row = from + t * cols;
      for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        const Floats pairs = (get(row + j, n) + get(row + cols + j, n)) +
                             (get(row + 2 * cols + j, n) + get(row + 3 * cols + j, n));
        put(partial + j, get(partial + j, n) + pairs, n);
      });
    }
    for (; t < end; ++t) {
      const T* row = from + t * cols;
      for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        put(partial + j, get(partial + j, n) + get(row + j, n), n);
      });
    }
    for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      put(total + j, get(total + j, n) + get(partial + j, n), n);
    });
  }
}

// The mean (B, H) of rows [start, stop) of hidden (T, H), unit length where asked, and the norms of the means (B,).
std::tuple<Tensor, Tensor> forward(const Tensor& hidden, const Tensor& start, const Tensor& stop, bool normalize,
                                   double eps) {
  const int64_t cols = hidden.size(1);
  const int64_t segments = start.size(0);
  Tensor mean = torch::stable::new_empty(hidden, {segments, cols}, ScalarType::Float);
  Tensor norm = flat_floats(hidden, normalize ? segments : 0);
  with_elements(hidden, [&](const auto* from) {
    torch::stable::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> partial(cols);
      float* const scratch = partial.data();
      run_simd([&]() __attribute__((always_inline)) {
        for (int64_t b = begin; b < end; ++b) {
          float* row = data(mean) + b * cols;
          std::memset(row, 0, cols * sizeof(float));
          add_rows(from, integers(start)[b], integers(stop)[b], cols, scratch, row);
          const float count = static_cast<float>(integers(stop)[b] - integers(start)[b]);
          Floats squares{};
          for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            const Floats v = get(row + j, n) / count;
            squares += v * v;
            put(row + j, v, n);
          });
          if (!normalize) continue;
          const float length = static_cast<float>(std::sqrt(sum(squares)));
          data(norm)[b] = length;
          const float factor = static_cast<float>(1.0 / (length < eps ? eps : length));
          for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            put(row + j, get(row + j, n) * factor, n);
          });
        }
      });
    });
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
  with_elements(out, [&](auto* to) {
    torch::stable::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> values(cols);
      float* const row = values.data();
      run_simd([&]() __attribute__((always_inline)) {
        for (int64_t b = begin; b < end; ++b) {
          const float* p = data(g) + b * cols;
          const float* y = normalize ? data(unit) + b * cols : p;
          float factor = 1.0f / static_cast<float>(integers(stop)[b] - integers(start)[b]);
          float along = 0;
          if (normalize) {
            const float length = data(norm)[b];
            const bool small = length < eps;
            factor = static_cast<float>(factor / (small ? eps : length));
            Floats total{};
            for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
              total += get(p + j, n) * get(y + j, n);
            });
            along = small ? 0.0f : static_cast<float>(sum(total));
          }
          for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            const Floats v = get(p + j, n);
            put(row + j, (normalize ? v - get(y + j, n) * along : v) * factor, n);
          });
          for (int64_t t = integers(cu_seqlens)[b]; t < integers(cu_seqlens)[b + 1]; ++t) {
            const bool inside = t >= integers(start)[b] && t < integers(stop)[b];
            for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
              put(to + t * cols + j, inside ? get(row + j, n) : Floats{}, n);
            });
          }
        }
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CPU, m) {
  m.impl("segment_mean_forward", TORCH_BOX(&llm2clip::forward));
  m.impl("segment_mean_backward", TORCH_BOX(&llm2clip::backward));
}
