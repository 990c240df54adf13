// Means of spans of rows, segments [first, last), and their gradient, on one thread.

#pragma once

#include <cstdint>

#include "elements.h"

namespace llm2clip {

struct SegmentMeans {
  Elements hidden;  // (T, cols)
  int64_t cols;
  const int64_t* start;  // (B,) segment b is rows [start[b], stop[b])
  const int64_t* stop;
  bool normalize;
  double eps;
  float* mean;     // (B, cols)
  float* norm;     // (B,), of the mean before it was normalised
  float* scratch;  // (cols,) of this thread
};

struct SegmentMeanGrads {
  const float* g;     // (B, cols)
  const float* unit;  // (B, cols) normalised means and their norms before; null where they were not
  const float* norm;
  int64_t cols;
  const int64_t* start;
  const int64_t* stop;
  const int64_t* edges;  // (B + 1,) segment b's sequence is rows [edges[b], edges[b + 1])
  double eps;
  Elements out;    // (T, cols)
  float* scratch;  // (cols,) of this thread
};

struct SegmentMeanKernels {
  void (*forward)(const SegmentMeans&, int64_t first, int64_t last);
  void (*backward)(const SegmentMeanGrads&, int64_t first, int64_t last);

  static const SegmentMeanKernels portable, avx2, avx512;
};

}  // namespace llm2clip
