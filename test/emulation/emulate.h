// Emulates a thread block of a GPU on the host, for tests. Every thread is a fiber, which runs
// until its next exchange within the warp or its next barrier. Replaces the functions of a GPU that
// csrc/cuda/device.cuh uses.
//
// The order of threads is chosen so that a missing barrier or a dependence on order changes
// results. The last warp runs first. The next one starts when all its lanes wait at a block-wide
// barrier or are done. The lanes of a warp take turns in alternating directions. Shared memory
// starts as garbage, and approximations are off by up to a unit in the last place, at random.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "codec/floats.h"

#define __global__
#define __device__
#define __noinline__ __attribute__((noinline))
#undef __forceinline__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}

namespace emulation {

struct Index {
  unsigned x;
};
struct Fiber {
  ucontext_t start;
  jmp_buf at;  // ucontext starts a fiber; setjmp switches without a system call
  std::unique_ptr<char[]> stack;
  bool fresh, done, waiting;
};

constexpr size_t kStack = 1 << 17;
constexpr size_t kSharedBytes = 100 << 10;  // a GPU's default limit is 48 KB a kernel

inline std::vector<Fiber> fibers;
inline std::vector<uint32_t> mail;  // one word a thread
inline jmp_buf home;
inline Index thread, block, grid;
inline const std::function<void()>* body;
inline uint32_t noise = 1;
alignas(512) inline unsigned char shared_memory[kSharedBytes];

inline void run_fiber() {
  (*body)();
  fibers[thread.x].done = true;
  _longjmp(home, 1);
}
inline void resume(Fiber& f) {
  if (_setjmp(home)) return;
  if (f.fresh) {
    f.fresh = false;
    setcontext(&f.start);
  }
  _longjmp(f.at, 1);
}
inline void yield() {
  if (!_setjmp(fibers[thread.x].at)) _longjmp(home, 1);
}
inline void block_barrier() {
  fibers[thread.x].waiting = true;
  yield();
}

// Writes a word, yields to every lane of the warp, reads, and yields again.
template <class Read>
uint32_t exchange(uint32_t x, Read read) {
  mail[thread.x] = x;
  yield();
  const uint32_t result = read(&mail[thread.x & ~31u]);
  yield();
  return result;
}

inline void run_block(unsigned threads) {
  std::memset(shared_memory, 0xcd, sizeof shared_memory);
  for (unsigned i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.fresh = true;
    f.done = f.waiting = false;
    if (!f.stack) f.stack.reset(new char[kStack]);
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    makecontext(&f.start, run_fiber, 0);
  }
  for (unsigned live = threads; live > 0;) {
    for (unsigned warp = threads; warp > 0; warp -= 32) {
      bool ran = true;
      for (unsigned round = 0; ran; round++) {
        ran = false;
        for (unsigned j = 0; j < 32; j++) {
          thread.x = warp - 32 + (round & 1 ? j : 31 - j);
          Fiber& f = fibers[thread.x];
          if (f.done || f.waiting) continue;
          resume(f);
          ran = true;
          live -= fibers[thread.x].done;
        }
      }
    }
    for (Fiber& f : fibers) f.waiting = false;
  }
}

template <class Kernel>
void launch(unsigned blocks, unsigned threads, Kernel kernel) {
  const std::function<void()> f = kernel;
  body = &f;
  grid.x = blocks;
  fibers.resize(threads);
  mail.resize(threads);
  for (block.x = 0; block.x < blocks; block.x++) run_block(threads);
}

inline float nudge(float x) {
  noise = noise * 1664525u + 1013904223u;
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  u += (noise >> 24) % 3 - 1;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// Counts the configurations that differ. With -DQUICK the second one ends the program: by then the
// first is printed, and one is enough to detect a mutant.
struct Failures {
  int count = 0;

  void operator++(int) {
#ifdef QUICK
    if (count > 0) {
      std::fflush(stdout);
      std::_Exit(1);
    }
#endif
    count++;
  }
  void add(bool failed, const char* what) {
    if (!failed) return;
    std::printf("%s differ\n", what);
    (*this)++;
  }
};

}  // namespace emulation

#define threadIdx ::emulation::thread
#define blockIdx ::emulation::block
#define gridDim ::emulation::grid
inline void __syncthreads() {
  emulation::block_barrier();
}

#define TORCHAO8_SHARED(Type, name)                       \
  static_assert(sizeof(Type) <= emulation::kSharedBytes); \
  Type& name = *reinterpret_cast<Type*>(emulation::shared_memory)

namespace torchao8::cuda {

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t byte = both >> (selector >> 4 * i & 7) * 8 & 255;
    const bool of_sign = selector >> 4 * i & 8;
    result |= (!of_sign ? byte : byte & 128 ? 255 : 0) << 8 * i;
  }
  return result;
}
template <class T>
struct SharedEntry {
  const T* at;
  const T& operator[](int i) const { return at[i]; }
  template <int kCount>
  void skip_if_below(float x, float limit) {
    if (!(x >= limit)) at += kCount;
  }
};
template <class T>
SharedEntry<T> entry_of_byte(const void*, const T* table, int first, uint32_t word, int i) {
  return {table + (int(word >> 8 * i & 255) - first)};
}
template <class T>
SharedEntry<T> entry_of_high_half(const void*, const T* table, int first, uint32_t word) {
  return {table + (int(word >> 16) - first)};
}
template <class T, int kCount>
struct SharedRing {
  const T* at;
  explicit SharedRing(const T* entry) : at(entry) {}
  bool next() {
    at++;
    if (reinterpret_cast<uintptr_t>(at) % (kCount * sizeof(T)) != 0) return false;
    at -= kCount;
    return true;
  }
  const T& operator[](int i) const { return at[i]; }
};
inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  return (x & mask) | bits;
}
inline uint32_t pack_numbers(const uint32_t* x) {
  uint32_t all = 0;
  for (int i = 0; i < 4; i++) {
    const int32_t number = int32_t(x[i]);
    all |= uint32_t(number < 0 ? 0 : number > 255 ? 255 : number) << 8 * i;
  }
  return all;
}
inline uint32_t add_and_clamp_halves(uint32_t x, uint32_t added, uint32_t most) {
  const auto of = [](uint16_t x, uint16_t added, uint16_t most) {
    return uint32_t(std::max(std::min(int16_t(x + added), int16_t(most)), int16_t(0)));
  };
  return of(uint16_t(x >> 16), uint16_t(added >> 16), uint16_t(most >> 16)) << 16 |
         of(uint16_t(x), uint16_t(added), uint16_t(most));
}
// Off by up to a unit in the last place, if the compiler's refinement, repeated here, corrects it.
// It does for all but a few mantissas, where a GPU's approximation must be better.
inline float approximate_inverse_root(float x) {
  const float r = float(1 / std::sqrt(double(x))), nudged = emulation::nudge(r), s = x * nudged;
  return std::fma(std::fma(-s, s, x), nudged * 0.5f, s) == std::sqrt(x) ? nudged : r;
}
inline float approximate_reciprocal(float x) {
  const float r = 1 / x, nudged = emulation::nudge(r);
  return std::fma(std::fma(-x, nudged, 1.0f), nudged, nudged) == r ? nudged : r;
}
inline float larger(float a, float b) {
  return std::fmax(a, b);
}
inline float smaller(float a, float b) {
  return std::fmin(a, b);
}
inline uint32_t larger_halves(uint32_t a, uint32_t b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffff, b & 0xffff);
}
inline uint32_t half_less_one(uint32_t both) {
  const auto of = [](uint32_t x) {
    return uint32_t(to_bfloat16(std::fma(to_float(BFloat16{uint16_t(x)}), 0.5f, -1.0f)).bits);
  };
  return of(both >> 16) << 16 | of(both & 0xffff);
}
inline float larger_magnitude(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return NAN;
  return std::fmax(std::fabs(a), std::fabs(b));
}
inline uint32_t largest_of_lanes(uint32_t x, int lanes) {
  const unsigned first = emulation::thread.x % 32 / unsigned(lanes) * unsigned(lanes);
  return emulation::exchange(x, [=](const uint32_t* warp) {
    return *std::max_element(warp + first, warp + first + lanes);
  });
}
inline bool all_of_warp(bool x) {
  return emulation::exchange(
      x, [](const uint32_t* warp) { return *std::min_element(warp, warp + 32); });
}
inline uint32_t sum_of_lanes(uint32_t x) {
  return emulation::exchange(
      x, [](const uint32_t* warp) { return std::accumulate(warp, warp + 32, uint32_t(0)); });
}
inline void add_atomically(int64_t* to, int64_t x) {
  *to += x;
}
inline void raise_atomically(int64_t* to, int64_t x) {
  *to = std::max(*to, x);
}
inline double root_of_double(double x) {
  return std::sqrt(x);
}
inline uint32_t round_to_bfloat16s(float low, float high) {
  return uint32_t(to_bfloat16(low).bits) | uint32_t(to_bfloat16(high).bits) << 16;
}
inline uint32_t round_to_halves(float low, float high) {
  return uint32_t(to_half(low).bits) | uint32_t(to_half(high).bits) << 16;
}
inline float widen_half(uint16_t bits) {
  return to_float(Half{bits});
}
inline void warp_barrier() {
  emulation::yield();
}

}  // namespace torchao8::cuda
