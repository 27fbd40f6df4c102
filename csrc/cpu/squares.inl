// Exact sums of squares, for every instruction set. An isa_*.cpp includes this after the vector
// types of its set, with TORCHAO8_ISA naming their namespace.
//
// Without vectors: bins by exponent (square_sum.h), which take any numbers. With them: a chunk
// whose elements do not differ too much in magnitude is summed in windows of doubles.
//
// A double that starts at 1.5 * 2^52 units holds whole units up to 2^51 of them either way. Adding
// the square x^2 of a float, exact in 48 bits, rounds it to a whole number of units, and
// x^2 - (after - before) is what was lost, exact too: it goes to a window below. The lowest
// window's unit is the last bit of the smallest square, so that nothing is lost there. A window
// reaches 52 - log2(n) bits above the one below it, for n additions to a lane. In the end the bits
// of a lane less those that it started with are the units that it holds, an integer.

namespace torchao8::TORCHAO8_ISA {

#if TORCHAO8_WINDOWS

constexpr int kVectors = 4;  // additions in flight
constexpr int kSumLanes = kVectors * kDoubles;
constexpr int kLogAdditions = 7;
constexpr int kSumChunk = kSumLanes << kLogAdditions;

// The largest difference of exponents in a chunk that so many windows take: the 2^7 squares in a
// lane, below 2^(2 E - 252) each, must stay below 2^51 units of the first window, and the last
// one's unit is 2^(2 e - 300).
constexpr int kUnitStep = 52 - kLogAdditions;
constexpr int spread_of(int windows) {
  return (51 + (windows - 1) * kUnitStep + 252 - 300 - kLogAdditions) / 2;
}

TORCHAO8_HD uint64_t start_bits(int unit) {
  return (uint64_t(1023 + 52 + unit) << 52) | (uint64_t(1) << 51);
}

// Loads the next chunk into the cache while this one is summed, which needs no memory. The address
// may be past the end of the tensor: a prefetch of an invalid address does nothing.
TORCHAO8_HD void prefetch(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address));
}

template <int kWindows>
inline void add_windows(const float* x, int n, int lowest_unit, SquareSum& sum) {
  const uintptr_t next = reinterpret_cast<uintptr_t>(x) + kSumChunk * sizeof *x;
  Doubles window[kWindows][kVectors];
  for (int w = 0; w < kWindows; w++) {
    const uint64_t start = start_bits(lowest_unit + w * kUnitStep);
    for (int v = 0; v < kVectors; v++) window[w][v] = Doubles(bits_double(start));
  }
  for (int i = 0; i < n; i += kSumLanes) {
    for (int line = 0; line < kSumLanes; line += 16) prefetch(next + size_t(i + line) * sizeof *x);
    for (int v = 0; v < kVectors; v++) {
      const Doubles a = load_doubles(x + i + v * kDoubles);
      Doubles before = window[kWindows - 1][v], after = fma(a, a, before);
      window[kWindows - 1][v] = after;
      Doubles rest = fma(a, a, before - after);
      if constexpr (kWindows == 3) {
        before = window[1][v];
        after = before + rest;
        window[1][v] = after;
        rest = rest + (before - after);
      }
      window[0][v] = window[0][v] + rest;
    }
  }
  for (int w = 0; w < kWindows; w++) {
    const int unit = lowest_unit + w * kUnitStep;
    alignas(64) double lanes[kSumLanes];
    for (int v = 0; v < kVectors; v++) store_doubles(lanes + v * kDoubles, window[w][v]);
    int64_t total = 0;  // of at most 2^5 times 2^51 units
    for (int lane = 0; lane < kSumLanes; lane++)
      total += int64_t(double_bits(lanes[lane]) - start_bits(unit));
    sum.add(total, unit - kLowestBit);
  }
}

// n is a multiple of kSumLanes, at most kSumChunk.
inline void add_chunk(const float* x, int n, SquareSum& sum) {
  uint32_t largest = 0, smallest = ~0u;  // smallest: less 1, which passes over zeros
  for (int i = 0; i < n; i++) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7fffffffu, below = magnitude - 1;
    largest = magnitude > largest ? magnitude : largest;
    smallest = below < smallest ? below : smallest;
  }
  if (largest == 0) return;
  const int high = int(largest >> 23), low = int((smallest + 1) >> 23);
  const int lowest_unit = 2 * low - 300;
  // A processor may be very slow with subnormal numbers.
  if (high == 255 || low == 0 || high - low > spread_of(3)) {
    sum.add_binned(x, n);
  } else if (high - low <= spread_of(2)) {
    add_windows<2>(x, n, lowest_unit, sum);
  } else {
    add_windows<3>(x, n, lowest_unit, sum);
  }
}

inline void add_squares(const float* x, int64_t n, SquareSum& sum) {
  while (n >= kSumLanes) {
    const int count = int(n < kSumChunk ? n / kSumLanes * kSumLanes : kSumChunk);
    add_chunk(x, count, sum);
    x += count;
    n -= count;
  }
  if (n == 0) return;
  alignas(64) float tail[kSumLanes] = {};
  std::memcpy(tail, x, size_t(n) * sizeof(float));
  add_chunk(tail, kSumLanes, sum);
}

#else

inline void add_squares(const float* x, int64_t n, SquareSum& sum) {
  sum.add_binned(x, n);
}

#endif

}  // namespace torchao8::TORCHAO8_ISA
