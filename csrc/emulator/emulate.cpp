// The emulator's C interface, for ctypes.
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "emulator/block.h"
#include "emulator/matrix.h"
#include "emulator/registry.h"
#include "emulator/tensor.h"

namespace tdc::emulator {
namespace {

constexpr unsigned kSharedLimit = 232448;  // bytes of one block on sm_90

std::string planted;

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> known;
  return known;
}

std::string launch(const char* name, const unsigned grid[3], unsigned threads, unsigned shared_bytes,
                   const void* params, unsigned params_bytes, unsigned seed) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) return std::string("no kernel '") + name + "' in this library";
  const Kernel& kernel = found->second;
  const std::string which = std::string("kernel ") + name + ": ";
  if (params_bytes != kernel.params_bytes) {
    return which + "got " + std::to_string(params_bytes) + " bytes of parameters, its struct has " +
           std::to_string(kernel.params_bytes);
  }
  if (threads == 0 || threads > static_cast<unsigned>(kernel.max_threads)) {
    return which + "got " + std::to_string(threads) + " threads, its launch bound is " +
           std::to_string(kernel.max_threads);
  }
  if (shared_bytes > kSharedLimit) {
    return which + "got " + std::to_string(shared_bytes) + " bytes of shared memory, a block has " +
           std::to_string(kSharedLimit);
  }
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7FFFFFFFu || grid[1] > 65535 || grid[2] > 65535) {
    return which + "got a grid of (" + std::to_string(grid[0]) + ", " + std::to_string(grid[1]) + ", " +
           std::to_string(grid[2]) + "); each is at least 1, the second and third at most 65535";
  }
  const auto cluster = static_cast<unsigned>(kernel.cluster);
  if (cluster > 1 && (grid[1] % cluster || threads % kWarp || threads * cluster > kMaxThreads)) {
    return which + "got a grid of " + std::to_string(grid[1]) + " blocks in y, of " + std::to_string(threads) +
           " threads each: clusters are of " + std::to_string(cluster) + " whole blocks of whole warps, together " +
           std::to_string(kMaxThreads) + " threads at most";
  }
  // Aligned like a parameter struct.
  struct alignas(64) Chunk {
    unsigned char bytes[64];
  };
  std::vector<Chunk> aligned((params_bytes + sizeof(Chunk) - 1) / sizeof(Chunk));
  std::memcpy(aligned.data(), params, params_bytes);
  return block.run(kernel, {grid[0], grid[1], grid[2]}, static_cast<int>(threads), shared_bytes, aligned.data(), seed);
}

}  // namespace

bool is_planted(const char* name) { return !planted.empty() && planted == name; }

Registration::Registration(const Kernel& kernel) { kernels().emplace(kernel.name, kernel); }

}  // namespace tdc::emulator

#define TDC_EXPORT extern "C" __attribute__((visibility("default")))

// Runs a whole grid. schedule_seed: see Schedule. Returns 0, or 1 with what went wrong in `message`, truncated to fit.
TDC_EXPORT int tdc_emulate(const char* kernel, const unsigned grid[3], unsigned threads, unsigned shared_bytes,
                           const void* params, unsigned params_bytes, unsigned schedule_seed, char* message,
                           int message_size) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const std::string failure =
      tdc::emulator::launch(kernel, grid, threads, shared_bytes, params, params_bytes, schedule_seed);
  std::snprintf(message, static_cast<size_t>(message_size), "%s", failure.c_str());
  return failure.empty() ? 0 : 1;
}

// Encodes the tensor map at an address. Returns 0, or 1 with why the driver would refuse it in `message`.
TDC_EXPORT int tdc_encode(void* at, char* message, int message_size) {
  tdc::TensorMap map;  // aligned as `at` need not be
  std::memcpy(&map, at, sizeof(map));
  const std::string wrong = tdc::emulator::encode(map);
  std::memcpy(at, &map, sizeof(map));
  std::snprintf(message, static_cast<size_t>(message_size), "%s", wrong.c_str());
  return wrong.empty() ? 0 : 1;
}

// Turns the race check off and on: without it a race has its effect on the data, as on a GPU.
TDC_EXPORT void tdc_check_races(int on) { tdc::emulator::RaceCheck::enabled = on != 0; }

// Plants a bug in a library built with TDC_PLANTS_AT_RUNTIME; "" removes it.
TDC_EXPORT void tdc_plant(const char* name) { tdc::emulator::planted = name; }

// Multiply-adds of the matrix instructions that this library has run.
TDC_EXPORT unsigned long long tdc_multiply_adds() { return tdc::emulator::multiply_adds(); }

// The most of them that a block, or a cluster of them, of the last launch has run.
TDC_EXPORT unsigned long long tdc_busiest_block() { return tdc::emulator::block.busiest(); }

// The names of all kernels of this library, one per line.
TDC_EXPORT const char* tdc_emulated_kernels() {
  static std::string names;
  names.clear();
  for (const auto& [name, kernel] : tdc::emulator::kernels()) names += name + "\n";
  return names.c_str();
}
