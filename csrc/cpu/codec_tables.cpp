#include "cpu/codec_tables.h"

namespace torchao8 {
namespace {

// Vector paths hold 4 * kk (signed) or 2 * kk (unsigned): see vec/.
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

void build_nearest_lines(NearestLines& t, bool is_signed) {
  const int least = is_signed ? 1 : 2;  // bits of the first decade's codes
  const int last = least + kDecades;    // of 1.0's, which is alone
  const auto start = [&](int bits) {
    const int first = 1 << (bits - 1);
    return rounds_up_from(value_of_kk(is_signed, first - 1), value_of_kk(is_signed, first));
  };
  double unit = 1e-6;
  for (int bits = least; bits < last; bits++, unit *= 10) {
    t.slope[bits % 8] = float(1 / (0.9 * unit));
    t.next_start[bits % 8] = start(bits + 1);
  }
  t.slope[last % 8] = float(1.0 / 9 + 1.0 / 1024);  // z is a little above 1
  if (is_signed) {                                  // 0 bits, modulo 8 those of 1.0: zero
    t.next_start[0] = start(least);
    t.floor = 0x1p-29f;
  } else {
    t.next_start[last % 8] = std::numeric_limits<float>::infinity();
    t.floor = value_of_kk(false, 2);  // a second moment is never rounded to zero
  }
  // The first byte stays zero, as what the upper bytes of an index look up: the floors are above
  // the first two binades.
  for (int j = 1; j < 16; j++) {
    const float begin = bits_float(uint32_t(2 * j + 96) << 23);
    int bits = is_signed ? 0 : least;
    while (bits < last && start(bits + 1) <= begin) bits++;
    t.bits[j] = t.bits[16 + j] = uint8_t(bits);
  }
}

}  // namespace

CodecTables::CodecTables() {
  for (int is_signed = 0; is_signed < 2; is_signed++) {
    for (int code = 0; code < 256; code++) map[is_signed][code] = value_of_code(is_signed, code);
    build_decode_lines(decode[is_signed], is_signed);
    build_nearest_words(nearest[is_signed], is_signed, false, 0);
    build_position_lines(position[is_signed], is_signed);
    build_nearest_lines(nearest_lines[is_signed], is_signed);
    if (is_signed) build_nearest_words(nearest[1] + kNegativeCells, true, true, 0);
  }
}

const CodecTables& codec_tables() {
  static const CodecTables tables;
  return tables;
}

}  // namespace torchao8
