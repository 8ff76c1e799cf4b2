// Launching: grid sizes from the device, errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace ling {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("ling: ") + what + ": " + cudaGetErrorString(error));
}

// Blocks of this kernel that the current device holds at once. Asked of the driver once per kernel and device; the
// questions neither wait for the device nor disturb a graph capture.
template <auto kernel>
int64_t resident_blocks(int threads) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int64_t> known[kMaxDevices];
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  int64_t blocks = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (blocks > 0) return blocks;
  int processors = 0, per_processor = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0), "occupancy");
  blocks = static_cast<int64_t>(processors) * (per_processor > 0 ? per_processor : 1);
  if (device < kMaxDevices) known[device].store(blocks, std::memory_order_relaxed);
  return blocks;
}

// Blocks for `work` blocks' worth of work, no more than the device holds at once.
template <auto kernel>
unsigned grid_for(int64_t work, int threads) {
  const int64_t resident = resident_blocks<kernel>(threads);
  return static_cast<unsigned>(work < resident ? work : resident);
}

}  // namespace ling
