#include "../gemm.h"

#include "lanes.h"

#if defined(__AVX2__)
#include <immintrin.h>

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

// Registers of a block: kRows·kVectors sums, kVectors of b and one of a.
#if defined(__AVX512F__)
constexpr int64_t kRows = 8;
constexpr int64_t kVectors = 3;
#else
constexpr int64_t kRows = 4;
constexpr int64_t kVectors = 3;
#endif
constexpr int64_t kPanel = kVectors * kRegisterLanes;
static_assert(kGroup % kPanel == 0);

LLM2CLIP_INLINE int64_t registers_for(int64_t width) {
  return (width + kRegisterLanes - 1) / kRegisterLanes;
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

// out (kRows, V registers) (+)= a (kRows, k)·panel (k, V registers)
template <int64_t V>
LLM2CLIP_INLINE void multiply_block(MatrixView a, const float* panel, int64_t k, float* out, int64_t out_stride,
                                    bool accumulate) {
  for (int64_t first = 0; first < k; first += kSum) {
    FloatRegister sums[kRows][V] = {};
    if (accumulate && first == 0) {
      // long before they are added to, so that nothing waits for them then
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int64_t v = 0; v < V; ++v) __builtin_prefetch(out + r * out_stride + v * kRegisterLanes, 1);
      }
    }
    for (int64_t step = first; step < smaller(first + kSum, k); ++step) {
      FloatRegister b[V];
#pragma GCC unroll 3
      for (int64_t v = 0; v < V; ++v) b[v] = load_lanes<FloatRegister>(panel + v * kRegisterLanes);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        // minus zero is the one sum that leaves every number as it is, so nothing but the broadcast remains
        const FloatRegister factor = a.data[r * a.row_stride] - FloatRegister{};
#pragma GCC unroll 3
        for (int64_t v = 0; v < V; ++v) sums[r][v] += factor * b[v];
      }
      a.data += a.col_stride;
      panel += V * kRegisterLanes;
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int64_t v = 0; v < V; ++v) {
        float* to = out + r * out_stride + v * kRegisterLanes;
        store_lanes(to, accumulate || first > 0 ? load_lanes<FloatRegister>(to) + sums[r][v] : sums[r][v]);
      }
    }
  }
}

// (k, width) of b into `panel`, rows of `padded` floats, zeros past `width`
LLM2CLIP_INLINE void pack_panel(MatrixView b, int64_t k, int64_t width, int64_t padded, float* panel) {
  if (width < padded) std::memset(panel, 0, k * padded * sizeof(float));
  if (b.col_stride == 1) {
    for (int64_t i = 0; i < k; ++i) {
      const float* row = b.data + i * b.row_stride;
      int64_t j = 0;
      for (; j + kRegisterLanes <= width; j += kRegisterLanes) {
        store_lanes(panel + j, load_lanes<FloatRegister>(row + j));
      }
      for (; j < width; ++j) panel[j] = row[j];
      panel += padded;
    }
    return;
  }
  // so many steps that their part of the panel stays in the L1 cache while its columns come in
  constexpr int64_t kSteps = 128;
  for (int64_t first = 0; first < k; first += kSteps) {
    const int64_t last = smaller(first + kSteps, k);
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

LLM2CLIP_INLINE void multiply_any(MatrixView a, const float* panel, int64_t k, float* out, int64_t out_stride,
                                  int64_t vectors, bool accumulate) {
  if (vectors == kVectors) return multiply_block<kVectors>(a, panel, k, out, out_stride, accumulate);
  if (vectors == 2) return multiply_block<2>(a, panel, k, out, out_stride, accumulate);
  multiply_block<1>(a, panel, k, out, out_stride, accumulate);
}

// the block at the lower or right edge: of (rows, width) only that much is read of a and written to `out`
LLM2CLIP_INLINE void multiply_edge(MatrixView a, int64_t rows, const float* panel, int64_t width, int64_t k, float* out,
                                   int64_t out_stride, int64_t vectors, bool accumulate, float* strip) {
  if (rows < kRows) {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t r = 0; r < kRows; ++r) {
        strip[i * kRows + r] = r < rows ? a.data[r * a.row_stride + i * a.col_stride] : 0.0f;
      }
    }
    a = {strip, 1, kRows};
  }
  alignas(64) float block[kRows * kPanel];
  multiply_any(a, panel, k, block, kPanel, vectors, false);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * out_stride;
    for (int64_t j = 0; j < width; ++j) to[j] = accumulate ? to[j] + block[r * kPanel + j] : block[r * kPanel + j];
  }
}

void multiply(const Product& p, float* workspace) {
  float* strip = workspace + kGroup * kDepth;
  const int64_t slices = (p.k + kDepth - 1) / kDepth;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t k0 = p.k * slice / slices;
    const int64_t k = p.k * (slice + 1) / slices - k0;
    const bool accumulate = p.accumulate || slice > 0;
    for (int64_t group = 0; group < p.n; group += kGroup) {
      const int64_t end = smaller(group + kGroup, p.n);
      for (int64_t j = group; j < end; j += kPanel) {
        const int64_t width = smaller(kPanel, end - j);
        const MatrixView b{p.b.data + k0 * p.b.row_stride + j * p.b.col_stride, p.b.row_stride, p.b.col_stride};
        pack_panel(b, k, width, registers_for(width) * kRegisterLanes, workspace + (j - group) * k);
      }
      for (int64_t i = 0; i < p.m; i += kRows) {
        const int64_t rows = smaller(kRows, p.m - i);
        const MatrixView a{p.a.data + i * p.a.row_stride + k0 * p.a.col_stride, p.a.row_stride, p.a.col_stride};
        for (int64_t j = group; j < end; j += kPanel) {
          const int64_t width = smaller(kPanel, end - j);
          const int64_t vectors = registers_for(width);
          const float* panel = workspace + (j - group) * k;
          float* out = p.out + i * p.out_stride + j;
          if (rows == kRows && width == vectors * kRegisterLanes) {
            multiply_any(a, panel, k, out, p.out_stride, vectors, accumulate);
          } else {
            multiply_edge(a, rows, panel, width, k, out, p.out_stride, vectors, accumulate, strip);
          }
        }
      }
    }
  }
}

}  // namespace

const GemmKernels GemmKernels::LLM2CLIP_INSTRUCTION_SET{multiply};

}  // namespace llm2clip

#else

const llm2clip::GemmKernels llm2clip::GemmKernels::LLM2CLIP_INSTRUCTION_SET{nullptr};

#endif
