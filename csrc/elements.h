// The data of a tensor of float32 or bfloat16, as row kernels take it.

#pragma once

namespace llm2clip {

struct Elements {
  void* data;
  bool are_bfloat16;
};

}  // namespace llm2clip
