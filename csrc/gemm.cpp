#include "gemm.h"

#include "instruction_set.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "simd_exp.h"

namespace llm2clip {
namespace {

// How a product is cut, from the outside in:
//
//   k into slices of at most kDepth, columns into groups of kGroup: the group's part of b is packed and stays in the L2
//   cache; rows into strips: a strip's part of a stays in the L1 cache; a strip's columns into panels. One strip and
//   one panel make a block of `out`, whose sums are registers, kSum steps at a time: a longer sum would round worse.
//
// a is read where it lies: every number of it once per panel, in both layouts whole cache lines of a few rows.
constexpr int64_t kDepth = 512;
constexpr int64_t kSum = 256;
constexpr int64_t kGroup = 96;
static_assert(kGroup * kDepth + 8 * kDepth == kGemmWorkspace);

using Floats8 = float __attribute__((vector_size(32)));

// Registers of a block: kRows·kVectors sums, kVectors of b and one of a.
struct Avx512Shape {
  using Vector = Floats;
  static constexpr int64_t kRows = 8;
  static constexpr int64_t kVectors = 3;
};
struct Avx2Shape {
  using Vector = Floats8;
  static constexpr int64_t kRows = 4;
  static constexpr int64_t kVectors = 3;
};

template <class Vector>
constexpr int64_t kLanesOf = sizeof(Vector) / sizeof(float);

template <class Vector>
LLM2CLIP_INLINE Vector load_as(const float* from) {
  Vector out;
  std::memcpy(&out, from, sizeof(out));
  return out;
}

template <class Vector>
LLM2CLIP_INLINE void store_as(float* to, Vector value) {
  std::memcpy(to, &value, sizeof(value));
}

// to (4, 4) = the transpose of from (4, 4)
LLM2CLIP_INLINE void transpose4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m128 a = _mm_loadu_ps(from);
  __m128 b = _mm_loadu_ps(from + from_stride);
  __m128 c = _mm_loadu_ps(from + 2 * from_stride);
  __m128 d = _mm_loadu_ps(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c);
  _mm_storeu_ps(to + 3 * to_stride, d);
}

// out (kRows, kVectors vectors) (+)= a (kRows, k)·panel (k, kVectors vectors)
template <class Vector, int64_t kRows, int64_t kVectors>
LLM2CLIP_INLINE void multiply_block(MatrixView a, const float* panel, int64_t k, float* out, int64_t out_stride,
                                    bool accumulate) {
  constexpr int64_t lanes = kLanesOf<Vector>;
  for (int64_t first = 0; first < k; first += kSum) {
    Vector sums[kRows][kVectors] = {};
    if (accumulate && first == 0) {
      // long before they are added to, so that nothing waits for them then
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int64_t v = 0; v < kVectors; ++v) __builtin_prefetch(out + r * out_stride + v * lanes, 1);
      }
    }
    for (int64_t step = first; step < std::min(first + kSum, k); ++step) {
      Vector b[kVectors];
#pragma GCC unroll 3
      for (int64_t v = 0; v < kVectors; ++v) b[v] = load_as<Vector>(panel + v * lanes);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        // minus zero is the one sum that leaves every number as it is, so nothing but the broadcast remains
        const Vector factor = a.data[r * a.row_stride] - Vector{};
#pragma GCC unroll 3
        for (int64_t v = 0; v < kVectors; ++v) sums[r][v] += factor * b[v];
      }
      a.data += a.col_stride;
      panel += kVectors * lanes;
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int64_t v = 0; v < kVectors; ++v) {
        float* to = out + r * out_stride + v * lanes;
        store_as(to, accumulate || first > 0 ? load_as<Vector>(to) + sums[r][v] : sums[r][v]);
      }
    }
  }
}

// (k, width) of b into `panel`, rows of `padded` floats, zeros past `width`
template <class Vector>
LLM2CLIP_INLINE void pack_panel(MatrixView b, int64_t k, int64_t width, int64_t padded, float* panel) {
  constexpr int64_t lanes = kLanesOf<Vector>;
  if (width < padded) std::memset(panel, 0, k * padded * sizeof(float));
  if (b.col_stride == 1) {
    for (int64_t i = 0; i < k; ++i) {
      const float* row = b.data + i * b.row_stride;
      int64_t j = 0;
      for (; j + lanes <= width; j += lanes) store_as(panel + j, load_as<Vector>(row + j));
      for (; j < width; ++j) panel[j] = row[j];
      panel += padded;
    }
    return;
  }
  // so many steps that their part of the panel stays in the L1 cache while its columns come in
  constexpr int64_t kSteps = 128;
  for (int64_t first = 0; first < k; first += kSteps) {
    const int64_t last = std::min(first + kSteps, k);
    int64_t j = 0;
    for (; j + 4 <= width; j += 4) {
      const float* column = b.data + j * b.col_stride;
      int64_t i = first;
      for (; i + 4 <= last; i += 4) transpose4(column + i, b.col_stride, panel + i * padded + j, padded);
      for (; i < last; ++i) {
        for (int64_t l = 0; l < 4; ++l) panel[i * padded + j + l] = column[i + l * b.col_stride];
      }
    }
    for (; j < width; ++j) {
      for (int64_t i = first; i < last; ++i) panel[i * padded + j] = b.data[i + j * b.col_stride];
    }
  }
}

template <class Shape>
LLM2CLIP_INLINE void multiply_any(MatrixView a, const float* panel, int64_t k, float* out, int64_t out_stride,
                                  int64_t vectors, bool accumulate) {
  using Vector = typename Shape::Vector;
  switch (vectors) {
    case 1:
      return multiply_block<Vector, Shape::kRows, 1>(a, panel, k, out, out_stride, accumulate);
    case 2:
      return multiply_block<Vector, Shape::kRows, 2>(a, panel, k, out, out_stride, accumulate);
    default:
      return multiply_block<Vector, Shape::kRows, 3>(a, panel, k, out, out_stride, accumulate);
  }
}

// the block at the lower or right edge: of (rows, width) only that much is read of a and written to `out`
template <class Shape>
LLM2CLIP_INLINE void multiply_edge(MatrixView a, int64_t rows, const float* panel, int64_t width, int64_t k, float* out,
                                   int64_t out_stride, int64_t vectors, bool accumulate, float* strip) {
  constexpr int64_t height = Shape::kRows;
  if (rows < height) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t r = 0; r < height; ++r) {
        strip[i * height + r] = r < rows ? a.data[r * a.row_stride + i * a.col_stride] : 0.0f;
      }
    }
    a = {strip, 1, height};
  }
  constexpr int64_t stride = Shape::kVectors * kLanesOf<typename Shape::Vector>;
  alignas(64) float block[height * stride];
  multiply_any<Shape>(a, panel, k, block, stride, vectors, false);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * out_stride;
    for (int64_t j = 0; j < width; ++j) to[j] = accumulate ? to[j] + block[r * stride + j] : block[r * stride + j];
  }
}

template <class Shape>
LLM2CLIP_INLINE void gemm_body(const Product& p, float* workspace) {
  constexpr int64_t lanes = kLanesOf<typename Shape::Vector>;
  constexpr int64_t panel_width = Shape::kVectors * lanes;
  static_assert(kGroup % panel_width == 0);
  float* strip = workspace + kGroup * kDepth;
  const int64_t slices = (p.k + kDepth - 1) / kDepth;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t k0 = p.k * slice / slices;
    const int64_t k = p.k * (slice + 1) / slices - k0;
    const bool accumulate = p.accumulate || slice > 0;
    for (int64_t group = 0; group < p.n; group += kGroup) {
      const int64_t end = std::min(group + kGroup, p.n);
      for (int64_t j = group; j < end; j += panel_width) {
        const int64_t width = std::min(panel_width, end - j);
        const MatrixView b{p.b.data + k0 * p.b.row_stride + j * p.b.col_stride, p.b.row_stride, p.b.col_stride};
        pack_panel<typename Shape::Vector>(b, k, width, (width + lanes - 1) / lanes * lanes,
                                           workspace + (j - group) * k);
      }
      for (int64_t i = 0; i < p.m; i += Shape::kRows) {
        const int64_t rows = std::min(Shape::kRows, p.m - i);
        const MatrixView a{p.a.data + i * p.a.row_stride + k0 * p.a.col_stride, p.a.row_stride, p.a.col_stride};
        for (int64_t j = group; j < end; j += panel_width) {
          const int64_t width = std::min(panel_width, end - j);
          const int64_t vectors = (width + lanes - 1) / lanes;
          const float* panel = workspace + (j - group) * k;
          float* out = p.out + i * p.out_stride + j;
          if (rows == Shape::kRows && width == vectors * lanes) {
            multiply_any<Shape>(a, panel, k, out, p.out_stride, vectors, accumulate);
          } else {
            multiply_edge<Shape>(a, rows, panel, width, k, out, p.out_stride, vectors, accumulate, strip);
          }
        }
      }
    }
  }
}

LLM2CLIP_AVX512 void gemm_avx512(const Product& product, float* workspace) {
  gemm_body<Avx512Shape>(product, workspace);
}

LLM2CLIP_AVX2 void gemm_avx2(const Product& product, float* workspace) {
  gemm_body<Avx2Shape>(product, workspace);
}

}  // namespace
}  // namespace llm2clip
#endif

namespace llm2clip {

Gemm gemm_named([[maybe_unused]] const std::string& name) {
#if defined(__x86_64__)
  const int widest = for_this_processor(0, 1, 2);
  if (name == "avx512" && widest == 2) return gemm_avx512;
  if (name == "avx2" && widest >= 1) return gemm_avx2;
#endif
  return nullptr;
}

std::string preferred_gemm() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return for_this_processor<const char*>("torch", "avx2", "avx512");
#endif
  return "torch";
}

}  // namespace llm2clip
