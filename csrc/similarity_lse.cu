// The last step of similarity_lse's sums on a GPU: partial sums of every tile row, added in a fixed order
// (no atomics, so run to run bitwise equal), turned into log-sum-exp in the same launch.
//
// A sum too small or not finite sets a device flag instead of asking the host: the caller's online kernels
// read it and do nothing where it is 0.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <string>

// Only CUDA builds of libtorch define this; resolved through libtorch.so, null in CPU builds.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace llm2clip {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
// below this, terms flushed to zero could matter (see similarity_lse.cpp)
constexpr float kLowestSum = 1e-26f;

cudaStream_t current_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "llm2clip_kernels: a CUDA tensor came, but this torch is a CPU build");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

__global__ void __launch_bounds__(kThreads)
    lse_from_slabs_kernel(const float* __restrict__ slabs,  // (slab_count, count), row-major
                          const float* __restrict__ shift,  // (1,)
                          float* __restrict__ lse,          // (count,)
                          int32_t* __restrict__ flag,       // (1,)
                          int64_t slab_count, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; j < count; j += stride) {
    // four chains hide the latency of the loads; their order is fixed
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int64_t k = 0;
    for (; k + 4 <= slab_count; k += 4) {
#pragma unroll
      for (int l = 0; l < 4; ++l) sums[l] += slabs[(k + l) * count + j];
    }
    for (; k < slab_count; ++k) sums[0] += slabs[k * count + j];
    const float total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    // every writer writes the same value, so the race is harmless; NaN fails the comparison too
    if (!(total >= kLowestSum && total <= 3.0e38f)) *flag = 1;
    lse[j] = logf(total) + *shift;
  }
}

Tensor lse_from_slabs(const Tensor& slabs, const Tensor& shift, Tensor flag) {
  STD_TORCH_CHECK(slabs.dim() == 2 && slabs.is_contiguous() && slabs.scalar_type() == ScalarType::Float,
                  "lse_from_slabs: slabs (K, N) float32, contiguous");
  STD_TORCH_CHECK(shift.scalar_type() == ScalarType::Float && shift.numel() == 1, "lse_from_slabs: shift float32");
  STD_TORCH_CHECK(flag.scalar_type() == ScalarType::Int && flag.numel() == 1, "lse_from_slabs: flag int32, 1 element");
  STD_TORCH_CHECK(shift.is_cuda() && flag.is_cuda() && shift.get_device_index() == slabs.get_device_index() &&
                      flag.get_device_index() == slabs.get_device_index(),
                  "lse_from_slabs: all tensors on one device");
  const int64_t count = slabs.size(1);
  Tensor out = torch::stable::new_empty(slabs, {count}, ScalarType::Float);
  if (count == 0) return out;
  const int32_t device = slabs.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  lse_from_slabs_kernel<<<static_cast<unsigned>(blocks < 65535 ? blocks : 65535), kThreads, 0,
                          current_stream(device)>>>(
      static_cast<const float*>(slabs.data_ptr()), static_cast<const float*>(shift.data_ptr()),
      static_cast<float*>(out.data_ptr()), static_cast<int32_t*>(flag.data_ptr()), slabs.size(0), count);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "lse_from_slabs: ", std::string(cudaGetErrorString(error)));
  return out;
}

}  // namespace
}  // namespace llm2clip

STABLE_TORCH_LIBRARY_IMPL(llm2clip_native, CUDA, m) {
  m.impl("lse_from_slabs", TORCH_BOX(&llm2clip::lse_from_slabs));
}
