#include "cpu/codec_tables.h"

#include <cmath>
#include <limits>

namespace torchao8 {
namespace {

constexpr int kDecades = 7;

int last_kk(bool is_signed) {
  return is_signed ? 128 : 256;
}
int first_kk(bool is_signed, int decade) {
  return is_signed ? 1 << decade : 2 << decade;
}

// The scalar decoder, of which the vector ones are the same arithmetic.
float value_of(bool is_signed, int kk) {
  if (kk == last_kk(is_signed)) return 1.0f;
  const int exponent = kk > 0 ? std::ilogb(kk) : -1;
  const int decade = is_signed ? exponent : exponent - 1;
  if (decade < 0) return 0.0f;
  const Line line = decade_line(is_signed, decade);
  return std::fma(float(line.a), float(kk), float(line.b));
}

void build_map(float* map, bool is_signed) {
  for (int code = 0; code < 256; code++) {
    const int k = is_signed ? code - 127 : code + 1;
    map[code] = std::copysign(value_of(is_signed, std::abs(k)), k < 0 ? -1.0f : 1.0f);
  }
}

// Vector paths hold 4 * kk (signed) or 2 * kk (unsigned): see vec_*.h.
void build_decode_lines(DecodeLines& t, bool is_signed) {
  const double step = is_signed ? 4 : 2;
  for (int half = 0; half < 16; half += 8) {
    for (int i = 0; i < kDecades; i++) {
      const Line line = decade_line(is_signed, i);
      t.a[half + i + 1] = float(float(line.a) / step);
      t.b[half + i + 1] = float(line.b);
    }
    // Zero and 1.0 share an entry. Signed: kk = 0 and 128. Unsigned: kk = 1 and 256, and
    // 255 * float(1 / 255) rounds to 1.0.
    t.a[half] = is_signed ? float(1.0 / 128 / step) : float(1.0 / 255) / float(step);
    t.b[half] = is_signed ? 0.0f : -float(1.0 / 255);
  }
}

// First float that is not below the midpoint of two neighbouring magnitudes.
float rounds_up_from(float below, float above) {
  const double midpoint = (double(below) + double(above)) / 2;  // exact in double
  float x = float(midpoint);
  if (double(x) < midpoint) x = std::nextafter(x, std::numeric_limits<float>::infinity());
  return x;
}

// Words for the codes from `code` to 255. Those of negative numbers mirror them about 127, the code
// of zero, but there is no -1.0: code 0 stands for it.
void build_words(uint32_t* words, bool negative, const float* map, uint32_t code) {
  const uint32_t first_cell = negative ? kNegativeCells : 0, last = negative ? 254 : 255;
  for (uint32_t cell = 0; cell < kCells; cell++) {
    const uint32_t start_code = negative ? code - 254 : code;  // minus the mirrored one
    uint32_t low = 0x10000;                                    // no midpoint in this cell
    if (code < last) {
      const uint32_t up = float_bits(rounds_up_from(map[code], map[code + 1]));
      if (up >> 16 == cell) {
        low = up & 0xffff;
        code++;
      }
    }
    words[first_cell + cell] = (start_code << 16) + 0x10000 - low - ((first_cell + cell) << 16);
  }
}

void build_nearest(uint32_t* words, const float* map, bool is_signed) {
  // A second moment is never rounded to zero.
  const uint32_t lowest = is_signed ? kZeroCodeSigned : 1;
  build_words(words, false, map, lowest);
  if (is_signed) build_words(words, true, map, lowest);
}

struct Point {
  double value, position;
};

// The line through two codes, in floats, for a y that includes the bias.
void set_line(PositionLines& t, int d, Point from, Point to) {
  const double slope = (to.position - from.position) / (to.value - from.value);
  t.a[d] = float(slope);
  t.b[d] = float(from.position - slope * (from.value + kPositionBias));
}

void build_position(PositionLines& t, const float* map) {
  // Position is code - 1: the random number that is added lies between 1 and 2.
  const auto at = [&](int kk) { return Point{map[kk - 1], double(kk) - 2}; };
  for (int d = 0; d < kDecades; d++) {
    const int first = first_kk(false, d), last = 2 * first - 1;
    set_line(t, d, at(first), at(last));
    // Both lines meet at `first`. Class 0 needs no gap, what lies between 0 and the first code
    // being never rounded to 0: with c = 0 the gap's line is the upper one. So it is in class 7.
    t.c[d] = d > 0 ? float(at(first).position * (1.0 - 5.0 / 3.0)) : 0.0f;
    t.start[d] = d > 0 ? map[first - 2] : 0.0f;
  }
  // A block's extreme element is 1 - 2^-24, 1 or 1 + 2^-23 when divided by itself and biased. With
  // all random numbers, 1 + 2^-15 to 2 - 2^-15, it must get code 255, so that its position may be
  // no less than 254 - 2^-15 nor more than 254 + 2^-16, one unit in the last place.
  t.a[kDecades] = float(1.0 / (double(map[255]) - map[254]));
  t.b[kDecades] = float(254.0 - std::ldexp(1.1, -16) - double(t.a[kDecades]));
  t.c[kDecades] = 0.0f;
  t.start[kDecades] = map[254];
  t.start[kDecades + 1] = std::numeric_limits<float>::infinity();
  t.floor = map[1];
  while (std::fma(t.floor, t.a[0], t.b[0]) < 0.0f) t.floor = std::nextafter(t.floor, 1.0f);
}

void build_cells(PositionLines& t) {
  // Class -1 is below the floor, its line zero.
  const auto start = [&](int d) { return d == 0 ? t.floor : t.start[d]; };
  const auto set = [&](int to, int d) {
    t.cell_a[to] = d < 0 ? 0.0f : t.a[d];
    t.cell_b[to] = d < 0 ? 0.0f : t.b[d];
    t.cell_c[to] = d < 0 ? 0.0f : t.c[d];
  };
  for (int j = 0; j < 16; j++) {
    const float low = std::ldexp(1.0f, 2 * j - 31), high = 4 * low;
    int d = -1;
    while (d < kDecades && start(d + 1) <= low) d++;
    const bool inside = start(d + 1) < high;
    t.cell_start[j] = inside ? start(d + 1) : std::numeric_limits<float>::infinity();
    set(16 + j, d);
    set(j, inside ? d + 1 : d);
  }
}

}  // namespace

CodecTables::CodecTables() {
  for (int is_signed = 0; is_signed < 2; is_signed++) {
    build_map(map[is_signed], is_signed);
    build_decode_lines(decode[is_signed], is_signed);
    build_nearest(nearest[is_signed], map[is_signed], is_signed);
  }
  build_position(position, map[0]);
  build_cells(position);
}

const CodecTables& codec_tables() {
  static const CodecTables tables;
  return tables;
}

}  // namespace torchao8
