#include "../segment_mean_rows.h"

#include <cmath>

#include "elements.h"

namespace llm2clip {
namespace {

// rows summed before they are added to the total: keeps the error of long fp32 sums down
constexpr int64_t kChunk = 32;

// total (cols,) += rows [start, stop) of `from`
template <class T>
LLM2CLIP_INLINE void add_rows(const T* from, int64_t start, int64_t stop, int64_t cols, float* partial,
                              float* total) {
  for (int64_t chunk = start; chunk < stop; chunk += kChunk) {
    const int64_t end = smaller(chunk + kChunk, stop);
    std::memset(partial, 0, cols * sizeof(float));
    int64_t t = chunk;
    for (; t + 4 <= end; t += 4) {
      const T* row = from + t * cols;
      for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        const Floats pairs = (get(row + j, n) + get(row + cols + j, n)) +
                             (get(row + 2 * cols + j, n) + get(row + 3 * cols + j, n));
        add_to(partial + j, pairs, n);
      });
    }
    for (; t < end; ++t) {
      const T* row = from + t * cols;
      for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        add_to(partial + j, get(row + j, n), n);
      });
    }
    for_each_lane_group(cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      add_to(total + j, get(partial + j, n), n);
    });
  }
}

void forward_segments(const SegmentMeans& a, int64_t first, int64_t last) {
  with_elements(a.hidden, [&](const auto* hidden) __attribute__((always_inline)) {
    for (int64_t b = first; b < last; ++b) {
      float* row = a.mean + b * a.cols;
      std::memset(row, 0, a.cols * sizeof(float));
      add_rows(hidden, a.start[b], a.stop[b], a.cols, a.scratch, row);
      const float count = static_cast<float>(a.stop[b] - a.start[b]);
      Floats squares{};
      for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        const Floats v = get(row + j, n) / count;
        squares += v * v;
        put(row + j, v, n);
      });
      if (!a.normalize) continue;
      const float length = static_cast<float>(std::sqrt(sum(squares)));
      a.norm[b] = length;
      const float factor = static_cast<float>(1.0 / (length < a.eps ? a.eps : length));
      for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        put(row + j, get(row + j, n) * factor, n);
      });
    }
  });
}

// `row` = the gradient of each row of the span b
LLM2CLIP_INLINE void gradient_row(const SegmentMeanGrads& a, int64_t b, float* row) {
  const float* g = a.g + b * a.cols;
  float factor = 1.0f / static_cast<float>(a.stop[b] - a.start[b]);
  if (a.unit == nullptr) {
    for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
      put(row + j, get(g + j, n) * factor, n);
    });
    return;
  }
  const float* unit = a.unit + b * a.cols;
  const bool small = a.norm[b] < a.eps;
  factor = static_cast<float>(factor / (small ? a.eps : a.norm[b]));
  Floats total{};
  for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    total += get(g + j, n) * get(unit + j, n);
  });
  const float along = small ? 0.0f : static_cast<float>(sum(total));
  for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    put(row + j, (get(g + j, n) - get(unit + j, n) * along) * factor, n);
  });
}

void backward_segments(const SegmentMeanGrads& a, int64_t first, int64_t last) {
  with_elements(a.out, [&](auto* out) __attribute__((always_inline)) {
    for (int64_t b = first; b < last; ++b) {
      gradient_row(a, b, a.scratch);
      for (int64_t t = a.edges[b]; t < a.edges[b + 1]; ++t) {
        const bool inside = t >= a.start[b] && t < a.stop[b];
        for_each_lane_group(a.cols, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
          put(out + t * a.cols + j, inside ? get(a.scratch + j, n) : Floats{}, n);
        });
      }
    }
  });
}

}  // namespace

const SegmentMeanKernels SegmentMeanKernels::LLM2CLIP_INSTRUCTION_SET{forward_segments, backward_segments};

}  // namespace llm2clip
