// What a generated .cu file needs so that a host compiler takes it, with its CUDA branches.
//
// Warp's headers come first and without __CUDA_ARCH__, in their form for CPUs: their CUDA form is PTX assembly.
// Behind them __CUDA_ARCH__ is defined, so that the kernels and the project's native texts are those of a GPU.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// What Warp asserts of the indices of its arrays stops the block instead of the process.
namespace emulated { [[noreturn]] void refuse(const char* expression, const char* file, int line); }
#include "crt.h"
#undef assert
#define assert(expression) ((expression) ? (void)0 : emulated::refuse(#expression, __FILE__, __LINE__))

#define WP_TILE_BLOCK_DIM 1
#include "builtin.h"
#include "deterministic.h"
#undef WP_TILE_BLOCK_DIM
#undef builtin_block_dim

namespace emulated {
struct Dim3 { unsigned x, y, z; };
struct Place { Dim3 thread, block, block_size, grid; int call; };  // call: line of a call with a barrier in it, or 0
extern thread_local Place* place;  // of the lane that runs
void sync_block(int line);
// value of lane `from` of the warp; all lanes of `mask` come here together
uint64_t sync_warp(unsigned mask, int from, uint64_t value, int line);
typedef void (*Body)(void** params);
template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** params, std::index_sequence<I...>) { kernel(*static_cast<A*>(params[I])...); }
template <typename... A>
void call(void (*kernel)(A...), void** params) { call(kernel, params, std::index_sequence_for<A...>()); }
template <typename T> T shuffle(unsigned mask, T value, int from, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = sync_warp(mask, from, bits, line);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
inline int lane() { return place->thread.x % 32; }
}  // namespace emulated

// tiles are not used; their arena would be written by all lanes at once
namespace wp { struct no_tiles { static void init() {} }; }
#define tile_shared_storage_t no_tiles

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define threadIdx (emulated::place->thread)
#define blockIdx (emulated::place->block)
#define blockDim (emulated::place->block_size)
#define gridDim (emulated::place->grid)
#define __syncthreads() emulated::sync_block(__LINE__)
#define __syncwarp(...) ((void)emulated::sync_warp(0xffffffffu, emulated::lane(), 0, __LINE__))
#define __shfl_sync(mask, value, from) emulated::shuffle(mask, value, from, __LINE__)
#define __shfl_xor_sync(mask, value, bits) emulated::shuffle(mask, value, emulated::lane() ^ (bits), __LINE__)
#define __shfl_down_sync(mask, value, by) emulated::shuffle(mask, value, emulated::lane() + (by), __LINE__)
#define __shfl_up_sync(mask, value, by) emulated::shuffle(mask, value, emulated::lane() - (by), __LINE__)

#if defined(EMULATED_RACES)  // each block has a host thread, and memory of its own
  #define __shared__ static thread_local
#elif defined(EMULATED_BOUNDS)  // with red zones around each array
  #define __shared__ static
#else  // in a section that is filled with NaN before every block
  #define __shared__ static __attribute__((section("emulated_shared")))
#endif
#define EMULATED_KERNEL(name) \
  static void emulated_body(void** params) { emulated::call(name, params); } \
  extern "C" char __start_emulated_shared[] __attribute__((weak, visibility("hidden"))); \
  extern "C" char __stop_emulated_shared[] __attribute__((weak, visibility("hidden"))); \
  extern "C" int emulated_run(void** params, unsigned blocks, unsigned threads, int order, unsigned seed, int skip) { \
    return emulated::run(emulated_body, params, blocks, threads, order, seed, skip, __start_emulated_shared, \
                         __stop_emulated_shared); }
namespace emulated {
int run(Body body, void** params, unsigned blocks, unsigned threads, int order, unsigned seed, int skip, char* begin, char* end);
}
